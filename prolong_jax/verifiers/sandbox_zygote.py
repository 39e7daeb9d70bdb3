"""The inside of the sandbox: the launcher, the zygote, and the run that confines itself.

`sandbox.py` starts this file with a JSON object of settings as its only argument and a socket as
standard input. It needs the standard library alone, and nothing here runs in the caller's process.

- The launcher, where it is root, makes the interpreter readable in a mount namespace of its own
  and takes another uid. For tier A it becomes bubblewrap, which starts this file once more.
- The zygote loads modules and then forks once per request, one at a time.
- The run (tier A: after an init for its fresh namespaces) takes its limits upon itself, and only
  then reads code or arguments. A message of its result is a line "token kind text".

Sources: the kernel's userspace-api documents on seccomp_filter, landlock and no_new_privs; the
manual pages of namespaces(7), capabilities(7), bwrap(1).
"""

import atexit
import builtins
import ctypes
import errno
import gc
import importlib
import json
import marshal
import os
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMITS = [  # of a run, beside the one on CPU seconds
    (resource.RLIMIT_AS, (4 << 30) - 1),  # threads reserve much that they never touch
    (resource.RLIMIT_DATA, 1 << 30),
    (resource.RLIMIT_FSIZE, 16 << 20),
    (resource.RLIMIT_NPROC, 128),  # of all processes of the uid (tier A: in the sandbox)
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
]
TMP_OPTIONS = b"size=64m,nr_inodes=4096,mode=1777"  # the one writable place of tier A
MAX_VALUE_CHARS = 1 << 22
FIRST_UID, MAX_PID = 200_000, 1 << 22

DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x8000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18

# System calls that end in EPERM: name, number on x86_64, number on aarch64.
DENIED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432,
fspick 433 433, mount_setattr 442 442, open_by_handle_at 304 265, name_to_handle_at 303 264,
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425,
io_uring_enter 426 426, io_uring_register 427 427, keyctl 250 219, add_key 248 217,
request_key 249 218, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105,
delete_module 176 106, finit_module 313 273, swapon 167 224, reboot 169 142, syslog 103 116,
acct 163 89, quotactl 179 60, move_pages 279 239, personality 135 92, socket 41 198,
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, semget 64 190, msgget 68 186,
mq_open 240 180, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_send_signal 424 424, pidfd_getfd 438 438, process_madvise 440 440
"""
DENIED_IN_B = "setsid 112 157, setpgid 109 154"  # all of a run stays in its process group
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column, audit number
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
NAMESPACE_FLAGS = 0x7E020000
# Tier B has no pid namespace: these only with the first argument 0 or the run's own pid.
ON_ITSELF = {"x86_64": (62, 234, 302), "aarch64": (129, 131, 261)}  # kill, tgkill, prlimit64
LOAD, IF_EQUAL, IF_ABOVE, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x50000

libc = ctypes.CDLL(None, use_errno=True)
Send = Callable[..., None]


def checked(result: int) -> int:
    """The result of a call to libc; OSError where it is an error."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def main() -> None:
    settings = json.loads(sys.argv[1])
    if "inside" not in settings:
        launch(settings)
        if settings["tier"] == "A":
            become_bubblewrap(settings)
    serve(settings)


# --- the launcher -------------------------------------------------------------------------------


def launch(settings: dict[str, Any]) -> None:
    """Another uid where this is root; the first choice when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    empty = tempfile.mkdtemp()
    os.chmod(empty, 0o755)
    os.chdir("/" if settings["tier"] == "A" else empty)
    os.rmdir(empty)  # a working folder that is gone is empty and takes no files
    if os.geteuid() == 0:
        paths = sorted([*settings["paths"], __file__])
        with suppress(OSError):
            reveal(paths)
        if settings["tier"] != "C" or not any(map(closed_folder, paths)):
            take_own_uid()


def closed_folder(path: str) -> str | None:
    """The outermost folder on the way to the path that others may not enter; None if none."""
    folders = reversed(Path(path).parents)
    return next((str(folder) for folder in folders if not folder.stat().st_mode & 1), None)


def reveal(paths: list[str]) -> None:
    """Covers closed folders on the way to the paths, and puts the paths alone in there again.

    Only in a mount namespace of this process; nobody else sees a change.
    """
    if not any(map(closed_folder, paths)):
        return
    checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    held = {path: os.open(path, os.O_PATH) for path in paths}
    for path, fd in held.items():
        is_folder = os.path.isdir(f"/proc/self/fd/{fd}")
        while os.path.exists(path) and (closed := closed_folder(path)):
            checked(libc.mount(b"tmpfs", closed.encode(), b"tmpfs", MS_NODEV, b"mode=755"))
        if not os.path.exists(path):
            os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
            if not is_folder:
                Path(path).touch()
            source = f"/proc/self/fd/{fd}".encode()
            checked(libc.mount(source, path.encode(), None, MS_BIND | MS_REC, None))
        os.close(fd)


def take_own_uid() -> None:
    """A uid that no other sandbox has, since no other process has this pid."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    highest = max(int(first) + int(count) for first, _, count in ranges)
    wide = highest > FIRST_UID + MAX_PID
    uid = FIRST_UID + os.getpid() if wide else 20_000 + os.getpid() % 40_000
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def become_bubblewrap(settings: dict[str, Any]) -> None:
    """A root of nothing but libraries, four devices and an empty, later sized, /tmp."""
    command = ["bwrap", "--die-with-parent", "--as-pid-1", "--cap-add", "CAP_SYS_ADMIN"]
    command += "--unshare-user --unshare-pid --unshare-ipc --unshare-net --unshare-uts".split()
    command += ["--unshare-cgroup-try"]
    for path in SYSTEM:
        command += ["--ro-bind-try", path, path]
    for path in sorted(settings["paths"]):
        command += ["--ro-bind", path, path]
    for path in DEVICES:
        command += ["--dev-bind", path, path]
    command += ["--ro-bind", __file__, "/zygote.py", "--symlink", "../tmp", "/dev/shm"]
    command += ["--dir", "/tmp", "--dir", "/empty", "--remount-ro", "/", "--chdir", "/empty"]
    command += [sys.executable, *settings["options"], "/zygote.py"]
    os.execvp("bwrap", [*command, json.dumps({**settings, "inside": True})])


