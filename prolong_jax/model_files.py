"""Where a model's files are: a local directory, a repository of the hub, or an address."""

import hashlib
import os
import re
from pathlib import Path

_SETTINGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_WEIGHTS = "*.safetensors"


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """A local directory with the files of `model.path`.

    Args:
      path: a directory, a repository of the Hugging Face hub ('owner/name'), or an address such
        as 'gs://bucket/model'. What is not local is copied once into a cache.
      weights: whether the safetensors files are wanted, beside configuration and tokenizer.

    Raises:
      ValueError: nothing is there, or it cannot be reached.
    """
    name = str(path)
    if Path(name).is_dir():
        return Path(name)
    patterns = (*_SETTINGS, _WEIGHTS) if weights else _SETTINGS
    if "://" in name:
        return _from_address(name, patterns)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _from_hub(name, patterns)
    raise ValueError(
        f"model.path: expected a Hugging Face model directory with a config.json, found none in "
        f"{name!r}; give the path of a downloaded checkpoint, 'owner/name' of the hub, or an "
        "address (gs://...)."
    )


def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"model.path: found no directory {name!r}, nor such a repository on the Hugging Face "
            f"hub ({reason[0] if reason else type(error).__name__}); check the name and the "
            "network, or download it and give the path of its directory."
        ) from error


def _from_address(address: str, patterns: tuple[str, ...]) -> Path:
    """Copies files that the cache does not hold yet in the same size."""
    import fsspec

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    target = Path(base) / "prolong_jax" / "models" / digest
    target.mkdir(parents=True, exist_ok=True)
    try:
        files, root = fsspec.core.url_to_fs(address.rstrip("/"))
        entries = [e for e in files.ls(root, detail=True) if e["type"] == "file"]
        for entry in entries:
            copy = target / Path(entry["name"]).name
            if any(copy.match(p) for p in patterns) and not _has_size(copy, entry["size"]):
                part = copy.with_name(f"{copy.name}.{os.getpid()}.part")
                files.get_file(entry["name"], str(part))
                part.replace(copy)  # whole or absent, whatever happens meanwhile
    except ImportError as error:
        raise ValueError(
            f"model.path: {address!r} needs another package ({error}); for gs:// that is "
            "`pip install gcsfs`."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: {address!r} cannot be read ({error}); check the address and your "
            "credentials, or copy it and give the path of the directory."
        ) from error
    return target


def _has_size(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size
