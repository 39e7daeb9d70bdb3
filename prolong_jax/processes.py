"""The processes of a run: start, what they agree on, signals, the watchdog, times and files.

Every process runs the same program in the same order. What happens on one alone (a signal, the
samples of its share of the prompts, an error among them) is exchanged before it decides anything.
"""

import ctypes
import faulthandler
import functools
import json
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from prolong_jax.config import MeshSettings

T = TypeVar("T")
U = TypeVar("U")

START_LIMIT_S = 300  # for all processes to be there
END_LIMIT_S = 60  # for all processes to be done, once one is
ANNOUNCED_S = 1.0  # compilations of this length are said
LARGE_BLOCK = 1 << 20  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def start(settings: MeshSettings) -> None:
    """Joins the other processes, where the settings name any; before any device is touched.

    From then on, what is printed by other processes than the first goes nowhere.

    Raises:
      ValueError: the processes do not find each other.
    """
    where = settings.coordinator
    if not where or jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if where != "auto":
        # Without detection: under Slurm, it would leave a process only one of its devices.
        given = {"coordinator_address": where, "cluster_detection_method": "deactivate"}
        given |= {"num_processes": settings.num_processes, "process_id": settings.process_id}
        # JAX kills a process that waits in vain, so what it waits for is said before.
        here, count = settings.process_id, settings.num_processes
        print(f"process {here} of {count} joins the others at {where}", file=sys.stderr, flush=True)
    try:
        if settings.process_id > 0 and where != "auto":
            _await_listener(where)
        jax.distributed.initialize(
            **given,
            initialization_timeout=START_LIMIT_S,
            shutdown_timeout_seconds=END_LIMIT_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"mesh.coordinator: the processes of this run did not find each other at {where!r} "
            f"({' '.join(str(error).split())}); start all of them, with the same address and "
            "number, or set 'auto' on a TPU pod, GKE or Slurm."
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def _await_listener(address: str) -> None:
    """Raises OSError where nobody listens at host:port within the limit."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this process prints and writes files."""
    return jax.process_index() == 0


def exchange(value: T) -> list[T]:
    """The value of each process, on all of them, in their order."""
    count = jax.process_count()
    if count == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).reshape(count)
    room = 1 << int(sizes.max() - 1).bit_length()  # few sizes, few compilations
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    rows = rows.reshape(count, room)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This process's share of what all processes have."""
    return items[jax.process_index() :: jax.process_count()]


def share(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
    """Deals the items to the processes; each works on its own, and all get the results in order.

    Raises:
      ValueError, RuntimeError: what the work raises in any process, in all of them.
    """
    count, done, failure = jax.process_count(), [], None
    try:
        done = list(work(dealt(items)))
    except (ValueError, RuntimeError) as error:
        failure = error
    parts = exchange((done, None if failure is None else (type(failure), str(failure))))
    if failure is not None:
        raise failure
    for _, fault in parts:
        if fault is not None:
            kind, message = fault
            raise (ValueError if issubclass(kind, ValueError) else RuntimeError)(message)
    return [parts[i % count][0][i // count] for i in range(len(items))]


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the run saves after the current step. Twice: at once."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def agreed(self) -> bool:
        """Whether any process got one; every process has to ask."""
        return any(exchange(self.requested))

    def _note(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(
            2, b"stopping after the next finished step, then saving; once more to stop at once\n"
        )

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def watch(limit_s: float) -> None:
    """Starts a step's clock: when it passes `limit_s`, the stacks of all threads go to stderr.

    The run goes on, and the next call starts the clock anew; 0 stops it.
    """
    if limit_s > 0:
        faulthandler.dump_traceback_later(limit_s, file=sys.__stderr__ or 2)
    else:
        faulthandler.cancel_dump_traceback_later()


class Timer:
    """Adds up seconds per phase: `with timer("sample"): ...`. A phase within another counts alone."""

    def __init__(self):
        self.begin, self.cpu_begin = time.monotonic(), time.process_time()
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, float, float]] = []
        self._inner = [0.0]  # seconds of the phases inside of each open one

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        self._inner.append(0.0)
        yield
        end = time.monotonic()
        own = end - start - self._inner.pop()
        self._inner[-1] += end - start
        self._seconds[phase] = self._seconds.get(phase, 0.0) + own
        self.span(phase, start, end)

    def span(self, name: str, start: float, end: float) -> None:
        """Puts a stretch of `time.monotonic` on the timeline alone."""
        self._spans.append((name, start - self.begin, end - self.begin))

    def take(self) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
        """Seconds by phase and the timeline (name, from, to) so far, and a fresh start."""
        found = self._seconds, self._spans
        self.__init__()
        return found


@functools.cache
def _compilations() -> dict[str, float]:
    """Number and seconds of all compilations from the first call on, said one by one."""
    found = {"time/compilations": 0, "time/compile_s": 0.0}

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found["time/compilations"] += 1
            found["time/compile_s"] += duration_secs
            if duration_secs >= ANNOUNCED_S:
                print(f"compiled {kwargs.get('fun_name', 'a program')} in {duration_secs:.1f} s")

    jax.monitoring.register_event_duration_secs_listener(note)
    return found


def take_compilations() -> dict[str, float]:
    """Programs compiled (or read from the compilation cache) since the last call, and the time."""
    found = _compilations()
    taken = dict(found)
    found.update(dict.fromkeys(found, 0))
    return taken


def usage(timer: Timer) -> dict[str, float]:
    """CPU seconds of this process since the timer began, and its resident memory in MB (10^6)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "time/cpu_s": time.process_time() - timer.cpu_begin,
        "memory/rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
    }


def keep_memory_compact() -> None:
    """Lets glibc's malloc return large blocks as they are freed, unless the environment tunes it.

    By default it keeps them for later ones, with small blocks that stay in between: a run of
    thousands of steps grows by the pieces.
    """
    is_tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and not is_tuned:
        set_option(M_MMAP_THRESHOLD, LARGE_BLOCK)
        set_option(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)  # or it would stay at 128 KiB


def give_back_memory() -> None:
    """Hands free pages back that malloc keeps, so that a long run's memory is what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def keep_compilations(directory: Path) -> None:
    """Keeps compiled programs in a directory, unless JAX_COMPILATION_CACHE_DIR names one."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compilation_cache.reset_cache()  # it may be that of another workdir
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is whole at any moment; the first process does."""
    if is_first():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
