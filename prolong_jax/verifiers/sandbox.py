"""Confined child processes for programs of responses, and for scorers that evaluate their text.

A zygote (`sandbox_zygote.py`) forks a child per run. In every tier a run has rlimits (CPU, 2 GiB of
data, file size, processes, files), 2 GiB for all its processes, no environment, an empty working
folder, no new privileges, and another uid if this process is root; all of it ends with the run.

- A: in bubblewrap: no files but libraries, no network, no /proc; per run fresh process, mount and IPC
  namespaces, 64 MiB of /tmp, no capabilities, and a filter of system calls (seccomp).
- B: landlock (reads libraries, writes nothing) and seccomp (no sockets, signals only to itself, no
  changes to files and processes).
- C: no more than the above. This is NOT a sandbox, and refused unless asked for.

NOT covered: faults of the kernel behind the calls that seccomp lets pass; CPU time taken from
others; memory of the kernel (buffers of sockets and pipes, page tables), which no limit counts. In
B: names and sizes of files, and the processes of others, can be seen. In B and C, where the zygote
is killed from outside: what a program has forked, while the program itself ends. In C: the network,
all files that the uid may use, and as no root all processes of the user. Linux only; A and B on
x86_64 and aarch64. No limit holds what a program claims: only the caller may know what is right.
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
    "C": "rlimits only: no sandbox",
}
MAX_OUTPUT_BYTES = 32 << 20
MAX_RUN_BYTES = 2 << 30  # resident, of all processes of a run
WATCH_S = 0.05  # between looks at that
START_LIMIT_S, STOP_LIMIT_S = 120.0, 20.0  # of a zygote or a run; not part of a run's time

# What programs in contests import; their zygote has it loaded.
PROGRAM_MODULES = """
array ast base64 bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq itertools math numbers operator queue random re statistics string
struct subprocess textwrap threading time traceback typing unicodedata
""".split()


@dataclass
class ProgramRun:
    """What came back from a program."""

    values: dict[int, Any] = field(default_factory=dict)  # JSON values by test that gave one
    problem: str = ""  # why no test could run
    timed_out: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with a value, unless another field is set."""

    value: Any = None  # JSON
    raised: tuple[str, str] | None = None  # type and message; type "" where the process died
    timed_out: bool = False
    failed: str = ""  # why it could not run: our fault


def run_program(
    code: str, inputs: list[Any], fn_name: str | None, time_limit_s: float
) -> ProgramRun:
    """Runs Python code on inputs in a confined process; after a crash goes on with the next input.

    Args:
      code: Python source with the standard library only.
      inputs: argument lists of `fn_name`, or texts for standard input where that is None.
      time_limit_s: wall seconds for all of it, from the start of its execution; reading what it
        returned counts.

    Raises:
      OSError: no confined process can be had, or it was killed from outside.
      ValueError: no tier was chosen and only C is left.
    """
    run, first, left_s = ProgramRun(), 0, time_limit_s
    while first < len(inputs):
        reply = _request("", ("program", code, fn_name, inputs, first), left_s)
        messages, left_s = reply.messages, reply.left_s
        seen = [index for index in range(first, len(inputs)) if str(index) in messages]
        for index in seen:
            start = time.monotonic()
            with suppress(ValueError, RecursionError):  # "" where the test raised
                run.values[index] = json.loads(messages[str(index)])
            left_s -= time.monotonic() - start
            if left_s <= 0:
                break
        if left_s <= 0 or "E" in messages:
            run.timed_out = left_s <= 0
            return run
        if "S" not in messages:
            kind = "syntax error" if "C" in messages else "failed before the first test"
            run.problem = f"{kind} {messages.get('C', messages.get('L', ''))[:100]}".strip()
            return run
        if reply.is_full and seen:
            first = max(seen) + 1
        else:
            first = max(seen, default=first - 1) + 2  # the one after the last reported has crashed
    return run


