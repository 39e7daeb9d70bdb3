"""Confined child processes, in which programs of responses and scorers that evaluate text run.

A zygote (`sandbox_zygote.py`) forks one child per run. Every run has rlimits (CPU, 1 GiB of data,
file size, processes, open files), an empty environment, an empty working folder, no new privileges,
another uid if this process is root, 2 GiB for all its processes together, and ends with all of them.
Beyond that, by tier:

- A: inside bubblewrap: no file but libraries, no network, no /proc; per run fresh process, mount and
  IPC namespaces, a /tmp of 64 MiB, no capability, and a filter of system calls (seccomp).
- B: landlock (reads libraries, writes nothing) and seccomp (no sockets, no signals to others).
- C: nothing more. This is NOT a sandbox: it is refused unless asked for.

`choose_tier` takes the best tier in which the escapes that it tries fail. NOT covered: faults of the
kernel, reachable through what seccomp lets pass; what timing and the load of the machine tell; CPU
time of other processes. In B also: the names and sizes of files and the list of processes can be
seen. In C also: the network, all files that the uid may read or write, and, where the uid cannot be
dropped, all processes of the user. Linux only; A and B on x86_64 and aarch64.
"""

import atexit
import json
import marshal
import os
import re
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TIERS = {
    "A": "bubblewrap, fresh namespaces, seccomp, rlimits",
    "B": "landlock, seccomp, rlimits",
    "C": "rlimits only",
}
MAX_OUTPUT_BYTES = 32 << 20
MAX_RUN_BYTES = 2 << 30  # resident, of all processes of a run
WATCH_S = 0.05  # between looks at that
START_LIMIT_S, STOP_LIMIT_S = 120.0, 20.0

# What programs in contests import; a zygote has them loaded.
PROGRAM_MODULES = (
    "abc array ast base64 bisect calendar cmath collections contextlib copy csv ctypes dataclasses "
    "datetime decimal enum fractions functools hashlib heapq io itertools json math numbers "
    "operator os queue random re statistics string struct subprocess sys textwrap threading time "
    "traceback types typing unicodedata uuid"
).split()


@dataclass
class ProgramRun:
    """What came back from a program."""

    values: dict[int, Any] = field(default_factory=dict)  # JSON values by test that gave one
    problem: str = ""  # why no test could run
    timed_out: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with a value unless one of the other fields says otherwise."""

    value: Any = None  # JSON
    raised: tuple[str, str] | None = None  # type and message; ("", ...) if the process died
    timed_out: bool = False
    failed: str = ""  # why it could not run: our fault


def run_program(
    code: str, inputs: list[Any], fn_name: str | None, time_limit_s: float
) -> ProgramRun:
    """Runs Python code on inputs in a confined process; after a crash goes on with the next input.

    Args:
      code: Python source with the standard library only.
      inputs: argument lists of `fn_name`, or texts for standard input where that is None.
      time_limit_s: wall seconds for all of it.

    Raises:
      OSError: no confined process can be had.
      ValueError: no tier was chosen and none but C works here.
    """
    run, first = ProgramRun(), 0
    _zygote("")
    deadline = time.monotonic() + time_limit_s
    while first < len(inputs):
        messages, in_time = _request("", ("program", code, fn_name, inputs, first), deadline)
        seen = [index for index in range(len(inputs)) if str(index) in messages]
        for index in seen:
            with suppress(ValueError, RecursionError):  # "" where the test raised
                run.values[index] = json.loads(messages[str(index)])
        if not in_time or "E" in messages:
            run.timed_out = not in_time
            return run
        if "S" not in messages:
            kind = "syntax error" if "C" in messages else "failed before the first test"
            run.problem = f"{kind} {messages.get('C', messages.get('L', ''))}".strip()
            return run
        first = max(seen, default=first - 1) + 2  # the one after the last reported has crashed
    return run


def call(function: str, arguments: list[Any], time_limit_s: float) -> Outcome:
    """Calls a function of ours, which may evaluate text of a response, in a confined process.

    The module is loaded once per zygote, with the modules that its `PRELOAD` names, if it has one;
    loading does not count to the limit. The value comes with a token over a pipe that programs
    started by the text do not inherit; text that takes over the interpreter can still forge it.

    Args:
      function: "package.module:name"; trusted.
      arguments: JSON values; not trusted.
      time_limit_s: wall seconds.
    """
    module = function.partition(":")[0]
    try:
        task = ("call", function, json.dumps(arguments))
        _zygote(module)
        messages, in_time = _request(module, task, time.monotonic() + time_limit_s)
        if "V" in messages:
            return Outcome(json.loads(messages["V"]))
        if "X" in messages:
            kind, text = json.loads(messages["X"])
            return Outcome(raised=(kind, text))
    except (OSError, ValueError, RecursionError) as problem:
        return Outcome(failed=f"{type(problem).__name__}: {problem}")
    if not in_time:
        return Outcome(timed_out=True)
    return Outcome(raised=("", "the process ended without an answer"))


# --- the choice of the tier ---------------------------------------------------------------------

# An attempt succeeds where it does not raise.
_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
def demand(success):
    if not success: raise OSError
ATTEMPTS = {
    "reads files of the user": lambda at: open(at["file"]).read(),
    "writes files": lambda at: open(at["folder"] + "/written", "w"),
    "connects sockets": lambda at: socket.create_connection(("127.0.0.1", at["port"]), 5),
    "reaches the caller with signals": lambda at: os.kill(at["pid"], 0),
    "sets core_pattern": lambda at: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "traces": lambda at: demand(libc.ptrace(0, 0, 0, 0) == 0),
    "makes namespaces": lambda at: demand(libc.unshare(0x10000000) == 0),
    "takes more than its memory": lambda at: bytearray(at["memory"]),
    "kills its parent": lambda at: demand(os.kill(os.getppid(), 9)),  # seen from outside
}
def escapes(at):
    return [name for name in ATTEMPTS if succeeds(ATTEMPTS[name], at)]
def succeeds(attempt, at):
    try: attempt(at)
    except (OSError, MemoryError): return False
    return True
"""


