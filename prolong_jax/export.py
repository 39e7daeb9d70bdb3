"""A checkpoint of a run as a Hugging Face directory:

python -m prolong_jax.export --workdir=RUN [--step=N] --out=DIR [--dtype=bfloat16]

Runs on the CPU, with 4 bytes of memory per parameter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp

from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import RunConfig, build
from prolong_jax.models.decoder import Model
from prolong_jax.models.hf import read_config, save_pretrained


def export(workdir: Path, out: Path, *, step: int | None = None, dtype: str = "bfloat16") -> None:
    """Writes the policy of a run's checkpoint (the newest) to the directory `out`.

    Raises:
      ValueError: no run, no such checkpoint, or `out` is not empty.
    """
    saved = workdir / "config.json"
    if not saved.is_file() or not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"--workdir: {str(workdir)!r} holds no run with checkpoints; give the --workdir of "
            "the training command."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {str(out)!r} is not an empty directory; give a new one.")
    try:
        run: RunConfig = build(RunConfig, json.loads(saved.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"--workdir: {saved} is damaged ({error}); restore it.") from error
    model = Model(read_config(run.model.path), jnp.dtype(run.model.dtype))
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), model.shapes()
    )
    with closing(
        Checkpointer(workdir / "checkpoints", run.checkpoint, read_only=True)
    ) as checkpointer:
        params = checkpointer.restore_params(like, step)
    save_pretrained(out, model, params, source=run.model.path, dtype=dtype)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="where the run is kept")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--out", required=True, type=Path, help="new or empty directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by the run itself
    try:
        export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
