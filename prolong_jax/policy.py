"""The policy of a run: the weights of one of its checkpoints, alone."""

import json
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import RunConfig, build
from prolong_jax.mesh import param_shardings
from prolong_jax.models.decoder import Model
from prolong_jax.models.hf import read_config
from prolong_jax.types import PyTree


def is_workdir(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def restore_policy(
    workdir: Path, step: int | None = None, mesh: Mesh | None = None
) -> tuple[RunConfig, Model, PyTree, int]:
    """Settings of a run, and model and parameters of its checkpoint (the newest) with its step.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      mesh: where the parameters are to be; without one, on the CPU.

    Raises:
      ValueError: no run, or no such checkpoint.
    """
    if not is_workdir(workdir):
        raise ValueError(
            f"--workdir: {str(workdir)!r} holds no run with checkpoints; give the --workdir of "
            "the training command."
        )
    saved = workdir / "config.json"
    try:
        run: RunConfig = build(RunConfig, json.loads(saved.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"--workdir: {saved} is damaged ({error}); restore it.") from error
    model = Model(read_config(run.model.path), jnp.dtype(run.model.dtype))
    shapes = model.shapes()
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    else:
        shardings = param_shardings(mesh, shapes)
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )
    with closing(
        Checkpointer(workdir / "checkpoints", run.checkpoint, read_only=True)
    ) as checkpointer:
        params = checkpointer.restore_params(like, step)
        step = checkpointer.latest_step if step is None else step
    return run, model, params, step if step is not None else 0
