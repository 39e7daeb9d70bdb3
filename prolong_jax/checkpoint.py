"""Everything that the next step depends on, in one atomic save.

The order of a resume:
1. the newest complete checkpoint is found (an unfinished one has another name and is passed over);
2. params, reference and optimizer state are restored onto the run's own mesh;
3. the host state follows: controller progress and its history, position in the data, surplus
   groups, counters and events;
4. metrics.jsonl and samples.jsonl are cut back to the restored step (metrics.py);
5. the run goes on with the next step. Its random numbers need no state: keys are folded from
   (seed, step, prompt, sample).
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from prolong_jax.config import CheckpointSettings
from prolong_jax.mesh import fetch
from prolong_jax.types import PyTree, TrainState


class Checkpointer:
    """Saves and restores (device state, host state) pairs below a directory."""

    def __init__(self, directory: str | Path, settings: CheckpointSettings):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=settings.keep),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Saves in the background; `host` must survive a JSON round trip."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, with the shapes and shardings of `like`.

        Raises:
          ValueError: the checkpoint is damaged or of another model.
        """
        step = self.latest_step
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes), host=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"--workdir: the checkpoint of step {step} cannot be restored "
                f"({str(error).splitlines()[0]}); remove its directory to go on from an older one."
            ) from error
        return restored["state"], restored["host"]

    def restore_params(self, like: PyTree, step: int | None = None) -> PyTree:
        """The weights alone of a checkpoint (the newest), with the shapes and shardings of `like`.

        Raises:
          ValueError: there is no such checkpoint, or it is damaged or of another model.
        """
        steps = sorted(self._manager.all_steps())
        step = self.latest_step if step is None else step
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"--step: no checkpoint of step {step}; found: {found}.")
        restore = ocp.args.PyTreeRestore(
            item={"params": like},
            restore_args={"params": ocp.checkpoint_utils.construct_restore_args(like)},
            partial_restore=True,
        )
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=restore))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"--workdir: the checkpoint of step {step} cannot be restored "
                f"({str(error).splitlines()[0]}); choose another one by --step."
            ) from error
        return restored["state"]["params"]

    def close(self) -> None:
        """Waits until the last save is complete."""
        self._manager.wait_until_finished()
        self._manager.close()


def params_sha256(mesh: Mesh, params: PyTree) -> str:
    """Hash of the weights in the order of their names."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(fetch(mesh, leaf)).tobytes())
    return digest.hexdigest()
