"""Counts from HLO text, on programs small enough to count by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prolong_jax import roofline
from prolong_jax.roofline import DEVICES, demand, floors, group_size, sent_bytes, shape_bytes

BY_X = P("x")


def text_of(function, *shapes, in_specs: Any = BY_X) -> str:
    """The optimised HLO of a function over a mesh of eight devices."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=BY_X, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(sharded).lower(*arguments).compile().as_text() or ""


CASES = {  # a device holds 64 numbers, 256 bytes
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), 8 * 256 * 7 / 8),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 256 * 7 / 8),
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 2 * 256 * 7 / 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 256 * 7 / 8),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), 256),
}


@pytest.mark.parametrize("kind", CASES)
def test_collective_of_a_compiled_program(kind):
    function, sent = CASES[kind]
    found = demand(text_of(function, (512,)), 8).collectives
    assert set(found) == {kind}
    assert (found[kind].count, found[kind].bytes) == (1, sent)


def test_loop_of_known_length_counts_in_full():
    def function(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(jax.lax.psum(y, "x")), x)

    found = demand(text_of(function, (512,)), 8)
    assert found.collectives["all-reduce"].count == 5
    assert found.collectives["all-reduce"].bytes == 5 * 2 * 256 * 7 / 8
    assert found.loops_counted_once == 0


def test_loop_of_unknown_length_counts_once_and_is_named():
    def function(x, n):
        count = n[0].astype(int)
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.sin(jax.lax.psum(y, "x")), x)

    found = demand(text_of(function, (512,), (8,)), 8)
    assert found.collectives["all-reduce"].count == 1
    assert found.loops_counted_once == 1


def test_traffic_of_one_product():
    text = text_of(jnp.dot, (80, 20), (20, 30), in_specs=(BY_X, P()))
    assert demand(text, 8).bytes == 4 * (10 * 20 + 20 * 30 + 10 * 30)


def test_traffic_agrees_with_xla_where_nothing_loops():
    def function(x, w):
        for _ in range(3):
            x = jax.nn.silu(x @ w) / (1 + jnp.abs(x).sum(-1, keepdims=True))
        return x

    shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2
    compiled = jax.jit(function).lower(*shapes).compile()
    expected = (compiled.cost_analysis() or {})["bytes accessed"]
    assert demand(compiled.as_text() or "", 1).bytes == pytest.approx(expected, rel=0.1)


# Forms that TPU compilers print: on-chip memory S(1), groups by mesh axes, a reduce-scatter as a
# fusion, one gather in the two steps of a chain.
TPU = """HloModule m
%all-reduce-scatter.1 (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,128]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice.1 = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero)
}
%step.1 (q: bf16[16,128]) -> bf16[64,128] {
  %q = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}
%step.2 (q: bf16[16,128]) -> bf16[64,128] {
  %r = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%r), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}
%pick (stack: f32[4,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0} bitcast(%one)
}
%body (c: (s32[], f32[4,8,128])) -> (s32[], f32[4,8,128]) {
  %c = (s32[], f32[4,8,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %all = f32[4,8,128]{2,1,0} get-tuple-element(%c), index=1
  %picked = f32[8,128]{1,0} fusion(%all, %n), kind=kLoop, calls=%pick
  ROOT %t = (s32[], f32[4,8,128]{2,1,0}) tuple(%n, %all)
}
%below (d: (s32[], f32[4,8,128])) -> pred[] {
  %d = (s32[], f32[4,8,128]{2,1,0}) parameter(0)
  %four = s32[]{:T(128)} constant(4)
  %count = s32[]{:T(128)} get-tuple-element(%d), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %four), direction=LT
}
ENTRY %main (x: f32[64,128], y: bf16[16,128], z: (s32[], f32[4,8,128])) -> f32[16,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %z = (s32[], f32[4,8,128]{2,1,0}) parameter(2)
  %g1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%step.1
  %g2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%step.2
  %loop = (s32[], f32[4,8,128]{2,1,0}) while(%z), condition=%below, body=%body
  ROOT %s = f32[16,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_forms_of_tpu_compilers():
    found = demand(TPU, 8)
    assert set(found.collectives) == {"all-gather", "reduce-scatter"}
    gather, scatter = found.collectives["all-gather"], found.collectives["reduce-scatter"]
    assert (gather.count, gather.bytes) == (1, 64 * 128 * 2 * 3 / 4)
    assert (scatter.count, scatter.bytes) == (1, 64 * 128 * 4 * 3 / 4)
    # The scatter reads 64 rows and writes 16; each of 4 rounds reads and writes one slice.
    compared = 4 + 4 + 1
    assert found.bytes == 4 * 128 * (64 + 16) + 4 * (2 * 8 * 128 * 4 + 4 + compared)
    assert found.loops_counted_once == 0
    told = TPU.replace("condition=%below", 'backend_config={"known_trip_count":{"n":"4"}}')
    assert demand(told, 8).bytes == found.bytes - 4 * compared


# How a TPU compiler fetches a part of a weight into on-chip memory beside other work.
SLICED = """HloModule m
ENTRY %main (w: bf16[1536,8960]) -> bf16[384,8960] {
  %w = bf16[1536,8960]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[1536,8960]{1,0:T(8,128)(2,1)}), bf16[384,8960]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:384], [0:8960]}
  ROOT %d = bf16[384,8960]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
}
"""


def test_an_asynchronous_slice_is_read_once_and_alone():
    context = 2 * 4
    assert demand(SLICED, 1).bytes == 384 * 8960 * 2 + context
    to_memory = SLICED.replace("(2,1)S(1)}", "(2,1)}")
    assert demand(to_memory, 1).bytes == 2 * 384 * 8960 * 2 + context


def test_sizes_and_groups():
    assert shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/pred[5], s32[])") == 12 + 5 + 4
    assert shape_bytes("f8e4m3fn[8]{0}") == 8
    assert shape_bytes("f32[8]{0:T(256)S(1)}") == 0
    assert group_size("replica_groups=[2,4]<=[8]", 8) == 4
    assert group_size("replica_groups={{0,1},{2,3}}", 8) == 2
    assert group_size("replica_groups=mesh['a'=4,'b'=2,'c'=2] {'a','c'}", 8) == 8
    assert group_size("replica_groups={}", 8) == 8
    assert sent_bytes("all-reduce", 100, 100, 2) == 100


def test_floors():
    v5e = DEVICES["v5e"]
    assert floors(v5e, 197e12, 819e9, 200e9) == {"compute": 1.0, "memory": 1.0, "network": 1.0}
    assert floors(v5e, 394e12, 0, 50e9) == {"compute": 2.0, "memory": 0.0, "network": 0.25}


def test_utilisation_is_of_the_chip_that_jax_names():
    def mfu(flops, seconds, *devices):
        row = {"update/flops_per_token": flops / 8, "tokens/trained": 8, "time/update_s": seconds}
        return roofline.utilisation(row, *devices).get("mfu")

    assert mfu(0.5 * 197e12 * 4 * 2.0, 2.0, "TPU v5 lite", 4) == pytest.approx(0.5)
    assert mfu(459e12, 1.0, "TPU v5", 1) == pytest.approx(1)
    assert mfu(1e12, 1.0, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(1 / 989.4)
    assert mfu(1e12, 1.0, "cpu", 1) is None
    assert roofline.utilisation({"tokens/trained": 0}, "TPU v4", 1) == {}
    assert set(roofline.KINDS.values()) == set(roofline.DEVICES)
