"""Compiles a run's programs for accelerators that are not there: do they fit, and how fast at best?

    python -m prolong_jax.compile_check --config=FILE --topology=v5e:4x4 [--topology=h100:8 ...]
        [--only=update,score,prefill,decode] [--stage=N] [--search] [--json] [--config.KEY=VALUE]

Shapes and shardings are those of the run. `mesh.fsdp` is set so that the mesh covers the topology,
and `update.micro_batch_rows` is rounded up to what the mesh divides. No weights are read. Several
topologies give one table. Needs the wheels of the extra `tpu-compile` or `cuda-compile`.

Sizes and rates are per device, of one micro-batch (update, score), one call (prefill) or one token
of every row (decode). FLOPs are counted three ways: *formula*, what the mathematics asks for (the
floor in time takes this one); *traced*, all matrix products of the traced program, with those that
are computed again for the gradient, but without custom kernels; *XLA*, as its cost analysis says,
where the body of a loop counts once.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prolong_jax import sampler
from prolong_jax.config import ASSETS, RunConfig, check, for_stage, load, packing, row_layout
from prolong_jax.mesh import (
    ROW_AXES,
    ROWS,
    cache_spec,
    make_mesh,
    param_shardings,
    replicated,
    sampling_shardings,
)
from prolong_jax.models.attention import Layout
from prolong_jax.models.decoder import Model, ModelConfig, cast_for_sampling, for_training
from prolong_jax.models.hf import read_config
from prolong_jax.next_token import SamplingRule
from prolong_jax.optimizer import make_optimizer, opt_state_shardings
from prolong_jax.packing import pack
from prolong_jax.roofline import DEVICES, Device, demand, floors
from prolong_jax.slots import slots_of
from prolong_jax.types import PyTree, TrainState
from prolong_jax.update import make_score, make_update

PROGRAMS = ("update", "score", "prefill", "decode")
TPUS, GPUS = ("v4", "v5e", "v5p", "v6e"), ("h100", "h200")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Program:
    """A jitted function with the shapes and shardings that a run calls it with."""

    name: str
    function: Any
    arguments: tuple
    flops: float  # of all devices, by formula
    resident: PyTree = ()  # arrays beside the arguments that lie on the devices meanwhile


# --- targets -------------------------------------------------------------------------------------


def target_devices(topology: str) -> list[Any]:
    """The devices of a topology such as v5e:4x4 or h100:8, to compile for.

    Raises:
      ValueError: an unknown topology, or a compiler that is not installed.
    """
    kind, _, shape = topology.partition(":")
    if not (kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", shape)) and not (
        kind in GPUS and re.fullmatch(r"[1-9]\d*", shape)
    ):
        raise ValueError(
            f"--topology: unknown topology {topology!r}; expected {', '.join(TPUS)} with a shape, "
            f"such as v5e:4x4, or {', '.join(GPUS)} with a number of GPUs, such as h100:8."
        )
    wheels, extra = (("libtpu",), "tpu-compile")
    if kind in GPUS:
        wheels, extra = ("jax_cuda12_plugin", "nvidia", "nvidia.cudnn"), "cuda-compile"
    missing = next((name for name in wheels if importlib.util.find_spec(name) is None), "")
    if missing:
        raise ValueError(
            f"--topology: {topology} needs the package {missing}, which is not installed; "
            f"pip install -c constraints.txt -e '.[{extra}]'."
        )
    jax.config.update("jax_platforms", "cpu")  # the host's own accelerators are left alone
    try:
        return list((_gpus if kind in GPUS else _tpus)(kind, shape).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology: the compiler refuses {topology} ({str(error).splitlines()[0]}); "
            "choose a shape that can be ordered."
        ) from error


def _tpus(kind: str, shape: str) -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the metadata server of a VM
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so no lock either
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-16")  # of a host that is not used
    # Two cores of a v4 chip are one device on real slices.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    return topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", **options)


def _gpus(kind: str, count: str) -> Any:
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    tools = [str(Path(folder) / "cuda_nvcc" / "bin") for folder in folders]
    os.environ["PATH"] = os.pathsep.join([*tools, os.environ.get("PATH", "")])  # ptxas
    text, device = (ASSETS / "gpu_target.txt").read_text(), DEVICES[kind]
    text = text.replace("{name}", kind.upper()).replace("{memory}", f"{device.memory:.0f}")
    text = text.replace("{bandwidth}", f"{device.bandwidth:.0f}")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=text, topology=f"1x1x{count}"
    )


def fit_mesh(run: RunConfig, count: int) -> RunConfig:
    """The run on `count` devices: fsdp covers them, and the rows of a micro-batch divide.

    Raises:
      ValueError: mesh.data * mesh.tensor does not divide the count, or the sizes do not fit.
    """
    others = run.mesh.data * run.mesh.tensor
    if count % others:
        raise ValueError(
            f"mesh: data x tensor = {others} does not divide the {count} devices of the topology; "
            "choose divisors."
        )
    mesh = dataclasses.replace(run.mesh, fsdp=count // others)
    devices = mesh.data * mesh.fsdp
    rows = -(-run.update.micro_batch_rows // devices) * devices
    run = dataclasses.replace(
        run, mesh=mesh, update=dataclasses.replace(run.update, micro_batch_rows=rows)
    )
    check(run)
    return run


# --- programs ------------------------------------------------------------------------------------


def model_of(run: RunConfig) -> Model:
    """The run's model; its shape from `model.shape` where `model.path` is no local directory.

    Raises:
      ValueError: no such shape, or one that is not supported.
    """
    source = run.model.path
    if run.model.shape and not Path(source).is_dir():
        source = run.model.shape
        if source.endswith(".json") and not Path(source).is_file():
            raise ValueError(f"model.shape: there is no file {source}; give that of a config.json.")
    return Model(read_config(source), jnp.dtype(run.model.dtype))


def programs(run: RunConfig, mesh: Mesh, model: Model, only: Sequence[str]) -> Iterator[Program]:
    """The named programs of a run on a mesh."""
    state = _state(run, mesh, model)
    if "update" in only or "score" in only:
        sizes = packing(run)
        shape = (sizes["micro_batches"], sizes["micro_batch_rows"], sizes["row_len"])
        example, _ = pack([], row_len=1, micro_batch_rows=1, micro_batches=1, layout=Layout())
        batch = _sharded(example, NamedSharding(mesh, P(None, ROW_AXES)), shape)
        tokens = shape[1] * shape[2]
        forward = forward_flops(model.config, tokens, shape[2] / 2, tokens)
        trained = for_training(model, mesh, run.model, row_layout(run))
        temperature, optimizer = run.rollout.temperature, make_optimizer(run.optimizer)
        one_update = run.update.num_minibatches == 1
        if "update" in only:
            update = make_update(
                trained, optimizer, mesh, run.loss, temperature, on_policy=one_update
            )
            given = (state, batch, 1, run.loss.entropy_coef)
            yield Program("update", update, given, 3 * forward)
        if "score" in only:
            score = make_score(trained, temperature, policy=not one_update)
            yield Program("score", score, (state, batch, 1), (2 - one_update) * forward)
    yield from _sampling(run, mesh, model, only, state)


def _sampling(
    run: RunConfig, mesh: Mesh, model: Model, only: Sequence[str], state: TrainState
) -> Iterator[Program]:
    """All slots taken, in the longest cache, and as many prompts as are read at once.

    All hosts together, each with `sample_rows`: compilers do not take a part of a topology.
    """
    config, hosts = model.config, len({d.process_index for d in mesh.devices.flat})
    total = dataclasses.replace(run.rollout, sample_rows=hosts * run.rollout.sample_rows)
    slots = slots_of(total, mesh)
    rule = SamplingRule((0,), run.rollout.temperature)
    cast = jax.eval_shape(lambda params: cast_for_sampling(model, params), state.params)
    params = jax.tree.map(_struct, cast, sampling_shardings(mesh, cast))
    rows, columns = slots.most * slots.devices, slots.all_cache_lens[-1]
    heads = NamedSharding(mesh, cache_spec(config.num_kv_heads, mesh))
    shape = (rows, config.num_kv_heads, config.head_dim, columns)
    keys = jax.ShapeDtypeStruct(shape, model.dtype, sharding=heads)
    values = jax.ShapeDtypeStruct((*shape[:2], *shape[:1:-1]), model.dtype, sharding=heads)
    cache = ((keys, values),) * config.num_layers

    def of_rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(mesh, ROWS))

    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    if "prefill" in only:
        P_, T = slots.prompt_block * slots.devices, run.rollout.max_prompt_len
        blocks = NamedSharding(mesh, P(None, ROW_AXES))
        tokens, valid = (
            jax.ShapeDtypeStruct((slots.prompt_blocks, P_, T), dtype, sharding=blocks)
            for dtype in (jnp.int32, jnp.bool)
        )
        flops = forward_flops(config, P_ * T, T / 2, 0)
        arguments = (model, params, tokens, valid, number, T)
        yield Program("prefill", sampler._prefill, arguments, flops, (state, cache))
    if "decode" in only:
        key, each, done = of_rows(jnp.uint32, 2), of_rows(jnp.int32), of_rows(jnp.bool)
        state_of_rows = sampler._Rows(key, each, each, each, each, done)
        flops = forward_flops(config, rows, columns, rows)
        arguments = (model, params, cache, state_of_rows, number, number, rule, slots.chunk)
        yield Program("decode", sampler._decode, arguments, flops, state)


def _state(run: RunConfig, mesh: Mesh, model: Model) -> TrainState:
    optimizer, shapes = make_optimizer(run.optimizer), model.shapes()
    shardings = param_shardings(mesh, shapes)
    params = jax.tree.map(_struct, shapes, shardings)
    moments = jax.eval_shape(optimizer.init, shapes)
    opt_state = jax.tree.map(_struct, moments, opt_state_shardings(optimizer, shapes, shardings))
    return TrainState(params, params, opt_state)


def _struct(x: Any, sharding: NamedSharding, shape: tuple | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=sharding)


def _sharded(tree: PyTree, sharding: NamedSharding, shape: tuple | None = None) -> PyTree:
    return jax.tree.map(lambda x: _struct(x, sharding, shape), tree)


def local_bytes(tree: PyTree) -> int:
    """Bytes on one device of arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# --- FLOPs ---------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, tokens: float, context: float, logits: float) -> float:
    """Matrix products of one forward pass, two FLOPs for each multiplication.

    Args:
      config: the shape of the model.
      tokens: that pass through the layers.
      context: tokens that one attends to, on average; half a row where it is one sequence.
      logits: tokens whose next one is predicted.
    """
    D, heads = config.width, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    weights = 2 * D * heads + 2 * D * kv_heads + 3 * D * config.ff_dim
    layer = 2 * tokens * weights + 4 * tokens * heads * context
    return config.num_layers * layer + 2 * logits * D * config.vocab_size


