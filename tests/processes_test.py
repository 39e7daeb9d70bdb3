"""Two processes with two virtual CPU devices each, against one process with four."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from prolong_jax import evaluate, processes, train
from prolong_jax.mesh import make_mesh
from prolong_jax.metrics import read_rows
from tests import evaluate_test, train_test
from tests.process_worker import MESH
from tests.update_test import gradient

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
}


@contextmanager
def pair(module, logs, arguments):
    """Two processes of `python -m module`, each with `arguments(address, number)`; killed after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    try:
        for number in (0, 1):
            with open(logs / f"{number}.log", "wb") as log:
                command = [sys.executable, "-m", module, *arguments(address, number)]
                running.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=ROOT)
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def finish(running, logs, code=0, limit_s=400):
    deadline = time.monotonic() + limit_s
    codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in running]
    assert codes == [code, code], "\n".join(said(logs))


def said(logs):
    return [(logs / f"{number}.log").read_text() for number in (0, 1)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the two workers wrote."""
    out = tmp_path_factory.mktemp("work")
    with pair("tests.process_worker", out, lambda a, i: [a, "2", str(i), str(out)]) as running:
        finish(running, out)
    return out


def test_processes_share_work_and_agree(work):
    for number in (0, 1):
        assert json.loads((work / f"{number}.json").read_text()) == {
            "devices": 4,
            "local": 2,
            "shares": [[0, 1, 4, 9, 16], "13 is refused"],
            "stops": True,
        }
    assert ["only the first says this" in text for text in said(work)] == [True, False]


def test_two_processes_update_like_one(work):
    """The gradient of two processes is that of one; dividing by the local weight would show."""
    delta, _ = gradient(mesh=make_mesh(MESH))
    expected = np.asarray(ravel_pytree(delta)[0])
    for number in (0, 1):
        found = np.load(work / f"{number}.npz")
        distance = {
            name: np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            for name in ("right", "planted")
        }
        assert distance["right"] <= 1e-5 and distance["planted"] > 1e-2, distance


def test_one_process_shares_with_nobody():
    assert processes.share([3, 1], lambda items: [-i for i in items]) == [-3, -1]
    assert processes.exchange("x") == ["x"]


SETTINGS = {
    "total_steps": 2,
    "rollout__prompts_per_step": 4,
    "rollout__group_size": 4,
    "update__num_minibatches": 1,
    "update__micro_batch_rows": 4,
    "validation__samples": 4,  # of the shape of the training's samples: one compilation
    "validation__final_samples": 4,
    "validation__every": 100,
    "verifiers__num_workers": 1,
    "mesh__data": 2,
    "mesh__fsdp": 2,
    "stages": [{"mixture": {"math": 1.0, "logic": 1.0}}],
}


def run_of(workdir, **changes):
    """The arguments of each process of a run."""

    def arguments(address, number):
        place = {"coordinator": address, "num_processes": 2, "process_id": number}
        places = {f"mesh__{key}": value for key, value in place.items()}
        return train_test.arguments(workdir, **SETTINGS | places | changes)

    return arguments


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    assert train.main(train_test.arguments(workdir, **SETTINGS)) == 0
    return workdir


def assert_same_run(workdir, alone):
    ours, theirs = (read_rows(w / "metrics.jsonl") for w in (workdir, alone))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    exact = re.compile("reward|groups|response|tokens/generated|validation|stage")
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if exact.match(name):
                assert mine[name] == value, (mine["step"], name)
            elif name.startswith("update"):
                np.testing.assert_allclose(mine[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    samples = [read_rows(w / "samples.jsonl") for w in (workdir, alone)]
    assert samples[0] == samples[1]
    names = [{path.name for path in w.iterdir()} for w in (workdir, alone)]
    assert names[0] == names[1]  # the second process has left nothing


@pytest.mark.slow
def test_two_processes_run_like_one(tmp_path, alone):
    """The same samples, scores and kept groups; losses within rounding; one writer."""
    workdir = tmp_path / "run"
    with pair("prolong_jax.train", tmp_path, run_of(workdir)) as running:
        finish(running, tmp_path)
    assert_same_run(workdir, alone)
    first, second = said(tmp_path)
    assert "step 2/2" in first and "step" not in second


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(tmp_path, alone):
    """Saved by two processes after a SIGTERM to the second, continued by one."""
    workdir = tmp_path / "run"
    with pair("prolong_jax.train", tmp_path, run_of(workdir, mesh__watchdog_s=0.5)) as running:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and "scoring the base" not in said(tmp_path)[0]:
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)
        finish(running, tmp_path, code=train.EXIT_STOPPED)
    assert ["stopping after the next" in text for text in said(tmp_path)] == [False, True]
    assert all("Timeout (0:00:00.500000)!" in text for text in said(tmp_path))
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [0, 1]
    assert (workdir / "checkpoints" / "1").is_dir()
    assert train.main(train_test.arguments(workdir, **SETTINGS)) == 0
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes(tmp_path):
    """From 1 process x 4 devices to 2 x 2 and 1 x 2: the same prompts, samples and loss."""
    every = {"metrics__samples_per_step": 100}
    begun = tmp_path / "begun"
    first = train_test.arguments(begun, **SETTINGS | every | {"total_steps": 1})
    assert train.main(first) == 0
    begun.joinpath("summary.json").unlink()
    workdirs = {name: shutil.copytree(begun, tmp_path / name) for name in ("1x4", "1x2", "2x2")}
    assert train.main(train_test.arguments(workdirs["1x4"], **SETTINGS | every)) == 0
    half = SETTINGS | every | {"mesh__data": 1}
    assert train.main(train_test.arguments(workdirs["1x2"], **half)) == 0
    with pair("prolong_jax.train", tmp_path, run_of(workdirs["2x2"], **every)) as running:
        finish(running, tmp_path)
    rows = {name: read_rows(w / "metrics.jsonl")[-1] for name, w in workdirs.items()}
    samples = {name: read_rows(w / "samples.jsonl") for name, w in workdirs.items()}
    assert {row["step"] for row in rows.values()} == {2}
    for name in ("1x2", "2x2"):
        assert samples[name] == samples["1x4"] and len(samples[name]) >= 8
        for key in ("update/loss", "update/entropy", "update/kl_ref"):
            np.testing.assert_allclose(rows[name][key], rows["1x4"][key], rtol=0, atol=1e-4)
        print(name, {key: rows[name][key] - rows["1x4"][key] for key in ("update/loss",)})
    (change,) = read_rows(workdirs["1x2"] / "changes.jsonl")
    assert change == {"step": 1, "changes": {"mesh.data": [2, 1], "total_steps": [1, 2]}}


@pytest.mark.slow
def test_two_processes_evaluate_like_one(tmp_path):
    """Five prompts, so that the shares differ; stopped after two of them by one, continued by both."""
    (tmp_path / "aime24.json").write_text(json.dumps(evaluate_test.sums(5)))

    def arguments(name, mesh):
        more = [f"--config.mesh.{key}={value}" for key, value in mesh.items()]
        more += ["--config.update.micro_batch_rows=4", "--config.rollout.sample_rows=4"]
        return evaluate_test.arguments(tmp_path, tmp_path / name, *more, "--sets=aime24")

    def of_both(name):
        def of_one(address, number):
            place = {"coordinator": address, "num_processes": 2, "process_id": number}
            return arguments(name, {"data": 4} | place)

        return of_one

    assert evaluate.main(arguments("alone", {"data": 4})) == 0
    with pair("prolong_jax.evaluate", tmp_path, of_both("pair")) as running:
        finish(running, tmp_path)
    assert ["source/aime24" in text for text in said(tmp_path)] == [True, False]
    kept = {name: read_rows(tmp_path / name / "responses.jsonl") for name in ("alone", "pair")}
    assert len(kept["alone"]) == len(kept["pair"]) == 10
    for ours, theirs in zip(kept["pair"], kept["alone"], strict=True):
        assert ours.pop("nll") == pytest.approx(theirs.pop("nll"), abs=1e-4)
        assert ours == theirs
    cut = (tmp_path / "alone" / "responses.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (tmp_path / "alone" / "responses.jsonl").write_bytes(b"".join(cut))
    with pair("prolong_jax.evaluate", tmp_path, of_both("alone")) as running:
        finish(running, tmp_path)
    again = read_rows(tmp_path / "alone" / "responses.jsonl")
    assert [row["response"] for row in again] == [row["response"] for row in kept["alone"]]

    protocol = tmp_path / "pair" / "protocol.json"
    protocol.write_text(protocol.read_text().replace("0.6", "0.7"))
    with pair("prolong_jax.evaluate", tmp_path, of_both("pair")) as running:
        finish(running, tmp_path, code=2)  # both are refused, none waits for the other
    assert ["holds another evaluation" in text for text in said(tmp_path)] == [True, True]


def run_code(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def test_the_watchdog_dumps_stacks_and_the_run_goes_on():
    result = run_code(
        "import time\nfrom prolong_jax import processes\n"
        "def stuck_step(seconds): time.sleep(seconds)\n"
        "processes.watch(0.2); stuck_step(0.6)\n"
        "processes.watch(0.2); processes.watch(0); stuck_step(0.6)\nprint('went on')\n"
    )
    assert result.returncode == 0 and result.stdout == "went on\n"
    assert result.stderr.count("Timeout (0:00:00.200000)!") == 1
    assert "in stuck_step" in result.stderr


def test_memory_that_malloc_keeps_is_given_back():
    """Of 100 MB in small blocks, all but every hundredth block is freed."""
    result = run_code(
        "from prolong_jax import processes\n"
        "def used(): return processes.usage(processes.Timer())['memory/rss_mb']\n"
        "blocks = [bytes(50_000) for _ in range(2000)]\n"
        "few, full = blocks[::100], used()\n"
        "del blocks\n"
        "kept = used()\n"
        "processes.give_back_memory()\n"
        "print(full - kept < 50, full - used() > 70)\n"
    )
    assert result.stdout == "True True\n", result


FRAGMENTS = """
import ctypes
from prolong_jax import processes
def used(): return processes.usage(processes.Timer())['memory/rss_mb']
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def block(size):
    where = libc.malloc(size)
    ctypes.memset(where, 1, size)
    return where
{first}
libc.free(block(30_000_000))  # from now on, blocks of this size are kept for the next one
before, blocks = used(), []
for _ in range(50):
    blocks.append(block(2_000_000))
    block(100_000)
for where in blocks:
    libc.free(where)
print(used() - before > 50)
"""


def test_large_blocks_leave_no_holes():
    assert run_code(FRAGMENTS.format(first="")).stdout == "True\n", "no such malloc"
    first = "processes.keep_memory_compact()"
    assert run_code(FRAGMENTS.format(first=first)).stdout == "False\n"


START = """
from prolong_jax import processes
from prolong_jax.config import MeshSettings
processes.START_LIMIT_S = 2
try:
    processes.start(MeshSettings(coordinator={where!r}, num_processes=2, process_id=1))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("where", ["127.0.0.1:9", "auto"])
def test_processes_that_do_not_find_each_other_are_refused(where):
    result = run_code(START.format(where=where))
    assert f"did not find each other at '{where}'" in result.stdout, result
    assert result.stdout.count("\n") == 1


def test_phases_inside_of_others_count_alone():
    timer = processes.Timer()
    time.sleep(0.05)
    with timer("outer"):
        time.sleep(0.1)
        with timer("inner"):
            time.sleep(0.2)
    seconds, timeline = timer.take()
    assert seconds == pytest.approx({"outer": 0.1, "inner": 0.2}, abs=0.05)
    assert [name for name, *_ in timeline] == ["inner", "outer"]
    (_, start, end), (_, first, last) = timeline
    assert first == pytest.approx(0.05, abs=0.04) and first < start < end <= last
    assert timer.take() == ({}, []) and timer.begin > 0


def test_compiled_programs_are_kept_in_the_newest_workdir(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        for number, name in enumerate(("a", "b")):
            processes.keep_compilations(tmp_path / name)
            jax.config.update(names[1], 0.0)
            jax.jit(lambda x, number=number: x * (number + 17))(1.0)
            assert list((tmp_path / name).iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        processes.compilation_cache.reset_cache()
