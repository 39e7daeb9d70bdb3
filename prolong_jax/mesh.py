"""The device mesh, and where rows and weights live on it."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    """A mesh over the first data * fsdp * tensor devices; over all, where several hosts have them.

    Neighbours of the tensor axis belong to one process, and slices of a TPU pod that are joined by
    the data-centre network only are apart on the data axis.

    Args:
      settings: the size of each axis.
      devices: None: all of this run.

    Raises:
      ValueError: the devices do not fit the mesh.
    """
    shape = (settings.data, settings.fsdp, settings.tensor)
    count, devices = math.prod(shape), list(jax.devices() if devices is None else devices)
    spread = len({d.process_index for d in devices}) > 1
    if len(devices) < count or (spread and len(devices) > count):
        raise ValueError(
            f"mesh: data x fsdp x tensor = {' x '.join(map(str, shape))} wants {count} devices, "
            f"found {len(devices)} ({devices[0].platform}); "
            + ("make it use all of them." if spread else "make the mesh smaller.")
        )
    slices = _slices(devices[:count])
    if settings.data % len(slices):
        if devices[0].platform == "tpu":
            raise ValueError(
                f"mesh: data = {settings.data} must be a multiple of the {len(slices)} slices."
            )
        slices = [devices[:count]]  # nodes of GPUs: any axis may lie across
    shape = (settings.data // len(slices), settings.fsdp, settings.tensor)
    grid = np.concatenate([_arrange(shape, part) for part in slices])
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by `slice_index`, which those of several slices have."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [slices[index] for index in sorted(slices)]


def _arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a slice [data, fsdp, tensor], by their network where it is known."""

    def is_inside(grid: np.ndarray) -> bool:
        groups = grid.reshape(-1, shape[-1])
        return all(len({d.process_index for d in group}) == 1 for group in groups)

    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if not is_inside(grid):
        grid = np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(shape)
    if not is_inside(grid):
        local = len([d for d in devices if d.process_index == devices[0].process_index])
        raise ValueError(
            f"mesh: tensor = {shape[-1]} must divide the {local} devices of a process; choose a "
            "smaller one."
        )
    return grid


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh over the devices of this process, with the same tensor axis."""
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    grid = np.array(local).reshape(1, -1, mesh.shape["tensor"])
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)


def put(values: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays, the same in every process, on the devices; shardings may be a prefix."""
    if jax.process_count() == 1:
        return jax.device_put(values, shardings)

    def one(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: one(np.asarray(x), sharding), part),
        shardings,
        values,
    )


@functools.cache
def _gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda values: values, out_shardings=replicated(mesh))


def sampling_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Weights split over the tensor axis alone: a decode step shall gather none of them."""

    def sharding(path: tuple, x: Any) -> NamedSharding:
        spec = weight_spec(path[-2].key, path[-1].key)
        return NamedSharding(mesh, P(*("tensor" if axis == "tensor" else None for axis in spec)))

    return jax.tree_util.tree_map_with_path(sharding, params)


def local_arrays(mesh: Mesh, values: PyTree) -> PyTree:
    """Global arrays that every process has whole, as arrays on the local mesh; nothing is copied."""
    if jax.process_count() == 1:
        return values
    local = local_mesh(mesh)

    def one(x: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in x.addressable_shards}
        ordered = [parts[device] for device in local.devices.flat]
        found: Any = x.sharding
        # The fsdp axis may have one device there and several here.
        spec = P(*("tensor" if axis == "tensor" else None for axis in found.spec))
        sharding = NamedSharding(local, spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, ordered)

    return jax.tree.map(one, values)


def fetch(mesh: Mesh, values: PyTree) -> PyTree:
    """Global arrays as host arrays; all processes have to ask."""
    return jax.device_get(values if jax.process_count() == 1 else _gather(mesh)(values))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Splits the first axis of an array over the devices that share rows."""
    return NamedSharding(mesh, ROWS)


def cache_spec(kv_heads: int, mesh: Mesh) -> P:
    """Rows over the devices that share them, and heads over the tensor axis where it divides."""
    return P(ROW_AXES, None if kv_heads % mesh.shape["tensor"] else "tensor")


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