def call(function: str, arguments: list[Any], time_limit_s: float) -> Outcome:
    """Calls a function of ours in a confined process, for the sake of what it may evaluate.

    Its module, and the modules that a `PRELOAD` there names, are loaded once, outside the limit.
    The value comes with a token over a pipe that other programs do not inherit; still, text that
    takes over the interpreter can forge it.

    Args:
      function: "package.module:name" in this package or a site-packages folder; trusted.
      arguments: JSON values; not trusted.
      time_limit_s: wall seconds.

    Raises:
      ValueError: no tier was chosen and only C is left.
    """
    module = function.partition(":")[0]
    try:
        reply = _request(module, ("call", function, json.dumps(arguments)), time_limit_s)
    except OSError as problem:
        return Outcome(failed=str(problem))
    messages = reply.messages
    with suppress(ValueError, RecursionError):
        if "V" in messages:
            return Outcome(json.loads(messages["V"]))
        if "X" in messages:
            kind, text = json.loads(messages["X"])
            return Outcome(raised=(kind, text))
    if reply.left_s <= 0:
        return Outcome(timed_out=True)
    return Outcome(raised=("", "the process ended without a value"))


# --- the choice of the tier ---------------------------------------------------------------------

# The names of the attempts that succeed, which are those that do not raise.
_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def demand(success):
    if not success: raise OSError
