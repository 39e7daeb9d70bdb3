"""compile_check: what it counts, what it refuses, and the whole tool on eight CPU devices."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from prolong_jax import compile_check
from prolong_jax.compile_check import (
    fit_mesh,
    forward_flops,
    largest_micro_batch,
    local_bytes,
    main,
    model_of,
    programs,
    target_devices,
    traced_flops,
)
from prolong_jax.config import TINY_BASE, load, packing
from prolong_jax.mesh import make_mesh
from prolong_jax.models.attention import Packed
from tests.tiny import MODEL, SHAPE

CONFIGS = Path(__file__).parent.parent / "experiments" / "configs"
TINY = f"--config={CONFIGS / 'tiny.py'}"
REAL = CONFIGS / "prorl_v1_1p5b.py"
SMALL = [
    "rollout.max_response_len=32",
    "rollout.max_prompt_len=32",
    "update.row_len=64",
]


@pytest.mark.parametrize("topology", ["v7:2x2", "v5e", "v5e:4", "v5e:4x", "h100:0", "h100:2x4", ""])
def test_unknown_topology_is_refused(topology, capsys):
    assert main([TINY, f"--topology={topology}"]) == 2
    error = capsys.readouterr().err
    assert f"unknown topology {topology!r}" in error and "such as v5e:4x4" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu-compile"), ("h200:8", "jax_cuda12_plugin", "cuda-compile")],
)
def test_missing_compiler_is_named(topology, package, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*pip install .*{extra}"):
        target_devices(topology)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--only=update,train", "--only: unknown 'train'"),
        ("--workdir=x", "unknown '--workdir=x'"),
        ("--stage=9", "expected 0 to 2, got 9"),
        ("--config.mesh.tensor=3", "does not divide the 8 devices"),
    ],
)
def test_bad_arguments_are_refused(argument, message, capsys, monkeypatch):
    monkeypatch.setattr(compile_check, "target_devices", lambda topology: jax.devices()[:8])
    assert main([TINY, "--topology=v5e:2x4", argument]) == 2
    assert message in capsys.readouterr().err


def test_mesh_covers_the_topology_and_rows_divide():
    run = fit_mesh(load(CONFIGS / "tiny.py"), 8)
    assert (run.mesh.fsdp, run.update.micro_batch_rows) == (8, 8)
    run = fit_mesh(load(CONFIGS / "tiny.py", ["mesh.tensor=2", "update.micro_batch_rows=6"]), 8)
    assert (run.mesh.fsdp, run.mesh.tensor, run.update.micro_batch_rows) == (4, 2, 8)


def test_shape_of_the_first_real_configuration():
    run = load(REAL)
    model = model_of(run)
    sizes = [leaf.size for leaf in jax.tree.leaves(model.shapes())]
    assert sum(sizes) == 1_777_088_000  # as its model card counts
    assert (run.update.row_len, run.rollout.group_size) == (8192, 16)
    args, longest = compile_check._parse([f"--config={REAL}", "--topology=v5e:4x4"])
    assert (args.stage, longest.update.row_len) == (7, 16384)


def test_a_shape_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"model\.shape: there is no file .*nowhere\.json"):
        model_of(load(REAL, ["model.shape=shapes/nowhere.json"]))


def test_formula_agrees_with_the_traced_products():
    B, T = 3, 7
    tokens = jnp.zeros((B, T), jnp.int32)

    def forward(params):
        hidden, _ = MODEL.hidden(params, tokens, tokens, Packed(tokens, tokens))
        return MODEL.logits(params, hidden)

    traced = traced_flops(jax.make_jaxpr(forward)(MODEL.shapes()).jaxpr)
    rope = SHAPE.num_layers * 2 * B * T * 6 * SHAPE.head_dim**2  # its half turn is a product too
    norms = (2 * SHAPE.num_layers + 1) * 2 * B * T * SHAPE.width  # and so are the sums, on CPU
    # Plain attention sees whole rows.
    assert traced == forward_flops(SHAPE, B * T, T, B * T) + rope + norms


def test_traced_products_of_scans_branches_and_recomputation():
    w = jnp.zeros((4, 4))

    def f(x):
        y, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, length=3)
        y = jax.lax.cond(y.sum() > 0, lambda a: a @ w, lambda a: a, y)
        return jax.checkpoint(lambda a: jnp.sin(a @ w) @ w)(y).sum()

    product = 2 * 4**3
    assert traced_flops(jax.make_jaxpr(f)(w).jaxpr) == (3 + 1 + 2) * product
    # Backwards: one product for each of the six, and one of the checkpointed two once more.
    assert traced_flops(jax.make_jaxpr(jax.grad(f))(w).jaxpr) == (6 + 6 + 1) * product


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides that make the tiny run quick to compile: one layer, short rows."""
    shape = json.loads((Path(TINY_BASE) / "config.json").read_text()) | {"num_hidden_layers": 1}
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(shape))
    return ["model.path=a/hub-id", f"model.shape={path}", *SMALL]


