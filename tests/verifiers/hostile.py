"""Hostile programs, each with the score that it deserves, and what becomes of them.

    python -m tests.verifiers.hostile [--tiers ABC]

prints a row per program and tier: the score, whether it escaped, what it left behind, and whether
the next run was clean. In tier C, which is no sandbox, many escape: so the attempts are real.
"""

import argparse
import ctypes
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prolong_jax.verifiers import sandbox
from prolong_jax.verifiers.code import same_value

MARK = "prolong-hostile"  # in the names of all files that the programs make
SECRET = "a secret of the user"
INPUTS, OUTPUTS = [[1], [2], [3], [4]], [2, 4, 6, 8]
TIME_LIMIT_S, HANG_LIMIT_S = 20.0, 1.0
SEGMENT = 0x70726F6C  # key of the shared memory that one makes
SHARED_FOLDERS = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm")]

# `attack` is true, or returns at all, where it got what it must not get; the doubling of numbers
# that follows it is right, so that a contained attack still scores.
HARNESS = """
try: escaped = attack() is not False
except BaseException: escaped = False
def f(x): return "escaped" if escaped else 2 * x
"""
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def system_call(number, *arguments): return libc.syscall(number, *arguments) != -1
"""
ATTACKS = {
    "read a file": "def attack(): return open('{file}').read()",
    "read /etc/passwd": "def attack(): return open('/etc/passwd').read()",
    "list the user's folder": "import os\ndef attack(): return os.listdir('{folder}')",
    "read the parent's environment": (
        "import os\ndef attack(): return open(f'/proc/{os.getppid()}/environ').read()"
    ),
    "read the caller's memory": "def attack(): return open('/proc/{pid}/mem', 'rb')",
    "read a device": "import os\ndef attack(): return os.open('/dev/kmsg', os.O_RDONLY)",
    "write a file": "def attack(): return open('{folder}/{mark}', 'w')",
    "write the working folder": "def attack(): return open('{mark}', 'w')",
    "change the interpreter": "import os\ndef attack(): return open(os.__file__, 'a')",
    "make a device": "import os\ndef attack(): return os.mknod('/tmp/{mark}', 0o20666, 0x103)",
    "connect": (
        "import socket\n"
        "def attack(): return socket.create_connection(('127.0.0.1', {port}), 1).close()"
    ),
    "connect to a socket file": (
        "import socket\n"
        "def attack(): return socket.socket(socket.AF_UNIX).connect('{folder}/socket')"
    ),
    "connect to an abstract socket": (
        "import socket\n"
        "def attack(): return socket.socket(socket.AF_UNIX).connect('\\0{mark}{pid}')"
    ),
    "listen": "import socket\ndef attack(): return socket.create_server(('127.0.0.1', 0)).close()",
    "talk to the kernel's network": (
        "import socket\ndef attack(): return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"
    ),
    "signal the caller": "import os\ndef attack(): return os.kill({pid}, 0)",
    "stop the parent": (
        "import os\ndef attack():\n    os.kill(os.getppid(), 19)\n    return False  # seen outside"
    ),
    "kill the parent": (
        "import os, time\ndef attack():\n    os.kill(os.getppid(), 9)\n    time.sleep(0.1)\n"
        "    return False"
    ),
    "limit the parent": (
        "import os, resource as r\n"
        "def attack(): return r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (1, 1)) and os.getppid() != 1"
    ),
    "trace the parent": (LIBC + "def attack(): return system_call(101, 16, os.getppid(), 0, 0)"),
    "be traced": LIBC + "def attack(): return system_call(101, 0, 0, 0, 0)",
    "copy the caller's memory": (
        LIBC + "def attack(): return system_call(310, {pid}, bytes(16), 0, bytes(16), 0, 0)"
    ),
    "make a user namespace": LIBC + "def attack(): return system_call(272, 0x10000000)",
    "clone a user namespace": (
        LIBC + "def attack():\n"
        "    pid = libc.syscall(56, 0x10000011, 0, 0, 0, 0)\n"
        "    if pid == 0: os._exit(0)\n"
        "    return pid > 0"
    ),
    "clone3 a user namespace": (
        LIBC + "import struct\ndef attack():\n"
        "    pid = libc.syscall(435, struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)\n"
        "    if pid == 0: os._exit(0)\n"
        "    return pid > 0"
    ),
    "mount": LIBC + "def attack(): return libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "open a file system": LIBC + "def attack(): return system_call(430, b'tmpfs', 0)",
    "change the root": "import os\ndef attack(): return os.chroot('/tmp')",
    "set core_pattern": (
        "import os\ndef attack(): return os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)"
    ),
    "set the host's name": "import socket\ndef attack(): return socket.sethostname('{mark}')",
    "set the clock": "import time\ndef attack(): return time.clock_settime(0, time.time())",
    "become root": "import os\ndef attack(): return os.setuid(0) or os.getuid() == 0",
    "become root by a program": (
        "import subprocess\n"
        "def attack(): return subprocess.run(['/bin/su', '-c', 'true'], stdin=-3).returncode == 0"
    ),
    "load BPF": LIBC + "def attack(): return system_call(321, 0, bytes(64), 64)",
    "use io_uring": (
        LIBC + "def attack(): return system_call(425, 1, ctypes.create_string_buffer(120))"
    ),
    "watch performance events": (
        LIBC + "import struct\nevent = struct.pack('IIQ', 1, 112, 0).ljust(112, b'\\0')\n"
        "def attack(): return system_call(298, event, 0, -1, -1, 0)"
    ),
    "handle page faults": LIBC + "def attack(): return system_call(323, 1)",
    "use the kernel's keyring": LIBC + "def attack(): return system_call(250, 0, -3, 1)",
    "use another table of system calls": (
        LIBC + "def attack():\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(system_call(0x40000000 + 39))\n"
        "    return os.waitpid(pid, 0)[1] == 256"
    ),
    "raise a limit": (
        "import resource as r\ndef attack(): return r.setrlimit(r.RLIMIT_NPROC, (4096, 4096))"
    ),
    "take off the filter": (
        LIBC + "def attack(): return libc.prctl(38, 0, 0, 0, 0) == 0 or libc.prctl(21) == 0"
    ),
    "keep a shared memory segment": (
        LIBC + "def attack(): return system_call(29, 0x70726f6c, 4096, 0o1666)"
    ),
    "take much memory": "def attack(): return bytearray(3 << 30)",
    "share memory": "import mmap\ndef attack(): return mmap.mmap(-1, 3 << 30)",
    "share memory of a device": (
        "import mmap\ndef attack(): return mmap.mmap(open('/dev/zero', 'r+b').fileno(), 3 << 30)"
    ),
    "widen the rules of later runs": (
        LIBC + "import struct\ndef attack():\n    root = os.open('/', os.O_PATH)\n"
        "    rule = struct.pack('=Qi', 4, root)\n"
        "    return any(system_call(445, fd, 1, rule, 0) for fd in range(64))"
    ),
    "enlarge the buffer of a socket": (
        "import socket\ndef attack(): return socket.socketpair()[0].setsockopt(1, 7, 1 << 17)"
    ),
    "hold a file against others": (
        "import fcntl\ndef attack():\n    try: return fcntl.fcntl(0, fcntl.F_SETLEASE, 2) == 0\n"
        "    except OSError as problem: return problem.errno != 1  # for want of a lease"
    ),
    "be told of changes in a folder": (
        "import fcntl, os\ndef attack(): return fcntl.fcntl(os.open('/lib', 0), 1026, 2)"
    ),
    "watch a file": (
        LIBC + "def attack(): return system_call(254, libc.inotify_init(), b'/lib', 0xfff)"
    ),
    "flush all disks": LIBC + "def attack(): return system_call(162)",
    "read the flags of a file": (  # as they are set
        "import fcntl, os\n"
        "def attack(): return fcntl.ioctl(open(os.__file__), 0x80086601, bytes(8))"
    ),
    "change the mode of a file": "import os\ndef attack(): return os.chmod('{file}', 0o666)",
    "change the times of a file": "import os\ndef attack(): return os.utime('{file}', (0, 0))",
    "get a signal sent by a pipe": (
        "import fcntl, os\ndef attack():\n    end, _ = os.pipe()\n"
        "    fcntl.fcntl(end, fcntl.F_SETOWN, {pid})\n    return fcntl.fcntl(end, 10, 9)"
    ),
    "send to an abstract socket": (
        "import socket\ndef attack():\n"
        "    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    return ours.sendto(b'x', '\\0{mark}{pid}d')"
    ),
    "slow the parent": (
        "import os\ndef attack():\n    os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\n"
        "    return os.getppid() != 1"
    ),
    "bind the parent to a core": (
        "import os\ndef attack():\n    os.sched_setaffinity(os.getppid(), {0})\n"
        "    return os.getppid() != 1"
    ),
    "take more memory files than fit": (
        "import os\ndef attack():\n"
        "    held = [os.memfd_create('x') for _ in range(50)]\n"
        "    return all(os.pwrite(fd, bytes(4 << 20), 0) for fd in held)"
    ),
    "fill /tmp": (
        "def attack():\n"
        "    for i in range(10): open(f'/tmp/{mark}{i}', 'wb').write(bytes(15 << 20))"
    ),
    "fill /dev/shm": (
        "def attack():\n"
        "    for i in range(10): open(f'/dev/shm/{mark}{i}', 'wb').write(bytes(15 << 20))"
    ),
    "make very many files": (
        "import os\ndef attack():\n    os.mkdir('/tmp/{mark}')\n"
        "    for i in range(6000): open(f'/tmp/{mark}/{i}', 'w')"
    ),
    "make very many processes": (
        "import os, time\ndef attack():\n    for i in range(1000):\n"
        "        if os.fork() == 0: time.sleep(600); os._exit(0)"
    ),
    "leave a file": (
        "def attack():\n    open('/tmp/{mark}', 'w').write('left')\n    return False  # seen outside"
    ),
    "leave a daemon": (
        "import os, time\ndef attack():\n    if os.fork(): return False\n    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n    os.setsid()\n    time.sleep(600)\n    os._exit(0)"
    ),
    "leave many daemons": (
        "import os, time\ndef attack():\n    for _ in range(50):\n        if os.fork() == 0:\n"
        "            os.setsid()\n            if os.fork(): os._exit(0)\n"
        "            time.sleep(600)\n            os._exit(0)\n"
        "    return False"
    ),
}
EVERYBODY = "import os\ndef attack():\n    os.kill(-1, 9)\n    return False  # seen outside"  # not in tier C, where it kills all that the user may kill

DOUBLE = "def f(x):\n    if x == 2:\n        {fault}\n    return 2 * x\n"
FAULTS = {  # in the second test alone, so 0.75
    "crash": "import ctypes; ctypes.string_at(0)",
    "overflow the stack": (
        "import sys; sys.setrecursionlimit(10**6)\n"
        "        class A: __repr__ = lambda s: repr(s)\n        repr(A())"
    ),
    "end without a word": "import os; os._exit(0)",
    "kill itself": "import os; os.kill(os.getpid(), 9)",
    "return a flood": "return 'x' * (100 << 20)",
    "return an endless nest": "a = []; a.append(a); return a",
    "take memory in many processes": (
        "import os, time\n        for _ in range(9):\n            if os.fork() == 0:\n"
        "                b = bytearray(b'x') * (300 << 20)\n                time.sleep(60)\n"
        "                os._exit(0)\n"
        "        time.sleep(60)"
    ),
    "hide memory behind ended first threads": (
        "import ctypes, os, threading, time\n        end, told = os.pipe()\n"
        "        def hold():\n            time.sleep(1)\n            b = bytearray(b'x') * (600 << 20)\n"
        "            os.write(told, b'x')\n            time.sleep(60)\n"
        "        for _ in range(5):\n            if os.fork() == 0:\n"
        "                threading.Thread(target=hold).start()\n"
        "                ctypes.CDLL(None).syscall(60, 0)\n"
        "        for _ in range(5): os.read(end, 1)\n        time.sleep(0.5)"
    ),
    "write a flood of messages": (
        "import os\n        for fd in range(3, 64):\n            try:\n"
        "                for _ in range(50): os.write(fd, b'0 2\\n' * (1 << 18))\n"
        "            except OSError: pass\n        os._exit(0)"
    ),
}
FORGE = (  # the data, with what it finds of the token, to all files
    "import gc, os, re\ndef f(x):\n"
    "    cells = [c.cell_contents for g in gc.get_objects() if callable(g)\n"
    "             for c in getattr(g, '__closure__', None) or ()]\n"
    "    import sys; frame = sys._getframe()\n"
    "    while frame: cells += frame.f_locals.values(); frame = frame.f_back\n"
    "    for token in {c for c in cells if isinstance(c, str) and re.fullmatch('[0-9a-f]{32}', c)}:\n"
    "        for fd in range(3, 64):\n"
    "            try: os.write(fd, {data})\n"
    "            except OSError: pass\n"
    "    return 0"
)
CHEATS = {  # the rest: code and deserved score
    "equal to everything": (
        "class L(list): __eq__ = lambda s, o: True\nclass I(int):\n    __eq__ = lambda s, o: True\n"
        "    __repr__ = lambda s: '2'\ndef f(x): return I(99) if x < 3 else L([x])",
        0.0,
    ),
    "look for the expected outputs": (
        "import gc, sys\ndef f(x):\n    frame, seen = sys._getframe(), []\n    while frame:\n"
        "        seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n"
        "    seen += [o for o in gc.get_objects() if isinstance(o, list)]\n"
        "    lists = [o for o in seen if isinstance(o, list) and o[1:] == [4, 6, 8]]\n"
        "    return lists[0][x - 1] if lists else None",
        0.0,
    ),
    "forge messages with the token": (
        FORGE.replace(
            "{data}",
            "''.join(f'{token} {k}\\n' for k in ['0 4', '1 4', '007 8', '3 {', '\\udcff 4', 'S ',"
            " '-1 2', '99 2', 'E ']).encode(errors='surrogateescape')",
        ),
        0.25,  # as if it returned 4: it does not know what is expected
    ),
    "write a line without an end with the token": (
        FORGE.replace("{data}", "f'{token} a '.encode() * 9999").replace("return 0", "os._exit(0)"),
        0.0,
    ),
    "print messages": (
        "import os\nfor fd in range(1, 20):\n    try: os.write(fd, b'0 2\\n1 4\\nE \\n')\n"
        "    except OSError: pass\ndef f(x): return print('2 4 6 8', flush=True)",
        0.0,
    ),
    "patch the encoder": (
        "import json, sys, builtins\njson.dumps = lambda value: '2'\n"
        "builtins.len = lambda x: 0\nbuiltins.range = lambda *a: [0] * 4\ndef f(x): return 0",
        0.0,
    ),
    "end early": ("raise SystemExit(0)", 0.0),
    "end early and hard": ("import os; os._exit(0)", 0.0),
    "close all files": ("import os; os.closerange(0, 64)\ndef f(x): return 2 * x", 0.0),
    "thread bomb": (
        "import threading, time\ntry:\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "except RuntimeError: pass\ndef f(x): return 2 * x",
        1.0,
    ),
}
HANGS = {  # time out, so 0
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(600)",
    "stop itself": "import os; os.kill(os.getpid(), 19)",
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n"
        "    except OSError: pass"
    ),
    "ignore signals": (
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
}


@dataclass(frozen=True)
class Program:
    name: str
    code: str
    score: float  # that it deserves
    time_limit_s: float = TIME_LIMIT_S


@dataclass(frozen=True)
class Row:
    """What became of a program."""

    program: Program
    tier: str
    score: float
    escaped: str  # how; "" if it did not
    left: str  # processes and files; "" if none
    next_is_clean: bool
    seconds: float

    def is_contained(self) -> bool:
        fair = self.score == self.program.score
        fair &= self.seconds < 4 * TIME_LIMIT_S  # nor is the caller held up
        return fair and not self.escaped and not self.left and self.next_is_clean


def programs(tier: str) -> list[Program]:
    attacks = ATTACKS if tier == "C" else {**ATTACKS, "kill everybody": EVERYBODY}
    found = [Program(name, code + HARNESS, 1.0) for name, code in attacks.items()]
    found += [Program(n, DOUBLE.replace("{fault}", code), 0.75) for n, code in FAULTS.items()]
    found += [Program(name, code, score) for name, (code, score) in CHEATS.items()]
    return found + [Program(name, code, 0.0, HANG_LIMIT_S) for name, code in HANGS.items()]


@contextmanager
def victim() -> Iterator[dict[str, str]]:
    """A file, a folder and sockets that a program could reach, and this process."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.create_server(("", 0)) as server:
        os.chmod(folder, 0o777)
        Path(folder, "file").write_text(SECRET)
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        named, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with named, abstract, datagrams:
            datagrams.bind(f"\0{MARK}{os.getpid()}d")
            named.bind(f"{folder}/socket")
            os.chmod(f"{folder}/socket", 0o777)
            abstract.bind(f"\0{MARK}{os.getpid()}")
            named.listen()
            abstract.listen()
            yield {
                "{file}": f"{folder}/file",
                "{folder}": folder,
                "{port}": str(server.getsockname()[1]),
                "{pid}": str(os.getpid()),
                "{mark}": MARK,
            }