def use_tier(tier: str) -> None:
    """Sets the tier of this process without trying it: what the caller's `choose_tier` returned."""
    if tier not in TIERS:
        raise ValueError(f"sandbox tier: expected one of {', '.join(TIERS)}, got {tier!r}.")
    if _chosen[:1] != [tier]:
        close()
        _chosen[:] = [tier]


def choose_tier(allow_rlimits_only: bool = False) -> str:
    """The best tier whose self-test passes here, now in use in this process; tried once.

    Raises:
      ValueError: only C is left and not allowed; says what failed in A and B.
    """
    tier, problems = _best_tier()
    if tier == "C" and not allow_rlimits_only:
        raise ValueError(
            "sandbox: expected bubblewrap and user namespaces, or landlock and seccomp, got "
            f"{'; '.join(problems)}: install bubblewrap, or allow rlimits only for trusted programs."
        )
    use_tier(tier)
    return tier


@cache
def _best_tier() -> tuple[str, list[str]]:
    problems = []
    for tier in ("A", "B"):
        use_tier(tier)
        problem = self_test()
        if not problem:
            return tier, problems
        problems.append(f"tier {tier} {problem}")
    return "C", problems


def self_test() -> str:
    """Tries escapes in the tier in use; says in words which succeeded, "" if none did."""
    try:
        before = _zygote("").pid
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("", 0)) as server:
            os.chmod(folder, 0o777)
            file = Path(folder, "file")
            file.write_text("for everybody")
            at = {"file": str(file), "folder": folder, "pid": os.getpid()}
            at |= {"port": server.getsockname()[1], "memory": MAX_RUN_BYTES}
            escapes = run_program(_PROBE, [[at]], "escapes", START_LIMIT_S).values.get(0)
        run_program("print()", [""], None, START_LIMIT_S)
        killed = _zygote("").pid != before
    except OSError as problem:
        return f"does not run ({problem})"
    if killed or not isinstance(escapes, list):
        return "does not withstand the self-test: a program ends its zygote"
    return f"does not hold: a program {', '.join(escapes)}" if escapes else ""


# --- the zygotes --------------------------------------------------------------------------------

_chosen: list[str] = []  # the tier in use, once there is one
_zygotes: dict[tuple[int, str], "_Zygote"] = {}  # by this process's pid and the module loaded
_lock = threading.RLock()


def zygote_pids() -> set[int]:
    """The children of this process that serve for many runs."""
    return {zygote.pid for (pid, _), zygote in _zygotes.items() if pid == os.getpid()}


@atexit.register
def close() -> None:
    """Ends the zygotes of this process; the next run starts new ones."""
    with _lock:
        for key in [key for key in _zygotes if key[0] == os.getpid()]:
            _zygotes.pop(key).close()