@pytest.fixture(scope="module")
def results(small):
    """What the tool finds with this machine's CPU devices in place of a TPU slice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_check, "target_devices", lambda topology: jax.devices()[:8])
        run = load(CONFIGS / "tiny.py", small)
        return compile_check.report(run, "v5e:2x4", compile_check.PROGRAMS)


def test_every_program_is_measured(results):
    found = {p["program"]: p for p in results["programs"]}
    assert list(found) == list(compile_check.PROGRAMS)
    for program in found.values():
        assert program["fits"] and program["spare_bytes"] > 0
        assert program["flops_traced"] >= program["flops"] > 0
        assert program["bytes"] > 0 and program["temp_bytes"] > 0
    assert found["update"]["collectives"]["all-gather"]["bytes"] > 0
    # The sampler's weights are whole on every device, so nothing is exchanged.
    assert found["prefill"]["collectives"] == {}
    assert found["decode"]["resident_bytes"] > 0 == found["update"]["resident_bytes"]


def test_argument_bytes_are_those_of_the_shards(results, small):
    run = fit_mesh(load(CONFIGS / "tiny.py", small), 8)
    mesh, model = make_mesh(run.mesh), model_of(run)
    for program in programs(run, mesh, model, ["update", "prefill"]):
        arrays = [x for x in jax.tree.leaves(program.arguments) if hasattr(x, "sharding")]
        found = next(p for p in results["programs"] if p["program"] == program.name)
        # A key is two words; the scalar argument and padding make the rest.
        assert found["argument_bytes"] == pytest.approx(local_bytes(arrays), rel=1e-2)


def test_texts(results):
    text = compile_check.describe(results)
    for name in compile_check.PROGRAMS:
        assert f"\n{name}: fits, " in text
    assert "all-gather" in text and "bound by" in text and "https://" in text
    rows = compile_check.table([results, results]).splitlines()
    assert len(rows) == 2 + 2 * 4 and len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (40.50G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 15.75G hbm.",
    ],
)
def test_refusal_of_the_compiler_says_how_much_is_missing(message):
    found = {"resident_bytes": 2**30, "device_bytes": 15.75 * 2**30}
    refused = compile_check._too_large(message, found)
    assert refused["fits"] is False and refused["spare_bytes"] == -25.75 * 2**30
    program = {"program": "update", "compile_s": 1.0, "flops": 1e12} | found | refused
    result = {"topology": "v5e:2x2", "mesh": {}, "micro_batch_rows": 1, "programs": [program]}
    assert "**no**" in compile_check.table([result])
    lines = list(compile_check._describe_program(program))
    assert "does NOT fit, 25.75 GiB over" in lines[0] and message in lines[1]


@pytest.mark.parametrize("limit", [0, 8, 40, 10_000])
def test_search_finds_the_largest_micro_batch(limit, monkeypatch):
    run, trials = fit_mesh(load(CONFIGS / "tiny.py"), 8), []

    def examine(program, device, mesh):
        rows = program.arguments[1].tokens.shape[1]
        trials.append(rows)
        return {"fits": rows <= limit}

    monkeypatch.setattr(compile_check, "examine", examine)
    sizes = packing(run)
    whole = sizes["micro_batches"] * sizes["micro_batch_rows"]
    assert largest_micro_batch(run, "v5e:2x4", jax.devices()[:8]) == min(limit, whole)
    assert len(trials) <= 8


def test_tpu_target(capsys, small):
    pytest.importorskip(
        "libtpu", reason="no TPU compiler here; pip install -e '.[tpu-compile]' to test with it"
    )
    settings = [f"--config.{setting}" for setting in small]
    assert main([TINY, "--topology=v5e:2x2", "--only=score,prefill", "--json", *settings]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["devices"] == 4 and result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    score, prefill = result["programs"]
    assert score["device_bytes"] == 15.75 * 2**30 and score["fits"] and prefill["fits"]
    assert score["collectives"]["all-gather"]["bytes"] > 0 and score["flops_xla"] > 0


def test_gpu_target(capsys, small):
    pytest.importorskip(
        "jax_cuda12_plugin",
        reason="no CUDA compiler here; pip install -e '.[cuda-compile]' to test with it",
    )
    settings = [f"--config.{setting}" for setting in small]
    assert main([TINY, "--topology=h100:2", "--only=prefill", "--json", *settings]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["devices"] == 2 and result["programs"][0]["temp_bytes"] > 0
