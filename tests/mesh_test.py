"""Meshes over devices that are made up: only their places matter."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from prolong_jax import mesh
from prolong_jax.config import MeshSettings


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "a fast one"
    coords: tuple[int, int, int] = (0, 0, 0)  # of a TPU
    core_on_chip: int = 0


def pod(processes, each, slices=1, platform="gpu") -> list[Any]:
    """Devices of processes that are spread evenly over slices."""
    return [
        Device(n, n // each, n // each * slices // processes, platform)
        for n in range(processes * each)
    ]


@pytest.fixture
def grid(monkeypatch):
    """Makes the array of devices of a mesh, without a backend that knows them."""
    monkeypatch.setattr(mesh, "Mesh", lambda grid, names, axis_types: grid)
    return lambda devices, *shape: mesh.make_mesh(MeshSettings(*shape), devices)


def places(grid, name):
    return np.vectorize(lambda d: getattr(d, name))(grid)


def test_axes_over_several_hosts(grid):
    found = grid(pod(4, 4), 2, 4, 2)
    assert found.shape == (2, 4, 2) and len({d.id for d in found.flat}) == 16
    hosts = places(found, "process_index")
    assert (hosts == hosts[:, :, :1]).all()


def test_tensor_stays_inside_a_host_where_the_order_of_devices_does_not(grid):
    mixed = sorted(pod(2, 4), key=lambda d: d.id % 4)
    hosts = places(grid(mixed, 1, 2, 4), "process_index")
    assert (hosts == [[[0] * 4, [1] * 4]]).all()


def test_slices_are_apart_on_the_data_axis_only(grid):
    mixed = sorted(pod(4, 4, slices=2), key=lambda d: d.id % 5)
    slices = places(grid(mixed, 4, 2, 2), "slice_index")
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()


def test_nodes_of_gpus_may_share_any_axis(grid):
    found = grid(pod(2, 4, slices=2), 1, 8, 1)
    assert [d.id for d in found.flat] == list(range(8))


def test_a_tpu_slice_keeps_tensor_on_the_chips_of_a_host(grid):
    """Hosts of 2 x 2 chips in a slice of 4 x 4."""
    chips: list[Any] = [
        Device(n, n % 4 // 2 + n // 8 * 2, platform="tpu", coords=(n % 4, n // 4, 0))
        for n in range(16)
    ]
    for shape in ((1, 4, 4), (2, 4, 2), (1, 16, 1)):
        found = grid(chips, *shape)
        hosts = places(found, "process_index")
        assert found.shape == shape and (hosts == hosts[:, :, :1]).all()
        assert len({d.id for d in found.flat}) == 16


@pytest.mark.parametrize(
    "devices, shape, message",
    [
        (pod(1, 4), (1, 8, 1), "1 x 8 x 1 wants 8 devices, found 4 .gpu.; make the mesh smaller"),
        (pod(2, 4), (1, 4, 1), "wants 4 devices, found 8 .gpu.; make it use all of them"),
        (pod(2, 4), (1, 1, 8), "tensor = 8 must divide the 4 devices of a process"),
        (pod(4, 4, 2, "tpu"), (1, 16, 1), "data = 1 must be a multiple of the 2 slices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(grid, devices, shape, message):
    with pytest.raises(ValueError, match=message):
        grid(devices, *shape)


def test_a_mesh_may_use_some_of_the_devices_of_one_host():
    found = mesh.make_mesh(MeshSettings(2, 1, 2))
    assert dict(found.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert found.axis_types == (AxisType.Auto,) * 3
    assert list(found.devices.flat) == jax.devices()[:4]
    chosen = mesh.make_mesh(MeshSettings(1, 2, 1), jax.devices()[4:])
    assert list(chosen.devices.flat) == jax.devices()[4:6]
    assert dict(mesh.local_mesh(found).shape) == {"data": 1, "fsdp": 2, "tensor": 2}


def test_put_copy_and_fetch_are_inverse():
    over = mesh.make_mesh(MeshSettings(1, 4, 1))
    values = {"a": np.arange(8.0), "b": np.arange(4.0)}
    split = mesh.put(values, jax.NamedSharding(over, P("fsdp")))
    assert split["a"].addressable_shards[1].data.tolist() == [2.0, 3.0]
    for array in (split, mesh.local_arrays(over, split)):
        assert jax.tree.all(jax.tree.map(np.array_equal, mesh.fetch(over, array), values))