ATTEMPTS = {
    "reads files of the user": lambda at: open(at["file"]).read(),
    "writes files": lambda at: open(at["folder"] + "/written", "w"),
    "changes files": lambda at: os.chmod(at["file"], 0o666),
    "widens its rules": lambda at: demand(any(
        libc.syscall(445, fd, 1, bytes(16), 0) == 0 or ctypes.get_errno() == 42 for fd in range(64)
    )),
    "shares memory": lambda at: __import__("mmap").mmap(-1, 4096),
    "connects sockets": lambda at: socket.create_connection(("127.0.0.1", at["port"]), 5),
    "signals the caller": lambda at: os.kill(at["pid"], 0),
    "sets core_pattern": lambda at: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "traces": lambda at: demand(libc.ptrace(0, 0, 0, 0) == 0),
    "makes namespaces": lambda at: demand(libc.unshare(0x10000000) == 0),
    "exceeds its memory": lambda at: bytearray(at["memory"]),
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
    """Sets the tier of this process without a test, as when another one's `choose_tier` chose it.

    Raises:
      ValueError: unknown tier.
    """
    if tier not in TIERS:
        raise ValueError(f"sandbox tier: expected one of {', '.join(TIERS)}, got {tier!r}.")
    if _chosen != [tier]:
        close()
        _chosen[:] = [tier]


def choose_tier(allow_rlimits_only: bool = False) -> str:
    """The best tier in which the escapes that it tries fail; this process uses it from now on.

    Raises:
      ValueError: only C is left and not allowed; says why.
    """
    tier, problems = _best_tier()
    if tier == "C" and not allow_rlimits_only:
        raise ValueError(
            "sandbox: expected bubblewrap with user namespaces, or landlock and seccomp, got "
            f"{'; '.join(problems)}: install bubblewrap, or "
            "set verifiers.allow_rlimits_only, where programs may do what this user may."
        )
    use_tier(tier)
    return tier


@cache
def _best_tier() -> tuple[str, list[str]]:
    """The tier, and what is wrong with better ones; leaves no tier in use and no zygote."""
    problems = []
    for tier in ("A", "B"):
        use_tier(tier)
        problem = self_test()
        close()
        _chosen.clear()
        if not problem:
            return tier, problems
        problems.append(f"tier {tier} {problem}")
    return "C", problems


def self_test() -> str:
    """Tries escapes in the tier in use; what is wrong with it in words, "" if nothing is."""
    try:
        before = _zygote("").pid
        shared = tempfile.TemporaryDirectory(dir="/tmp")  # TMPDIR may be closed to a program
        with shared as folder, socket.create_server(("", 0)) as server:
            os.chmod(folder, 0o777)
            Path(folder, "file").write_text("for everybody")
            pid = os.getpid() if os.getpid() > 2 else 1 << 22  # a run has its own 1 and 2 in tier A
            at = {"file": f"{folder}/file", "folder": folder, "pid": pid}
            at |= {"port": server.getsockname()[1], "memory": MAX_RUN_BYTES}
            escapes = run_program(_PROBE, [[at]], "escapes", START_LIMIT_S).values.get(0)
        run_program("print()", [""], None, START_LIMIT_S)
        killed = _zygote("").pid != before
    except OSError as problem:
        return f"does not run ({problem})"
    if killed or not isinstance(escapes, list):
        return "does not hold: a program ends its zygote"
    return f"does not hold: a program {', '.join(escapes)}" if escapes else ""


# --- the zygotes --------------------------------------------------------------------------------

_chosen: list[str] = []  # the tier in use, once there is one
_zygotes: dict[str, "_Zygote"] = {}  # by the module that they have loaded
_lock = threading.RLock()  # one run at a time


def zygote_pids() -> set[int]:
    """The child processes of this one that serve many runs."""
    return {zygote.pid for zygote in _zygotes.values()}


@atexit.register
def close() -> None:
    """Ends the zygotes; the next run starts new ones."""
    with _lock:
        while _zygotes:
            _zygotes.popitem()[1].close()


def kill_group(pid: int) -> None:
    """Kills a process group, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _zygote(module: str) -> "_Zygote":
    """The zygote with the module loaded ("": with those that programs import)."""
    if not _chosen:
        choose_tier()
    with _lock:
        if module in _zygotes and not _zygotes[module].is_alive():
            _zygotes.pop(module).close()
        if module not in _zygotes:
            _zygotes[module] = _Zygote(_chosen[0], module)
        return _zygotes[module]


@dataclass(frozen=True)
class _Reply:
    """What one run wrote."""

    messages: dict[str, str]  # by kind, the first of a kind
    left_s: float  # of its time; 0 where it did not end in time
    is_full: bool  # ended because it wrote too much


def _request(module: str, task: tuple[Any, ...], limit_s: float) -> _Reply:
    """One run; a second one where the first did not begin, or lost its zygote."""
    token, data = secrets.token_hex(16), b""
    whole = marshal.dumps((token, int(limit_s) + 1, *task))
    for _ in range(2):
        with _lock:
            data, left_s, ended_well = _zygote(module).run(whole, f"{token} E ".encode(), limit_s)
        whole_lines = data[: data.rfind(b"\n") + 1]  # or the search takes quadratic time
        lines = re.findall(rb"%s (\S{1,20}) (.*)\n" % token.encode(), whole_lines)
        found = {
            kind.decode("latin-1"): text.decode("utf-8", "replace")
            for kind, text in reversed(lines)
        }
        if "B" in found and (ended_well or _chosen == ["C"]):  # in C a run can kill its zygote
            return _Reply(found, left_s, len(data) > MAX_OUTPUT_BYTES)
    told = data[:500].decode(errors="replace")
    raise OSError(f"the sandbox cannot start a run, or lost it: {told!r}")


class _Zygote:
    """This end of a zygote; OSError with what it said if it does not start."""

    def __init__(self, tier: str, module: str):
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_LIMIT_S)
        with tempfile.TemporaryFile() as log:
            with theirs:
                self._process = subprocess.Popen(
                    _command(tier, module),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env={"PATH": os.environ.get("PATH", os.defpath), **_ENVIRONMENT},
                    start_new_session=True,  # it ends by itself, with what it runs, when we do
                )
            if not self._confirmed():
                self.close()
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise OSError(": ".join([f"the zygote of tier {tier} did not start", *said]))
        self._control.settimeout(STOP_LIMIT_S)
        self.pid = self._process.pid
        self._base_bytes = max(map(_resident_bytes, _tree(self.pid)))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, task: bytes, end: bytes, limit_s: float) -> tuple[bytes, float, bool]:
        """What one run wrote up to the end mark, the end of the pipe or a cap.

        Also the seconds left to it, 0 if it was not done in time, and whether all of it was ended.
        """
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb", buffering=0):
            with open(write_fd, "wb", buffering=0), open(os.memfd_create("task"), "w+b") as file:
                file.write(task)
                file.seek(0)
                try:
                    socket.send_fds(self._control, [b"r"], [file.fileno(), write_fd])
                except OSError:
                    self.close()
                    return b"", limit_s, False
            ended_well = False
            try:
                data, left_s = self._read(read_fd, end, limit_s)
                ended_well = self._confirmed(b".")
            finally:
                if not ended_well:
                    self.close()
            return data, left_s, ended_well

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

    def _read(self, fd: int, end: bytes, limit_s: float) -> tuple[bytes, float]:
        """The run's time begins with the first byte from it."""
        poller, deadline = select.poll(), time.monotonic() + START_LIMIT_S
        for each in (fd, self._control.fileno()):
            poller.register(each, select.POLLIN)
        data, chunk, look = bytearray(), b"?", time.monotonic() + WATCH_S
        while chunk and len(data) <= MAX_OUTPUT_BYTES and end not in data[-len(chunk) - len(end) :]:
            now = time.monotonic()
            if now >= look:
                look = now + WATCH_S
                extra = [_resident_bytes(pid) - self._base_bytes for pid in _tree(self.pid)]
                if sum(max(0, size) for size in extra) > MAX_RUN_BYTES:
                    break
            if now >= deadline:
                return bytes(data), 0.0
            ready = dict(poller.poll(1000 * (min(deadline, look) - now)))
            if ready and fd not in ready:
                break  # the zygote has died
            if ready:
                chunk = os.read(fd, 1 << 16)
                deadline = deadline if data else time.monotonic() + limit_s
                data += chunk
        return bytes(data), max(1e-3, deadline - time.monotonic())


_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_OPTIONS = "-s -P -S -B -X utf8".split()  # without the folders of the user and of site-packages


def _command(tier: str, module: str) -> list[str]:
    """How a zygote starts: the bare interpreter; for a module with site-packages and with us.

    In tier A these get places of their own, since each run covers /tmp, where they may lie.
    """
    package, paths, folders = Path(__file__).parents[1], {sys.base_prefix: sys.base_prefix}, []
    if module:
        sites = [path for path in sys.path if path.endswith(("/site-packages", "/dist-packages"))]
        folders = [str(package.parent), *sites]
        places = [f"/site/{i}" for i in range(len(folders))]
        paths |= dict(
            zip([str(package), *sites], [f"/site/0/{package.name}", *places[1:]], strict=True)
        )
        folders = places if tier == "A" else folders
    settings = {"tier": tier, "uid": os.getuid(), "options": _OPTIONS, "paths": paths}
    settings |= {"modules": [module] if module else PROGRAM_MODULES, "sys_path": folders}
    file = str(package / "verifiers" / "sandbox_zygote.py")
    return [os.path.realpath(sys.executable), *_OPTIONS, file, json.dumps(settings)]


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        with suppress(OSError):  # it has ended
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children")
                found += map(int, children.read_text().split())
    return found


def _resident_bytes(pid: int) -> int:
    """Of any living thread: where the first one has ended, the process itself seems empty."""
    tasks: list[str] = []
    with suppress(OSError):  # it has ended
        tasks = os.listdir(f"/proc/{pid}/task")
    for task in tasks:
        with suppress(OSError):
            statm = Path(f"/proc/{pid}/task/{task}/statm").read_text()
            if pages := int(statm.split()[1]):
                return pages * resource.getpagesize()
    return 0
