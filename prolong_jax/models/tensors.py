"""safetensors files, read and written one tensor at a time.

The library's own numpy functions hold a whole file in memory, in older versions without bfloat16.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: Path
    dtype: str  # of the safetensors format
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self) -> np.ndarray:
        count = int(np.prod(self.shape))
        values = np.fromfile(self.file, _DTYPES[self.dtype], count, offset=self.offset)
        return values.reshape(self.shape)


def open_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file by their names; only its header is read.

    Raises:
      ValueError: the file is missing or broken, or holds numbers that are not supported.
    """
    try:
        with safe_open(file, "numpy"):
            pass  # that checks the header against the size of the file
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"model.path: {file} is broken ({error}); download it again.") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"model.path: tensor {name!r} in {file} is of type {entry['dtype']}; expected one "
                f"of {', '.join(_DTYPES)}: use a checkpoint that is not quantized."
            )
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, values: Iterable[np.ndarray]
) -> None:
    """Writes tensors of one dtype; `values` come in the order of `shapes`, one at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            np.ascontiguousarray(value.astype(dtype, copy=False)).tofile(stream)
