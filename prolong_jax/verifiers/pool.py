"""Worker processes for verifiers.

A pool has worker processes, each driven by a thread of its own that hands it one item at a time.
An item's deadline counts from the start of its execution; a worker that is stuck is killed and
replaced (TIMEOUT), one that dies by itself is replaced too (ERROR). Workers are fresh interpreters
(`python -m prolong_jax.verifiers.pool`), never forks of the trainer, and answer in JSON, so nothing
of theirs is run or unpickled here. They start with the first item or `check`, and die with the
trainer, even if it is killed; they own no files that could be left behind.
"""

import ctypes
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import fsum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prolong_jax.config import VerifierSettings
from prolong_jax.verifiers import Status, Verdict, error, refuse_unknown, sandbox, verify, warm_up
from prolong_jax.verifiers.sandbox import kill_group

WARM_UP_LIMIT_S = 120.0
MAX_REPLY_BYTES = 1 << 20
MAX_PENDING = 10_000  # items that may wait; `submit` blocks beyond
REAP_S = 0.05  # for a worker that is dying by itself to be told from one that is killed
MAX_LOADS = 5  # workers that may die as they load, one after the other, before an item is given up
MAX_LOGGED = 1000  # faults that a pool writes to its log
# No worker can be started, it has died, or it answers nonsense.
UNUSABLE = (OSError, TypeError, ValueError)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


Request = tuple[str, str, Mapping[str, Any]]  # verifier, response, reference
_Done = queue.SimpleQueue[tuple[Any, Verdict]]  # item id, verdict


@dataclass(frozen=True)
class _Job:
    """One item to score; its verdict goes to `done`."""

    item_id: Hashable
    verifier: str
    message: bytes
    done: _Done


@dataclass(frozen=True)
class _WarmUp:
    """Every worker's thread takes one of these; the barrier keeps it from taking two."""

    names: tuple[str, ...]
    barrier: threading.Barrier
    problems: list[str] = field(default_factory=list)


