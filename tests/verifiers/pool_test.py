"""The worker pool: deadlines, replacement, isolation, statistics, clean ends."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from prolong_jax.verifiers import VERIFIERS, Status, Verdict, final_answer_text, pool, warm_up
from prolong_jax.verifiers.pool import Pool

LOOP = (
    "code",
    "```python\nwhile True: pass\n```",
    {"inputs": [""], "outputs": [""], "time_limit_s": 600.0},
)
WAIT = (
    "```python\nimport os, time\ndef f(path):\n"
    "    while os.path.exists(path): time.sleep(0.01)\n    return 1\n```"
)


def sum_item(i: int, told: int | None = None):
    return "math", f"</think>\\boxed{{{i if told is None else told}}}", {"answer": str(i)}


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()[1:]]
    return [child for child, parent in pairs if parent == pid]


def workers() -> list[int]:
    """The workers among this process's children."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    return [
        int(pid)
        for pid, parent, args in rows
        if int(parent) == os.getpid() and "-m prolong_jax.verifiers.pool" in args
    ]


def is_busy(pid: int) -> bool:
    """Whether a program runs below the worker's zygote."""
    return any(children_of(zygote) for zygote in children_of(pid))


def is_running(pid: int) -> bool:
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until(condition, limit_s: float = 60.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def held():
    """A file, and an item that is in the middle for as long as the file is there (in tier C)."""
    handle, name = tempfile.mkstemp(dir="/tmp")  # TMPDIR may be closed to other users
    os.close(handle)
    tests = {"fn_name": "f", "inputs": [[name]], "outputs": [1], "time_limit_s": 600.0}
    yield Path(name), ("code", WAIT, tests)
    Path(name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shared_pool():
    with Pool(2, time_limit_s=60.0) as shared:
        shared.check(VERIFIERS)
        yield shared


@pytest.mark.parametrize(
    "text, final",
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a</think>b</think>c", "c"),
        ("<think>a", ""),
        ("<think>a</think>b<think>c", ""),
        ("", ""),
    ],
)
def test_the_final_answer_text(text, final):
    assert final_answer_text(text) == final


def test_importing_the_verifiers_is_light():
    code = (
        "import sys, prolong_jax.verifiers.pool as p\n"
        "from prolong_jax.verifiers import math, stem, logic, instruct, code\n"
        "heavy = {'jax', 'sympy', 'numpy', 'pint', 'reasoning_gym', 'math_verify', 'langdetect'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_all_verifiers_start_and_score(shared_pool):
    verdicts = shared_pool.score_all([sum_item(3), sum_item(3, 4), ("stem", r"\boxed{1 m}", {})])
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0]
    assert verdicts[2].status == Status.ERROR


OWN = """
from prolong_jax.verifiers import Verdict, final_answer_text

EXAMPLE = ("</think>a b c", {"words": 3})


def verify(response, reference):
    return Verdict(len(final_answer_text(response).split()) == reference["words"])
"""


def test_a_verifier_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_words.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text(OWN.replace('"words": 3', '"words": 4'))
    with Pool(1, time_limit_s=60.0) as shared:
        shared.check(["own_words"])
        items = [("own_words", text, {"words": 2}) for text in ("</think>a b", "a b c")]
        right, wrong, fault = shared.score_all([*items, ("own_words", "a", {})])
        assert [right, wrong] == [Verdict(1.0), Verdict(0.0)]
        assert fault.status == Status.ERROR and "KeyError: 'words'" in fault.detail
        with pytest.raises(ValueError, match="expected score 1 for its example, got False"):
            shared.check(["own_broken"])
        for name in ("own_nowhere", "own_nowhere.words", ""):
            with pytest.raises(ValueError, match="or a module on the Python path, got"):
                shared.check([name])


DEADLY = """
import os
import signal

from prolong_jax.verifiers import Verdict

with open({file!r}, "a+") as file:
    file.write("x")
    file.flush()
    file.seek(0)
    if len(file.read()) <= {deaths}:
        os.kill(os.getpid(), signal.SIGKILL)
EXAMPLE = ("a", {{}})


def verify(response, reference):
    return Verdict(1.0)
"""


def test_workers_that_die_as_they_load_are_no_fault_of_an_item(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, deaths in (("own_dies_often", 4), ("own_dies_always", 100)):
        source = DEADLY.format(file=str(tmp_path / f"{name}.loads"), deaths=deaths)
        (tmp_path / f"{name}.py").write_text(source)
    with Pool(1, time_limit_s=60.0) as own:
        lives, dies = own.score_all([("own_dies_often", "a", {}), ("own_dies_always", "a", {})])
    assert lives == Verdict(1.0)
    assert dies.status == Status.ERROR and "died" in dies.detail
    assert (tmp_path / "own_dies_always.loads").read_text() == "x" * 5


def test_workers_do_not_load_jax(shared_pool):
    for pid in workers():
        assert "jaxlib" not in (Path("/proc") / str(pid) / "maps").read_text()


def test_order_of_input_and_of_completion(held):
    file, item = held
    items = [item, *(sum_item(i, i + i % 2) for i in range(50))]
    expected = [1.0] + [float(i % 2 == 0) for i in range(50)]
    with Pool(2, time_limit_s=60.0, sandbox_tier="C") as ordered:
        for i, item in enumerate(items):
            ordered.submit(i, *item)
        done = ordered.as_completed()
        assert {next(done)[0] for _ in range(50)} == set(range(1, 51))
        file.unlink()
        assert [(i, verdict.score) for i, verdict in done] == [(0, 1.0)]
        assert [verdict.score for verdict in ordered.score_all(items)] == expected
        assert ordered.poll() == []


def test_odd_responses_and_references(shared_pool):
    odd = ["\x00", "\ud800", "é" * 300_000, "\\boxed{" * 100_000, "<answer>" * 100_000, "```python"]
    entry = {"task": "chain_sum", "entry": {"question": "", "answer": "2", "metadata": {}}}
    rules = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    tests = {"inputs": ["1"], "outputs": ["2"]}
    answer = {"answer": r"\frac{1}{2}"}
    references = [("math", answer), ("stem", answer), ("logic", entry), ("code", tests)]
    verdicts = shared_pool.score_all(
        [(name, text, reference) for text in odd for name, reference in references]
    )
    assert all(v == Verdict(0.0, Status.OK, v.detail) for v in verdicts)
    assert all(v.score for v in shared_pool.score_all([("instruct", t, rules) for t in odd]))
    with pytest.raises(ValueError, match="JSON"):
        shared_pool.submit(0, "math", "", {"answer": object()})
    with pytest.raises(ValueError, match="expected one of math"):
        shared_pool.submit(0, "maths", "", {})


def test_unknown_verifiers_are_refused_at_the_start(shared_pool):
    with pytest.raises(ValueError, match="expected one of math, .*got 'poetry'"):
        shared_pool.check(["math", "poetry"])
    with pytest.raises(ValueError, match="got 'poetry'"):
        warm_up("poetry")
    with pytest.raises(ValueError, match="num_workers above 0"):
        Pool(0, 1.0)


def test_a_verifier_that_cannot_start_is_named(tmp_path, monkeypatch):
    """A broken installation of a library comes first on the path of the workers."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    log = tmp_path / "faults.jsonl"
    with Pool(2, time_limit_s=5.0, fault_log=log) as broken:
        with pytest.raises(ValueError, match="cannot start: math: ImportError: half installed"):
            broken.check(["math"])
        item = ("math", r"\boxed{x+1}", {"answer": "1+x"})
        (verdict,) = broken.score_all([item])
        assert verdict.status == Status.ERROR and "half installed" in verdict.detail
        assert broken.take_metrics()["verify/math/errors"] == 1
    (fault,) = map(json.loads, log.read_text().splitlines())
    assert fault == dict(
        zip(("verifier", "response", "reference"), item, strict=True), detail=verdict.detail
    )


def test_a_full_disk_loses_no_item():
    with Pool(1, time_limit_s=20.0, fault_log=Path("/dev/full")) as full:
        item = ("stem", r"\boxed{1 m}", {})
        verdicts = full.score_all([item, item, sum_item(1)])
        assert [v.status for v in verdicts] == [Status.ERROR, Status.ERROR, Status.OK]
        assert full.take_metrics()["verify/stem/errors"] == 2


def test_deadlines_count_from_the_start_and_stuck_workers_are_replaced():
    """Four stuck items on two workers wait in front of good ones, which all score."""
    others = set(workers())
    with Pool(2, time_limit_s=1.0) as busy:
        busy.check(["math", "code"])
        before = set(workers()) - others
        start = time.monotonic()
        verdicts = busy.score_all([LOOP] * 4 + [sum_item(i) for i in range(40)])
        wall_s = time.monotonic() - start
        assert [v.status for v in verdicts[:4]] == [Status.TIMEOUT] * 4
        assert [v.score for v in verdicts] == [0.0] * 4 + [1.0] * 40
        assert wall_s > 1.9
        assert not before & set(workers())
        row = busy.take_metrics()
        assert row["verify/code/timeouts"] == 4 and row["verify/code/mean_score"] == 0.0
        assert row["verify/math/count"] == 40 and row["verify/math/mean_score"] == 1.0
        assert row["verify/code/errors"] == row["verify/math/errors"] == 0
        assert row["time/verify_code_p50_s"] > 0.9 > row["time/verify_math_p50_s"]
        assert row["time/verdict_max_s"] == row["time/verify_code_p99_s"]
        assert row["time/verdict_p95_s"] > 0.9  # 4 of 44
        assert 4 / 44 * 0.9 < row["time/verdict_mean_s"] < row["time/verdict_p95_s"]
        assert 30 <= row["verify/queue_depth"] <= 44
        assert busy.take_metrics() == {}


def test_a_worker_killed_in_the_middle_loses_no_item(held):
    """The item that it had goes to a second worker; one that kills that too is our ERROR."""
    file, item = held
    others = set(workers())
    with Pool(2, time_limit_s=600.0, sandbox_tier="C") as victim:
        victim.check(["code", "math"])
        first, second = set(workers()) - others
        victim.submit("a", *item)
        victim.submit("b", *item)
        assert wait_until(lambda: is_busy(first) and is_busy(second))
        os.kill(first, signal.SIGKILL)
        for i in range(20):
            victim.submit(i, *sum_item(i))
        assert wait_until(lambda: len(set(workers()) - others) == 2)
        (again,) = set(workers()) - others - {second}
        assert wait_until(lambda: is_busy(again))
        os.kill(again, signal.SIGKILL)
        done = victim.as_completed()
        verdicts = dict(next(done) for _ in range(21))  # the other one is still in the middle
        (lost,) = {"a", "b"} & set(verdicts)
        assert verdicts[lost].status == Status.ERROR and "died" in verdicts[lost].detail
        assert all(verdicts[i].score == 1.0 for i in range(20))
        survivor = ({"a", "b"} - {lost}).pop()
        os.kill(second, signal.SIGKILL)
        file.unlink()
        assert list(done) == [(survivor, Verdict(1.0, detail="1 of 1 tests"))]
        assert victim.take_metrics()["verify/code/errors"] == 1
        idle = (set(workers()) - others).pop()
        os.kill(idle, signal.SIGKILL)
        assert wait_until(lambda: not is_running(idle))
        assert all(v.score == 1.0 for v in victim.score_all([sum_item(i) for i in range(10)]))


def test_strays_of_a_program_are_ended():
    """A daemon that leaves its process group is ended (tier B lets none leave)."""
    marker = "4321.8765"
    body = "import subprocess, sys\nsleep = 'import sys, time; time.sleep(float(sys.argv[1]))'\n"
    body += f"subprocess.Popen([sys.executable, '-c', sleep, '{marker}'], start_new_session=True)\n"
    body += "def f(x): return x"
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [1]}

    def gone():
        command = ["ps", "-ww", "-eo", "stat,args"]
        return marker not in subprocess.run(command, capture_output=True, text=True).stdout

    with Pool(1, time_limit_s=60.0, sandbox_tier="C") as one:
        (verdict,) = one.score_all([("code", f"```python\n{body}\n```", tests)])
        assert verdict.score == 1.0
        assert wait_until(gone)


def test_closing_ends_busy_workers_and_threads(tmp_path, monkeypatch):
    others = set(workers())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the workers
    closing = Pool(2, time_limit_s=60.0)
    closing.check(["code"])
    mine = set(workers()) - others
    for i in range(10):
        closing.submit(i, *LOOP)
    assert wait_until(lambda: any(map(is_busy, mine)))
    start = time.monotonic()
    closing.close()
    closing.close()
    assert time.monotonic() - start < 60.0  # a tenth of what is left of an item
    assert not mine & set(children_of(os.getpid()))
    assert list(tmp_path.iterdir()) == []
    assert list(closing.as_completed()) == []
    with pytest.raises(ValueError, match="closed"):
        closing.submit(0, *LOOP)


def test_workers_and_programs_die_with_a_killed_trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "from prolong_jax.verifiers.pool import Pool\n"
        "print('imported', flush=True)\n"  # once: workers must not import this file again
        "p = Pool(2, 600.0)\n"
        f"for i in range(2): p.submit(i, *{LOOP!r})\n"
        "p.poll(600.0)\n"
    )
    root = str(Path(pool.__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )

    def family():
        return [c for child in children_of(trainer.pid) for c in (child, *children_of(child))]

    assert wait_until(lambda: len(family()) == 4), family()
    pids = family()
    trainer.kill()
    told, _ = trainer.communicate()
    assert told == b"imported\n"
    assert wait_until(lambda: not any(map(is_running, pids)))
    assert list(tmp_path.iterdir()) == [script]


def test_metrics_do_not_depend_on_the_order_of_completion():
    scorings = [(Verdict(i / 7), i / 10) for i in range(8)]
    rows = [pool._summary("code", random.Random(i).sample(scorings, 8)) for i in range(50)]
    assert all(row == rows[0] for row in rows)


def test_overhead_per_item_is_small(shared_pool):
    """800 simple integers per second on an idle machine; once a quarter of it under load."""
    items = [sum_item(i, i + i % 3) for i in range(300)]
    seconds = []
    while len(seconds) < 20 and min(seconds, default=60.0) > len(items) / 200:
        start = time.monotonic()
        verdicts = shared_pool.score_all(items)
        seconds.append(time.monotonic() - start)
        assert [v.score for v in verdicts] == [float(i % 3 == 0) for i in range(300)]
    assert min(seconds) < len(items) / 200, seconds


def test_submit_blocks_while_the_queue_is_full(held, monkeypatch):
    file, item = held
    monkeypatch.setattr(pool, "MAX_PENDING", 1)
    with Pool(1, time_limit_s=600.0, sandbox_tier="C") as narrow:
        narrow.submit(0, *item)
        narrow.submit(1, *sum_item(1))  # once the first has left the queue
        third = threading.Thread(target=narrow.submit, args=(2, *sum_item(2)))
        third.start()
        third.join(timeout=0.3)
        assert third.is_alive() and narrow.poll() == []
        file.unlink()
        third.join()
        assert [verdict.score for _, verdict in narrow.as_completed()] == [1.0] * 3