def traced_flops(jaxpr: Any) -> float:
    """Matrix products of a traced program on all devices; a `while` counts once, a scan in full."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
            continue
        if eqn.primitive.name == "pallas_call":
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "shard_map":
            times = eqn.params["mesh"].size
        inner = [traced_flops(j) for j in _inner_jaxprs(eqn.params)]
        total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


# --- one program on one topology -----------------------------------------------------------------


def examine(program: Program, device: Device, mesh: Mesh) -> dict[str, Any]:
    """Compiles a program and measures it, per device; see `report` for the fields."""
    started, count = time.monotonic(), mesh.size
    traced = program.function.trace(*program.arguments)
    found: dict[str, Any] = {
        "program": program.name,
        "device_bytes": device.memory,
        "resident_bytes": local_bytes(program.resident),
        "flops": program.flops / count,
        "flops_traced": traced_flops(traced.jaxpr.jaxpr) / count,
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"compile_s": time.monotonic() - started} | _too_large(str(error), found)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None
    found |= {
        "compile_s": time.monotonic() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    peak = sum(found[kind] for kind in ("argument_bytes", "output_bytes", "temp_bytes"))
    # Only TPU compilers count arguments and outputs in their peak, which may lie below the sum.
    if mesh.devices.flat[0].platform == "tpu" and memory.peak_memory_in_bytes:
        peak = min(peak, memory.peak_memory_in_bytes)
    total = found["resident_bytes"] + peak + found["code_bytes"]
    asked = demand(compiled.as_text() or "", count)
    network = sum(kind.bytes for kind in asked.collectives.values())
    return found | {
        "total_bytes": total,
        "fits": total <= device.memory,
        "spare_bytes": device.memory - total,
        "flops_xla": costs.get("flops"),
        "bytes": asked.bytes,
        "bytes_xla": costs.get("bytes accessed"),
        "collectives": {k: dataclasses.asdict(v) for k, v in asked.collectives.items()},
        "loops_counted_once": asked.loops_counted_once,
        "floor_s": floors(device, found["flops"], asked.bytes, network),
    }


def _too_large(message: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler says where a program does not fit: TPU compilers refuse it."""
    sizes = re.search(r"(?:Used |temporaries \()([\d.]+)([KMG])", message)
    needed = float(sizes.group(1)) * _UNITS[sizes.group(2)] if sizes else math.nan
    total = needed + found["resident_bytes"]
    return {
        "fits": False,
        "total_bytes": total,
        "spare_bytes": found["device_bytes"] - total,
        "refused": message.splitlines()[0],
    }


