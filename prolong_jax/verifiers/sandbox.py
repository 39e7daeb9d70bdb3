"""The child processes in which responses' programs run.

A child is a fresh interpreter with rlimits (CPU, memory, file size, processes, open files), an
empty environment, a process group and session of its own, no new privileges, a working folder
without a name (it is empty and takes no files), and another uid if this process is root and the
interpreter is readable for all. It dies with the process that started it.

This is NOT a sandbox. Not covered: the network; all files that its user may read or write (/tmp and
/dev/shm too, and what it leaves there stays); where the uid cannot be dropped (no root, or an
interpreter in a private folder), all processes of the same user, which it may signal and trace.
What leaves the process group outlives `run_program`; a worker of the pool ends it after the item.
"""

import json
import marshal
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

LIMITS = [  # beside the one on CPU seconds
    (resource.RLIMIT_AS, 1 << 30),
    (resource.RLIMIT_FSIZE, 16 << 20),
    (resource.RLIMIT_NPROC, 256),  # of all processes of the uid
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
]
MAX_OUTPUT_BYTES = 32 << 20
FIRST_UID = 200_000

# Runs in the child. Only modules that are built in or cheap: the start is most of the run time.
# A message is a line "token index value"; "C" and "L" tell of failures to compile and to load, "S"
# that the tests start, "E" the end.
_CHILD = r"""
import atexit, builtins, posix, resource, sys
from _io import open as open_file
from _json import encode_basestring_ascii as quote

def send(token, fd, index, text=""):
    data = f"{token} {index} {text}\n".encode()
    while data:
        data = data[posix.write(fd, data):]

def encode(value):
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int): return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value).replace("nan", "NaN").replace("inf", "Infinity")
    if isinstance(value, str): return quote(value)
    for kind in (list, tuple):
        if isinstance(value, kind): return "[" + ",".join(map(encode, kind.__iter__(value))) + "]"
    if isinstance(value, dict):
        parts = [quote(key if isinstance(key, str) else int.__repr__(key)) + ":" + encode(inner)
                 for key, inner in dict.items(value)]
        return "{" + ",".join(parts) + "}"
    raise TypeError

def confine(limits, uid, folder, parent):
    posix.fchdir(folder)
    posix.close(folder)
    for limit, size in limits: resource.setrlimit(limit, (size, size))
    if uid:
        try:
            posix.setgroups([]); posix.setgid(uid); posix.setuid(uid)
        except OSError:
            pass
    try:
        import _ctypes
        prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
        _ctypes.call_function(prctl, (1, 9, 0, 0, 0))   # die with the parent
        _ctypes.call_function(prctl, (38, 1, 0, 0, 0))  # no new privileges
    except Exception:
        pass
    if posix.getppid() != parent: posix._exit(1)  # it died before

def call(namespace, name, arguments):
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)(*arguments)
    return namespace[name](*arguments)

def run_script(program, text):
    for target, content in ((0, text.encode()), (1, b"")):
        with open_file(posix.memfd_create("io"), "wb", 0) as file:
            file.write(content)
            file.seek(0)
            posix.dup2(file.fileno(), target)
    sys.stdin = open_file(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = open_file(1, "w", encoding="utf-8", closefd=False)
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit as end:
        if end.code not in (None, 0): raise
    threading = sys.modules.get("threading")
    for thread in threading.enumerate() if threading else ():
        if thread is not threading.current_thread() and not thread.daemon: thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    with open_file(posix.dup(1), "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")

def main(code, fn_name, inputs, first, token, fd, bounds):
    builtins.exit = builtins.quit = sys.exit  # as the site module would, which costs time
    posix.dup2(posix.open("/dev/null", posix.O_RDWR), 0)
    confine(*bounds)
    stage, namespace = "C", {"__name__": "response"}
    try:
        program = compile(code, "<response>", "exec")
        stage = "L"
        if fn_name is not None: exec(program, namespace)
    except BaseException as problem:
        return send(token, fd, stage, type(problem).__name__)
    send(token, fd, "S")
    for index in range(first, len(inputs)):
        try:
            if fn_name is None: text = encode(run_script(program, inputs[index]))
            else: text = encode(call(namespace, fn_name, inputs[index]))
            if len(text) > 1 << 22: text = ""  # such an answer is no answer
        except BaseException:
            text = ""
        send(token, fd, index, text)
    send(token, fd, "E")

try:
    main(*task)
finally:
    posix._exit(0)
"""
_PROGRAM = marshal.dumps(compile(_CHILD, "<child>", "exec"))
# The child gets its compiled program, then the task, on standard input.
_BOOT = """import marshal
with open(0, "rb", closefd=False) as file: program, task = marshal.load(file), marshal.load(file)
exec(program, {"__name__": "child", "task": task})
"""