# --- the zygote ---------------------------------------------------------------------------------


def serve(settings: dict[str, Any]) -> None:
    """Answers requests, a byte with two files each, until the caller's end of the socket closes.

    A run lasts until the next byte comes; a byte goes back when nothing of it is left.
    """
    tier, ruleset, own = settings["tier"], -1, -1
    if tier == "A":
        checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
        own = os.pidfd_open(os.getpid())
    else:
        checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if tier == "B":
        ruleset = landlock_ruleset([*SYSTEM, *settings["paths"], "."])
    sys.path += settings["sys_path"]
    for name in settings["modules"]:
        module = importlib.import_module(name)
        for needed in getattr(module, "PRELOAD", ()):
            importlib.import_module(needed)
    os.environ.clear()
    sys.argv[:] = ["response"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=0)
    control.send(b"+")
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 2, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        pid = start(tier, files, ruleset, own)
        for fd in files:
            os.close(fd)
        more = control.recv(1)
        end(pid, tier, os.getuid() != settings["uid"])
        if not more:
            return
        control.send(b"+")


def start(tier: str, files: list[int], ruleset: int, own: int) -> int:
    """Forks a run; its pid."""
    if tier == "A":
        checked(libc.setns(own, CLONE_NEWPID))  # undoes the next line of the run before
        checked(libc.unshare(CLONE_NEWPID))  # for children
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        if tier == "A":
            enter_namespaces()
        run(tier, *files, ruleset)
    except Exception as problem:  # only before the first message; later text has no token
        os.write(files[1], repr(problem).encode())
    finally:
        os._exit(0)


def end(pid: int, tier: str, is_alone: bool) -> None:
    """Kills and reaps a run: in tier A its init takes all with it, in B its group holds all.

    What left the group in C is found by its uid, or else among the children that fell to us.
    """
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with suppress(ChildProcessError):  # nobody is left to wait for
        for _ in range(0 if tier == "A" else 10_000):
            for stray in [-1] if is_alone else map(int, children.read_text().split()):
                with suppress(ProcessLookupError):
                    os.kill(stray, signal.SIGKILL)
            os.waitpid(-1, 0)


# --- the run ------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Becomes the child of an init with mounts of its own; nobody keeps a capability.

    The pid 1 of a namespace ignores what its processes send to it, so the run may not be it.
    """
    checked(libc.unshare(CLONE_NEWNS | CLONE_NEWIPC))
    checked(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, TMP_OPTIONS))
    version_3 = struct.pack("=Ii", 0x20080522, 0)
    checked(libc.capset(version_3, bytes(24)))
    child = os.fork()
    if child:
        while os.wait()[0] != child:
            pass
        os._exit(0)


def run(tier: str, task_fd: int, result_fd: int, ruleset: int) -> None:
    """One request: reads the task, confines itself, runs, writes messages."""
    with open(task_fd, "rb") as file:
        token, cpu_s, kind, *task = marshal.load(file)

    def send(kind: str | int, text: str = "") -> None:
        data = f"{token} {kind} {text}\n".encode()
        while data:
            data = data[os.write(result_fd, data) :]

    files = [os.memfd_create(name) for name in ("stdin", "stdout")]
    confine(tier, cpu_s, ruleset)
    send("B")
    if kind == "call":
        answer_call(send, *task)
    else:
        run_tests(send, files, *task)


def confine(tier: str, cpu_s: int, ruleset: int) -> None:
    """The limits of a run, none of which it can take off."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for limit, size in [(resource.RLIMIT_CPU, cpu_s), *LIMITS]:
        hard = resource.getrlimit(limit)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(limit, (size, size))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if tier != "A":
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if tier == "B":
        checked(libc.syscall(446, ruleset, 0))  # landlock_restrict_self
    if tier != "C":
        program = seccomp_program(os.uname().machine, os.getpid() if tier == "B" else None)
        code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
        checked(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0))


