"""The device mesh, and where rows and weights live on it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prolong_jax.config import MeshSettings
from prolong_jax.types import PyTree

ROW_AXES = ("data", "fsdp")  # rows of a batch are split over both
ROWS = P(ROW_AXES)

_WEIGHTS = {  # by layer name: (input axis, output axis) of its kernel
    "query": ("fsdp", "tensor"),
    "key": ("fsdp", "tensor"),
    "value": ("fsdp", "tensor"),
    "gate": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),
    "out": ("tensor", "fsdp"),
    "down": ("tensor", "fsdp"),
    "embed": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
}


def make_mesh(settings: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices, by default of this process.

    Raises:
      ValueError: fewer devices than the mesh wants.
    """
    shape = (settings.data, settings.fsdp, settings.tensor)
    count, devices = int(np.prod(shape)), devices or jax.devices()
    if len(devices) < count:
        raise ValueError(
            f"mesh: data x fsdp x tensor = {' x '.join(map(str, shape))} wants {count} devices, "
            f"found {len(devices)} ({devices[0].platform}); make the mesh smaller."
        )
    return Mesh(
        np.array(devices[:count]).reshape(shape),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Splits the first axis of an array over the devices that share rows."""
    return NamedSharding(mesh, ROWS)


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """Asks the compiler to lay out `x` like this; nothing to ask without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """A weight split by `spec` with its fsdp parts together; its gradient is split again.

    Left to itself the compiler may multiply part by part, which rereads the activations each time.
    """
    return constrain(weight, mesh, P(*(None if axis == "fsdp" else axis for axis in spec)))


def _gather_forward(weight, mesh, spec):
    return gather(weight, mesh, spec), None


def _gather_backward(mesh, spec, _, gradient):
    return (constrain(gradient, mesh, spec),)


gather.defvjp(_gather_forward, _gather_backward)


def weight_spec(layer: str, kind: str) -> P:
    """How a weight is split: `kind` is kernel, bias, scale or embedding."""
    axes = _WEIGHTS.get(layer, ())
    return P(*(axes[-1:] if kind == "bias" else axes))


def param_shardings(mesh: Mesh, shapes: PyTree) -> PyTree:
    """A sharding for each parameter, by the name of its layer.

    Raises:
      ValueError: a dimension is not a multiple of the mesh axis that splits it.
    """

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = weight_spec(path[-2].key, path[-1].key)
        for axis, size in zip(spec, leaf.shape, strict=False):
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh: {axis} = {mesh.shape[axis]} does not divide the dimension {size} of "
                    f"the weight {jax.tree_util.keystr(path)}; choose a divisor of {size}."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes)