def kill_group(pid: int) -> None:
    """Kills a process group, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _zygote(module: str) -> "_Zygote":
    """The zygote with the module loaded ("": with those that programs import)."""
    if not _chosen:
        choose_tier()
    with _lock:
        key = (os.getpid(), module)
        if key in _zygotes and not _zygotes[key].is_alive():
            _zygotes.pop(key).close()
        if key not in _zygotes:
            _zygotes[key] = _Zygote(_chosen[0], module)
        return _zygotes[key]


def _request(module: str, task: tuple[Any, ...], deadline: float) -> tuple[dict[str, str], bool]:
    """The messages of one run, and whether it ended by itself in time."""
    token = secrets.token_hex(16)
    cpu_s = int(max(0.0, deadline - time.monotonic())) + 1
    for _ in range(2):  # a zygote may have been killed
        data, in_time = _zygote(module).run(marshal.dumps((token, cpu_s, *task)), token, deadline)
        messages = _messages(data, token)
        if "B" in messages or not in_time:
            return messages, in_time
    raise OSError(f"the sandbox cannot start a run: {data[:500].decode(errors='replace')!r}")


def _messages(data: bytearray, token: str) -> dict[str, str]:
    """The texts of whole lines that carry the token, by kind; of two of a kind the first."""
    found = re.findall(rb"%s (\S+) (.*)\n" % token.encode(), data)
    return {kind.decode("utf-8", "replace"): text.decode("utf-8", "replace") for kind, text in reversed(found)}


class _Zygote:
    """This end of a zygote; OSError with what it said if it does not start."""

    def __init__(self, tier: str, module: str):
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_LIMIT_S)
        self._lock = threading.Lock()
        with theirs, tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                _command(tier, module),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # it ends by itself, after what it runs, when we do
                env={"PATH": os.environ.get("PATH", os.defpath), **_ENVIRONMENT},
            )
            self.pid = self._process.pid
            theirs.close()
            if not self._confirmed():
                self.close()
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise OSError(": ".join([f"the zygote of tier {tier} did not start", *said]))
        self._base_bytes = max(map(_resident_bytes, _tree(self.pid)))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, task: bytes, token: str, deadline: float) -> tuple[bytearray, bool]:
        """What one run wrote up to its last message, and whether that was in time."""
        read_fd, write_fd = os.pipe()
        with self._lock, open(read_fd, "rb", buffering=0):
            with open(write_fd, "wb", buffering=0), open(os.memfd_create("task"), "w+b") as file:
                file.write(task)
                file.seek(0)
                try:
                    socket.send_fds(self._control, [b"r"], [file.fileno(), write_fd])
                except OSError:
                    self.close()
                    return bytearray(), True
            try:
                return self._read(read_fd, f"{token} E ".encode(), deadline)
            finally:
                self._control.settimeout(STOP_LIMIT_S)
                if not self._confirmed(b"."):
                    self.close()

    def close(self) -> None:
        """Ends the zygote: by itself, after what it runs, or else by force."""
        self._control.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _confirmed(self, message: bytes = b"") -> bool:
        """Whether a byte comes back after the message."""
        with suppress(OSError):
            self._control.sendall(message)
            return bool(self._control.recv(1))
        return False

    def _read(self, fd: int, end: bytes, deadline: float) -> tuple[bytearray, bool]:
        """What comes up to the end mark, the end of the pipe or a cap; False past the deadline."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        data, chunk, look = bytearray(), b"?", time.monotonic() + WATCH_S
        while chunk and len(data) <= MAX_OUTPUT_BYTES and end not in data[-len(chunk) - len(end) :]:
            now = time.monotonic()
            if now >= deadline:
                return data, False
            if now >= look:
                look = now + WATCH_S
                if self._run_bytes() > MAX_RUN_BYTES:
                    return data, True
            if poller.poll(1000 * (min(deadline, look) - now)):
                chunk = os.read(fd, 1 << 16)
                data += chunk
        return data, True

    def _run_bytes(self) -> int:
        """Memory of the run's processes beyond what they share with the zygote."""
        return sum(max(0, _resident_bytes(pid) - self._base_bytes) for pid in _tree(self.pid))


_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_OPTIONS = "-s -P -S -B -X utf8".split()  # no folders of the user or of site-packages, no traces


def _command(tier: str, module: str) -> list[str]:
    """The start of a zygote: the bare interpreter; for a module also site-packages and us."""
    package = Path(__file__).parents[1]
    sites = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    settings = {
        "tier": tier,
        "uid": os.getuid(),
        "options": _OPTIONS,
        "modules": [module] if module else PROGRAM_MODULES,
        "sys_path": [str(package.parent), *sites] if module else [],
        "paths": [sys.base_prefix, *([str(package), *sites] if module else [])],
    }
    file = str(package / "verifiers" / "sandbox_zygote.py")
    return [os.path.realpath(sys.executable), *_OPTIONS, file, json.dumps(settings)]


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def _resident_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0