def largest_micro_batch(run: RunConfig, topology: str, devices: Sequence[Any]) -> int:
    """The most rows of a micro-batch with which the update fits, by doubling and bisection; or 0."""
    sizes, unit = packing(run), run.mesh.data * run.mesh.fsdp
    most = -(-sizes["micro_batches"] * sizes["micro_batch_rows"] // unit)

    def fits(units: int) -> bool:
        update = dataclasses.replace(run.update, micro_batch_rows=units * unit)
        trial = dataclasses.replace(run, update=update)
        mesh, model = make_mesh(trial.mesh, devices), model_of(trial)
        program = next(programs(trial, mesh, model, ["update"]))
        fitting = examine(program, DEVICES[topology.partition(":")[0]], mesh)["fits"]
        print(f"{topology}: {units * unit} rows {'fit' if fitting else 'do not'}", file=sys.stderr)
        return fitting

    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good * unit


# --- reports -------------------------------------------------------------------------------------


def report(
    run: RunConfig, topology: str, only: Sequence[str], *, search: bool = False
) -> dict[str, Any]:
    """All that is found out about a run on one topology, as written by --json."""
    devices = target_devices(topology)
    run, device = fit_mesh(run, len(devices)), DEVICES[topology.partition(":")[0]]
    mesh, model = make_mesh(run.mesh, devices), model_of(run)
    found = [examine(p, device, mesh) for p in programs(run, mesh, model, only)]
    result = {
        "topology": topology,
        "devices": len(devices),
        "device": dataclasses.asdict(device),
        "mesh": dict(mesh.shape),
        "micro_batch_rows": run.update.micro_batch_rows,
        "row_len": run.update.row_len,
        "programs": found,
    }
    if search:
        result["largest_micro_batch_rows"] = largest_micro_batch(run, topology, devices)
    return result


def describe(result: Mapping[str, Any]) -> str:
    """One topology as text."""
    device = result["device"]
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [
        f"{result['topology']}: {result['devices']} devices, mesh {mesh}; "
        f"{result['micro_batch_rows']} rows of {result['row_len']} tokens in a micro-batch",
        f"a device: {device['flops'] / 1e12:.0f} TFLOP/s bfloat16, {_gib(device['memory'])} GiB at "
        f"{device['bandwidth'] / 1e9:.0f} GB/s, links {device['link'] / 1e9:.0f} GB/s one way "
        f"({device['source']})",
    ]
    for found in result["programs"]:
        lines += ["", *_describe_program(found)]
    if "largest_micro_batch_rows" in result:
        lines += ["", f"largest micro_batch_rows that fits: {result['largest_micro_batch_rows']}"]
    return "\n".join(lines)


def _describe_program(found: Mapping[str, Any]) -> Iterator[str]:
    verdict = "fits, " if found["fits"] else "does NOT fit, "
    verdict += f"{_gib(abs(found['spare_bytes']))} GiB " + ("spare" if found["fits"] else "over")
    yield f"{found['program']}: {verdict} (compiled in {found['compile_s']:.0f} s)"
    if "refused" in found:
        yield f"  the compiler: {found['refused']}"
        return
    parts = ("argument", "output", "temp", "code", "resident")
    sizes = ", ".join(f"{part} {_gib(found[part + '_bytes'])}" for part in parts)
    yield f"  memory, GiB: {sizes}; at the peak {_gib(found['total_bytes'])}"
    yield (
        f"  TFLOP: formula {found['flops'] / 1e12:.3g}, traced {found['flops_traced'] / 1e12:.3g}, "
        f"XLA {(found['flops_xla'] or math.nan) / 1e12:.3g}"
    )
    once = found["loops_counted_once"]
    note = f"; {once} loops of unknown length counted once" if once else ""
    xla = (found["bytes_xla"] or math.nan) / 1e9
    yield f"  memory traffic, GB: {found['bytes'] / 1e9:.3g} (XLA {xla:.3g}){note}"
    for kind, sent in found["collectives"].items():
        yield f"  {kind}: {sent['count']:.0f} times, {sent['bytes'] / 1e6:.3g} MB sent"
    floor = found["floor_s"]
    times = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in floor.items())
    yield f"  at least, ms: {times}; bound by {max(floor, key=floor.__getitem__)}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Several topologies as a Markdown table, a row for each program."""
    lines = [
        "| topology | mesh | rows | program | GiB of | fits | TFLOP | GB moved | GB sent "
        "| compute, memory, network ms | compiled in s |",
        "|---|---|---:|---|---:|---|---:|---:|---:|---|---:|",
    ]
    for result in results:
        mesh, rows = "x".join(map(str, result["mesh"].values())), result["micro_batch_rows"]
        for found in result["programs"]:
            size = f"{_gib(found['total_bytes'])} of {_gib(found['device_bytes'])}"
            cells = [result["topology"], mesh, rows, found["program"], size]
            cells += ["yes" if found["fits"] else "**no**", f"{found['flops'] / 1e12:.3g}"]
            if "refused" not in found:
                sent = sum(kind["bytes"] for kind in found["collectives"].values())
                cells += [f"{found['bytes'] / 1e9:.3g}", f"{sent / 1e9:.3g}"]
                cells.append(", ".join(f"{1e3 * s:.3g}" for s in found["floor_s"].values()))
            else:
                cells += ["", "", ""]
            lines.append("| " + " | ".join(map(str, [*cells, f"{found['compile_s']:.0f}"])) + " |")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True, help="experiment file with get_config()")
    parser.add_argument("--topology", required=True, action="append", help="v5e:4x4, h100:8, ...")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="programs, with commas")
    stage = "whose overrides apply, from 0; the one with the longest rows by default"
    parser.add_argument("--stage", type=int, help=stage)
    parser.add_argument("--search", action="store_true", help="largest micro-batch that fits")
    parser.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args(argv)
    args.only = args.only.split(",")
    for names, known, option in (
        (args.only, PROGRAMS, "--only"),
        ([a.partition(".")[0] for a in rest], ("--config",), "arguments"),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{option}: unknown {unknown[0]!r}; expected {', '.join(known)}.")
    run = load(args.config, [arg.removeprefix("--config.") for arg in rest])
    if args.stage is None:
        stages = range(len(run.stages))
        args.stage = max(stages, key=lambda i: for_stage(run, i).update.row_len)
    if not 0 <= args.stage < len(run.stages):
        raise ValueError(f"--stage: expected 0 to {len(run.stages) - 1}, got {args.stage}.")
    return args, for_stage(run, args.stage)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, run = _parse(sys.argv[1:] if argv is None else argv)
        results = [report(run, name, args.only, search=args.search) for name in args.topology]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(table(results) if len(results) > 1 else describe(results[0]))
    return 0 if all(p["fits"] for r in results for p in r["programs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