@dataclass
class ProgramRun:
    """What came back from a program."""

    values: dict[int, Any] = field(default_factory=dict)  # JSON values by test that gave one
    problem: str = ""  # why no test could run
    timed_out: bool = False


def run_program(
    code: str, inputs: list[Any], fn_name: str | None, time_limit_s: float
) -> ProgramRun:
    """Runs Python code on inputs in a child process; after a crash goes on with the next input.

    Args:
      code: Python source with the standard library only.
      inputs: argument lists of `fn_name`, or texts for standard input where that is None.
      time_limit_s: wall seconds for all of it.

    Raises:
      OSError: no process or no file for its input can be had.
    """
    run, first = ProgramRun(), 0
    deadline = time.monotonic() + time_limit_s
    while first < len(inputs):
        token = secrets.token_hex(16)
        data, in_time = _run_child((code, fn_name, inputs, first, token), deadline)
        messages = _messages(data, token, len(inputs))
        seen = [int(kind) for kind in messages if kind.isdecimal()]
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


def kill_group(pid: int) -> None:
    """Kills a process group, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run_child(
    task: tuple[str, str | None, list[Any], int, str], deadline: float
) -> tuple[bytearray, bool]:
    """What one child wrote, and whether it ended by itself in time."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0), tempfile.TemporaryFile() as stdin:
        with open(write_fd, "wb", buffering=0):
            cpu_s = int(max(0.0, deadline - time.monotonic())) + 1
            limits = [(resource.RLIMIT_CPU, cpu_s), *LIMITS]
            bounds = (limits, _uid(), _empty_folder(), os.getpid())
            stdin.write(_PROGRAM + marshal.dumps((*task, write_fd, bounds)))
            stdin.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT],
                pass_fds=[write_fd, _empty_folder()],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
        try:
            return _read(read_fd, f"{task[4]} E ".encode(), deadline)
        finally:
            kill_group(process.pid)
            process.wait()


def _read(fd: int, end: bytes, deadline: float) -> tuple[bytearray, bool]:
    """What comes up to the end mark, the end of the pipe or the cap; False past the deadline."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data, chunk = bytearray(), b"?"
    while chunk and len(data) <= MAX_OUTPUT_BYTES and end not in data[-len(chunk) - len(end) :]:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            return data, False
        chunk = os.read(fd, 1 << 16)
        data += chunk
    return data, True


def _messages(data: bytearray, token: str, num_tests: int) -> dict[str, str]:
    """The messages that carry the token; of two with the same index the first."""
    found: dict[str, str] = {}
    kinds = {"C", "L", "S", "E"} | {str(i) for i in range(num_tests)}
    for line in data.decode(errors="replace").split("\n"):
        parts = line.split(" ", 2)
        if len(parts) == 3 and parts[0] == token and parts[1] in kinds:
            found.setdefault(parts[1], parts[2])
    return found


@cache
def _empty_folder() -> int:
    """The working folder of programs: removed while open, so nobody has to clean up after them."""
    path = tempfile.mkdtemp()
    fd = os.open(path, os.O_RDONLY)
    os.chmod(fd, 0o755)  # programs under another uid may look
    os.rmdir(path)
    return fd


@cache
def _uid() -> int:
    """Another uid for programs where the worker is root and others can read the library; else 0."""
    library = Path(os.__file__).resolve().parent
    readable = all(path.stat().st_mode & 0o5 == 0o5 for path in (library, *library.parents))
    return FIRST_UID + os.getpid() if os.geteuid() == 0 and readable else 0