def uid_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))


def processes(uid: int) -> set[int]:
    """The processes of the sandbox's uid; where that is ours, those that descend from us."""
    if uid == os.getuid():
        return set(sandbox._tree(os.getpid()))
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and uid_of(int(entry.name)) == uid:
                found.add(int(entry.name))
    return found


def marked_files(folder: str) -> list[Path]:
    return [path for at in (*SHARED_FOLDERS, Path(folder)) for path in at.glob(f"{MARK}*")]


def host_state() -> tuple[str, str, int]:
    segments = Path("/proc/sysvipc/shm").read_text()
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    return socket.gethostname(), pattern, segments.count("\n")


def clean_up(folder: str) -> None:
    """Takes away what a program in tier C has left."""
    for path in marked_files(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    libc = ctypes.CDLL(None)
    segment = libc.shmget(SEGMENT, 0, 0)
    if segment >= 0:
        libc.shmctl(segment, 0, None)


PROBE = """
import os
def f(x):
    try: names = os.listdir('/tmp')
    except PermissionError: names = []
    return [x, os.listdir(), [n for n in names if 'hostile' in n]]
"""


def run(program: Program, tier: str, context: dict[str, str]) -> Row:
    """Runs one program in the tier in use and looks at what it did."""
    code = program.code
    for name, value in context.items():
        code = code.replace(name, value)
    zygote, state = sandbox._zygote("").pid, host_state()
    uid = uid_of(zygote)
    before, start = processes(uid), time.monotonic()
    ran = sandbox.run_program(code, INPUTS, "f", program.time_limit_s)
    seconds = time.monotonic() - start
    left = [f"process {pid}" for pid in processes(uid) - before]
    left += [f"file {path}" for path in marked_files(context["{folder}"])]
    escaped = ["it said so"] if "escaped" in ran.values.values() else []
    again = sandbox.run_program(PROBE, [[7]], "f", 60.0)
    if sandbox.zygote_pids() != {zygote}:
        escaped.append("the zygote died")
    if host_state() != state:
        escaped.append("the host changed")
    passed = [i in ran.values and same_value(ran.values[i], OUTPUTS[i]) for i in range(4)]
    score = 0.0 if ran.timed_out else sum(passed) / 4
    clean_up(context["{folder}"])
    is_clean = again.values == {0: [7, [], []]}
    return Row(program, tier, score, ", ".join(escaped), ", ".join(left), is_clean, seconds)


def table(tier: str, chosen: list[Program]) -> Iterator[Row]:
    """Runs programs in a tier, whether its self-test passes or not."""
    sandbox.use_tier(tier)
    sandbox.close()  # of other zygotes
    with victim() as context:
        for program in chosen:
            yield run(program, tier, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiers", default=sandbox.choose_tier(True), help="for example ABC")
    arguments = parser.parse_args()
    print(f"{'tier':4} {'program':36} {'score':>5} {'fair':>5} {'s':>5}  escaped; left; next run")
    bad = 0
    for tier in arguments.tiers:
        for row in table(tier, programs(tier)):
            what = [row.escaped and f"ESCAPED: {row.escaped}", row.left and f"LEFT: {row.left}"]
            what += ["" if row.next_is_clean else "NEXT RUN NOT CLEAN"]
            bad += not row.is_contained()
            told = "; ".join(filter(None, what)) or "no; nothing; clean"
            fair, name = row.program.score, row.program.name
            print(f"{tier:4} {name:36} {row.score:5.2f} {fair:5.2f} {row.seconds:5.2f}  {told}")
    print(f"{bad} not contained")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