class Pool:
    """Scores items in `num_workers` processes; use as a context manager.

    Args:
      num_workers: processes, >= 1.
      time_limit_s: seconds that one item may run, > 0; keep it above the code verifier's own 5 s.
      memory_limit_mb: address space of a worker in MiB.
      fault_log: file to which the first 1,000 items with an ERROR are appended, with the reason.
      sandbox_tier: that of the workers; None: the best that holds here, C never.
    """

    def __init__(
        self,
        num_workers: int,
        time_limit_s: float,
        memory_limit_mb: int = 4096,
        fault_log: Path | None = None,
        sandbox_tier: str | None = None,
    ):
        for name, value in (("num_workers", num_workers), ("time_limit_s", time_limit_s)):
            if value <= 0:
                raise ValueError(f"verifier pool: expected {name} above 0, got {value}.")
        self._time_limit_s, self._memory_limit_mb = time_limit_s, memory_limit_mb
        self.sandbox_tier = sandbox_tier or sandbox.choose_tier()
        self._jobs: queue.Queue[_Job | _WarmUp | None] = queue.Queue(MAX_PENDING)
        self._done: _Done = queue.SimpleQueue()
        self._outstanding = 0
        self._scorings: dict[str, list[tuple[Verdict, float]]] = {}  # since `take_metrics`
        self._deepest_queue = 0
        self._fault_log, self._num_logged = fault_log, 0
        self._lock = threading.Lock()  # of the scorings, the log, the workers and the closing
        self._closed = False
        self._workers: dict[int, _Worker] = {}
        self._threads = [
            threading.Thread(target=self._supervise, args=(i,), daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check(self, verifier_names: Iterable[str]) -> None:
        """Makes every worker load and try the verifiers, before the first rollout.

        Raises:
          ValueError: a verifier that is unknown or cannot start, with its reason.
        """
        names = tuple(verifier_names)
        for name in names:
            refuse_unknown(name)
        self._refuse_if_closed()
        task = _WarmUp(names, threading.Barrier(len(self._threads) + 1))
        for _ in self._threads:
            self._jobs.put(task)
        task.barrier.wait()
        if task.problems:
            raise ValueError(f"verifier cannot start: {task.problems[0]}")

    def submit(
        self, item_id: Hashable, verifier: str, response: str, reference: Mapping[str, Any]
    ) -> None:
        """Queues an item; its verdict comes from `poll` or `as_completed`. Blocks while full.

        Raises:
          ValueError: unknown verifier, a reference that is not JSON, or a closed pool.
        """
        self._put(self._done, item_id, (verifier, response, reference))
        self._outstanding += 1

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """The verdicts that are there, after waiting up to `timeout_s` for the first."""
        done = []
        while self._outstanding:
            try:
                done.append(self._done.get(timeout=0.0 if done else timeout_s))
            except queue.Empty:
                break
            self._outstanding -= 1
        return done

    def as_completed(self) -> Iterator[tuple[Hashable, Verdict]]:
        """(item id, verdict) in order of completion until none of the submitted items is left."""
        while self._outstanding:
            yield from self.poll(timeout_s=1.0)

    def score_all(self, requests: Iterable[Request]) -> list[Verdict]:
        """Verdicts of (verifier, response, reference) in input order; beside other submissions."""
        done: _Done = queue.SimpleQueue()
        count = 0
        for request in requests:
            self._put(done, count, request)
            count += 1
        verdicts = dict(done.get() for _ in range(count))
        return [verdicts[i] for i in range(count)]

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call, by verifier.

        `verify/NAME/` count, mean_score (errors left out), timeouts, errors; `time/verify_NAME_`
        p50_s and p99_s, seconds of execution, and `time/verdict_` mean_s, p95_s, max_s, those of
        all verifiers; and `verify/queue_depth`, the most items that waited.
        """
        with self._lock:
            scorings, self._scorings = self._scorings, {}
            depth, self._deepest_queue = self._deepest_queue, 0
        row: dict[str, float] = {"verify/queue_depth": depth} if scorings else {}
        if seconds := sorted(busy_s for done in scorings.values() for _, busy_s in done):
            row["time/verdict_mean_s"] = fsum(seconds) / len(seconds)
            row["time/verdict_p95_s"] = seconds[int(len(seconds) * 0.95)]
            row["time/verdict_max_s"] = seconds[-1]
        for name, done in sorted(scorings.items()):
            row |= _summary(name, done)
        return row

    def close(self) -> None:
        """Kills the workers and waits for their threads; what was not scored is dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._outstanding = True, 0
            workers = list(self._workers.values())
        for worker in workers:
            worker.kill()
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ValueError("verifier pool: expected an open pool, got a closed one.")

    def _put(self, done: _Done, item_id: Hashable, request: Request) -> None:
        verifier, response, reference = request
        self._refuse_if_closed()
        refuse_unknown(verifier)
        content = {"verifier": verifier, "response": response, "reference": dict(reference)}
        try:
            message = json.dumps(content).encode()
        except (TypeError, ValueError) as problem:
            where = f"reference of {item_id!r}"
            raise ValueError(f"{where}: expected JSON values ({problem}).") from None
        self._jobs.put(_Job(item_id, verifier, message, done))
        self._deepest_queue = max(self._deepest_queue, self._jobs.qsize())

    def _supervise(self, index: int) -> None:
        """The life of one thread: feeds its worker until the pool closes."""
        while (job := self._jobs.get()) is not None:
            if isinstance(job, _WarmUp):
                self._warm_up(index, job)
            else:
                self._score(index, job)
        self._discard(index)

    def _warm_up(self, index: int, task: _WarmUp) -> None:
        try:
            self._worker(index, task.names)
        except UNUSABLE as problem:
            task.problems.append(f"{problem}{self._discard(index)}")
        finally:
            task.barrier.wait()

    def _score(self, index: int, job: _Job) -> None:
        """Gets and delivers the verdict of one item, from a second worker if the first one dies."""
        start = time.monotonic()
        try:
            self._ready(index, job)
            start = time.monotonic()
            try:
                verdict = self._ask(index, job)
            except _DiedError:
                self._discard(index)
                verdict = self._ask(index, job)
        except TimeoutError:
            self._discard(index)
            verdict = Verdict(0.0, Status.TIMEOUT, f"killed after {self._time_limit_s:g} s")
        except Exception as problem:  # whatever it is, the item gets its verdict
            verdict = error(f"pool: {problem}{self._discard(index)}")
        self._note(job, verdict, time.monotonic() - start)
        job.done.put((job.item_id, verdict))

    def _ready(self, index: int, job: _Job) -> "_Worker":
        """A worker that has loaded the item's verifier; others in turn where they die meanwhile."""
        for _ in range(MAX_LOADS - 1):
            try:
                return self._worker(index, (job.verifier,))
            except _DiedError:
                self._discard(index)
        return self._worker(index, (job.verifier,))

    def _ask(self, index: int, job: _Job) -> Verdict:
        worker = self._ready(index, job)
        return worker.ask(job.message, self._time_limit_s)  # the deadline counts from here

    def _note(self, job: _Job, verdict: Verdict, busy_s: float) -> None:
        """Counts a verdict for the metrics; writes a fault with its item to the log."""
        with self._lock:
            self._scorings.setdefault(job.verifier, []).append((verdict, busy_s))
            is_fault = verdict.status == Status.ERROR and not self._closed
            if not is_fault or self._fault_log is None or self._num_logged >= MAX_LOGGED:
                return
            self._num_logged += 1
            line = json.dumps({"detail": verdict.detail, **json.loads(job.message)})
            with suppress(OSError), open(self._fault_log, "a", encoding="utf-8") as log:
                log.write(
                    line + "\n"
                )  # a full disk stops no run; the fault is counted all the same

    def _worker(self, index: int, verifiers: Iterable[str]) -> "_Worker":
        """The thread's worker with the verifiers loaded; starts one where there is none alive."""
        worker = self._workers.get(index)
        if worker is None or not worker.is_alive():
            self._discard(index)
            with self._lock:
                self._refuse_if_closed()
                worker = self._workers[index] = _Worker(self._memory_limit_mb, self.sandbox_tier)
        for name in verifiers:
            worker.warm_up(name)
        return worker

    def _discard(self, index: int) -> str:
        """Ends the thread's worker, if it has one; says in brackets how it ended."""
        with self._lock:
            worker = self._workers.pop(index, None)
        return "" if worker is None else f" [worker: {worker.end()}]"


def open_pool(settings: VerifierSettings, fault_log: Path | None = None) -> Pool:
    """The pool of a run; says which tier of the sandbox it uses.

    Raises:
      ValueError: programs of responses cannot be confined as the settings ask.
    """
    tier = sandbox.choose_tier(settings.allow_rlimits_only)
    print(f"programs of responses run in sandbox tier {tier}: {sandbox.TIERS[tier]}")
    return Pool(settings.num_workers, settings.time_limit_s, fault_log=fault_log, sandbox_tier=tier)


def _summary(name: str, scorings: Sequence[tuple[Verdict, float]]) -> dict[str, float]:
    scores = [verdict.score for verdict, _ in scorings if verdict.status != Status.ERROR]
    seconds = sorted(busy_s for _, busy_s in scorings)
    return {
        f"verify/{name}/count": len(scorings),
        f"verify/{name}/mean_score": fsum(scores) / max(1, len(scores)),  # in any order
        f"verify/{name}/timeouts": sum(v.status == Status.TIMEOUT for v, _ in scorings),
        f"verify/{name}/errors": len(scorings) - len(scores),
        f"time/verify_{name}_p50_s": seconds[len(seconds) // 2],
        f"time/verify_{name}_p99_s": seconds[int(len(seconds) * 0.99)],
    }


class _DiedError(OSError):
    """A worker ended in the middle of an item, or the pool was closed."""


class _Worker:
    """The trainer's end of one worker process."""

    def __init__(self, memory_limit_mb: int, sandbox_tier: str):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "prolong_jax.verifiers.pool"]
        command += [str(theirs.fileno()), str(memory_limit_mb), str(os.getpid()), sandbox_tier]
        self._warm: set[str] = set()  # verifiers that it has loaded
        self._log = tempfile.TemporaryFile()  # what a worker says that fails to start
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env=_worker_environment(),
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        self._connection = Connection(ours.detach())

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def warm_up(self, verifier: str) -> None:
        """Loads a verifier; raises one of UNUSABLE with the reason if it cannot."""
        if verifier in self._warm:
            return
        try:
            verdict = self.ask(json.dumps({"verifier": verifier}).encode(), WARM_UP_LIMIT_S)
        except TimeoutError:
            raise ValueError(f"{verifier} took more than {WARM_UP_LIMIT_S:g} s to load") from None
        if verdict.status == Status.ERROR:
            raise ValueError(verdict.detail)
        self._warm.add(verifier)

    def ask(self, message: bytes, limit_s: float) -> Verdict:
        """Sends a message and waits for the answer; TimeoutError when it takes too long."""
        try:
            self._connection.send_bytes(message)
            in_time = self._connection.poll(limit_s)
            reply = self._connection.recv_bytes(MAX_REPLY_BYTES) if in_time else b""
        except (OSError, EOFError):
            raise _DiedError("the worker died") from None
        if not in_time:
            raise TimeoutError
        score, status, detail = json.loads(reply)
        return Verdict(score, Status(status), detail)

    def kill(self) -> None:
        """Kills the process and its group; may be called from any thread, more than once."""
        if self._process.returncode is None:
            kill_group(self._process.pid)

    def end(self) -> str:
        """Kills, reaps and closes, once; says how the worker ended."""
        try:
            how = f"exit status {self._process.wait(timeout=REAP_S)}"
        except subprocess.TimeoutExpired:
            how = "killed"
        kill_group(self._process.pid)
        self._process.wait()
        self._connection.close()
        with self._log as log:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([how, *said])


def _worker_environment() -> dict[str, str]:
    """Nothing of the trainer's environment but the paths that a worker needs."""
    paths = [os.path.abspath(path) for path in sys.path]
    names = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return kept | one_thread | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}


# --- inside a worker ---------------------------------------------------------------------------


def main() -> None:
    """The worker: answers messages until the other end closes."""
    fd, memory_limit_mb, parent = map(int, sys.argv[1:4])
    sandbox.use_tier(sys.argv[4])
    _tie_to_parent()
    if os.getppid() != parent:
        return  # it died before it could take us along
    os.set_inheritable(fd, False)
    memory = memory_limit_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # parsers complain there about every odd answer
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        verdict = _answer(message)
        reply = [verdict.score, verdict.status, verdict.detail[:2000]]
        connection.send_bytes(json.dumps(reply).encode())
        _kill_strays()


def _answer(message: Mapping[str, Any]) -> Verdict:
    """The verdict on a response; without one, score 1 once the verifier is loaded."""
    name = message["verifier"]
    try:
        if "response" not in message:
            warm_up(name)
            return Verdict(1.0)
        verdict = verify(name, message["response"], message["reference"])
        if not 0.0 <= verdict.score <= 1.0:
            raise ValueError(f"expected a score in [0, 1], got {verdict.score}")
        return Verdict(float(verdict.score), Status(verdict.status), str(verdict.detail))
    except Exception as problem:  # a missing library, a fault of the verifier: the reason matters
        return error(f"{name}: {type(problem).__name__}: {problem}")


def _tie_to_parent() -> None:
    """Linux: the worker dies with the trainer, and orphans of its programs fall to the worker.

    Elsewhere the end of the connection alone stops a worker.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_strays() -> None:
    """Ends orphans that a program has left behind: they fall to the worker, beside its zygotes."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    for _ in range(1000):
        pids = children.read_text().split() if children.exists() else []
        strays = set(map(int, pids)) - sandbox.zygote_pids()
        if not strays:
            return
        for pid in strays:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
