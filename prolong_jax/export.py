"""A checkpoint of a run as a Hugging Face directory:

python -m prolong_jax.export --workdir=RUN [--step=N] --out=DIR [--dtype=bfloat16]

Runs on the CPU, with 4 bytes of memory per parameter.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from prolong_jax.models.hf import save_pretrained
from prolong_jax.policy import restore_policy


def export(workdir: Path, out: Path, *, step: int | None = None, dtype: str = "bfloat16") -> None:
    """Writes the policy of a run's checkpoint (the newest) to the directory `out`.

    Raises:
      ValueError: no run, no such checkpoint, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {str(out)!r} is not an empty directory; give a new one.")
    run, model, params, _ = restore_policy(workdir, step)
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
