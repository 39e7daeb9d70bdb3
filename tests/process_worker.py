"""One of several processes of a test: python -m tests.process_worker ADDRESS COUNT ID OUT"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from prolong_jax import processes, update
from prolong_jax.config import MeshSettings
from prolong_jax.mesh import make_mesh
from prolong_jax.objectives import make_objective
from prolong_jax.types import Mean

MESH = MeshSettings(1, 2, 2)  # rows and weights over the processes, tensor inside


def flat_gradient() -> np.ndarray:
    from tests.update_test import gradient  # computes something at import

    return np.asarray(ravel_pytree(gradient(mesh=make_mesh(MESH))[0])[0])


def mean_of_means(**settings):
    """The planted error: a device divides by its own weight, and the quotients are averaged."""
    objective = make_objective(**settings)

    def planted(*arrays):
        total, statistics = objective(*arrays)
        weight, devices = (jax.lax.psum(x, update.ROW_AXES) for x in (total.weight, 1))
        share = weight / (devices * jax.numpy.maximum(total.weight, 1.0))
        return Mean(total.total * share, total.weight), statistics

    return planted


def shares() -> list:
    """Squares of 0 ... 4, and the message where one process refuses its share."""

    def work(numbers):
        if 13 in numbers:
            raise ValueError("13 is refused")
        return [n * n for n in numbers]

    try:
        processes.share([1, 2, 3, 13], work)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return [processes.share(list(range(5)), work), refusal]


def main(address: str, count: str, number: str, out: str) -> None:
    processes.start(
        MeshSettings(coordinator=address, num_processes=int(count), process_id=int(number))
    )
    found = {"devices": len(jax.devices()), "local": len(jax.local_devices()), "shares": shares()}
    stop = processes.StopSignal()
    stop.requested = number == "1"
    found["stops"] = stop.agreed()
    Path(out, f"{number}.json").write_text(json.dumps(found))
    right = flat_gradient()
    update.make_objective = mean_of_means
    np.savez(Path(out, f"{number}.npz"), right=right, planted=flat_gradient())
    print("only the first says this")


if __name__ == "__main__":
    main(*sys.argv[1:])