def landlock_ruleset(paths: Iterable[str]) -> int:
    """A ruleset that lets read below the paths, use the devices, and nothing else of files."""
    version = checked(libc.syscall(444, None, 0, 1))
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = checked(libc.syscall(444, struct.pack("=Q", handled), 8, 0))
    execute, write, read, list_folder = 1, 2, 4, 8
    wanted = [(path, execute | read) for path in paths if os.path.exists(path)]
    for path, access in [*wanted, *((path, read | write) for path in DEVICES)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access |= list_folder if os.path.isdir(path) else 0
        checked(libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, fd), 0))
        os.close(fd)
    return ruleset


def seccomp_program(machine: str, only_pid: int | None) -> bytes:
    """The filter of system calls, in classic BPF; with a pid, signals reach that process alone."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    column, audit = ARCHITECTURES[machine]
    names = DENIED if only_pid is None else f"{DENIED}, {DENIED_IN_B}"
    denied = [int(row.split()[column]) for row in names.split(",")]
    steps = [step(LOAD, 4), step(IF_EQUAL, audit, 1), step(RETURN, KILL)]
    steps += [step(LOAD, 0), step(IF_ABOVE, 1 << 30, 0, 1), step(RETURN, KILL)]  # x32 numbers
    for number in denied:
        steps += [step(IF_EQUAL, number, 0, 1), step(RETURN, REFUSE | errno.EPERM)]
    # Programs fall back on clone, whose flags can be read, when clone3 seems not to be there.
    steps += [step(IF_EQUAL, CLONE3, 0, 1), step(RETURN, REFUSE | errno.ENOSYS)]
    first_argument = step(LOAD, 16)
    refuse, allow = step(RETURN, REFUSE | errno.EPERM), step(RETURN, ALLOW)
    steps += [step(IF_EQUAL, CLONE[machine], 0, 4), first_argument]
    steps += [step(IF_ANY_BIT, NAMESPACE_FLAGS, 0, 1), refuse, allow]
    for number in ON_ITSELF[machine] if only_pid is not None else ():
        steps += [step(IF_EQUAL, number, 0, 5), first_argument, step(IF_EQUAL, 0, 2)]
        steps += [step(IF_EQUAL, only_pid or 0, 1), refuse, allow]
    return b"".join([*steps, allow])


def answer_call(send: Send, function: str, arguments: str) -> None:
    """Calls "module:function"; the value, or how it raised, as JSON."""
    module, name = function.split(":")
    try:
        value = getattr(sys.modules[module], name)(*json.loads(arguments))
        send("V", json.dumps(value))
    except BaseException as problem:
        send("X", json.dumps([type(problem).__name__, str(problem)[:1000]]))


def run_tests(
    send: Send, files: list[int], code: str, fn_name: str | None, inputs: list[Any], first: int
) -> None:
    """Messages: C, L for a failure to compile or load; S at the start, a number per test, E."""
    builtins.exit = builtins.quit = sys.exit  # as the site module would
    dumps, stage, namespace = json.dumps, "C", {}
    try:
        program = compile(code, "<response>", "exec", dont_inherit=True)
        stage = "L"
        if fn_name is not None:
            namespace = execute(program, "response")
    except BaseException as problem:
        return send(stage, type(problem).__name__)
    send("S")
    for index in range(first, len(inputs)):
        try:
            if fn_name is None:
                text = dumps(run_script(program, inputs[index], *files))
            else:
                text = dumps(call(namespace, fn_name, inputs[index]))
            if len(text) > MAX_VALUE_CHARS:
                text = ""  # such an answer is no answer
        except BaseException:
            text = ""
        send(index, text)
    send("E")


def execute(program: types.CodeType, name: str) -> dict[str, Any]:
    """Runs code as a module of that name; what it defined. Only ever in a confined run."""
    module = sys.modules[name] = types.ModuleType(name)
    builtins.exec(program, module.__dict__)
    return module.__dict__


def call(namespace: dict[str, Any], name: str, arguments: list[Any]) -> Any:
    """The value of a function, or of a method of `class Solution`."""
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)(*arguments)
    return namespace[name](*arguments)


def run_script(program: types.CodeType, text: str, stdin: int, stdout: int) -> str:
    """What a program prints that reads the text from standard input."""
    for target, fd, content in ((0, stdin, text.encode()), (1, stdout, b"")):
        with open(fd, "wb", closefd=False) as file:
            file.truncate(0)
            file.seek(0)
            file.write(content)
            file.seek(0)
        os.dup2(fd, target)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    try:
        execute(program, "__main__")
    except SystemExit as problem:
        if problem.code not in (None, 0):
            raise
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os.lseek(stdout, 0, os.SEEK_SET)
    with open(stdout, "rb", closefd=False) as file:
        return file.read().decode("utf-8", "replace")


if __name__ == "__main__":
    main()
