"""The inside of the sandbox: launcher, zygote, and the run that confines itself.

`sandbox.py` starts this file with JSON settings as its argument and a socket as standard input. It
needs the standard library alone, and nothing of it runs in the caller's process.

The launcher, where it is root, makes the interpreter readable and takes another uid; for tier A it
becomes bubblewrap, which starts this file again. The zygote loads modules and forks once per
request. The run (tier A: below an init of fresh namespaces) takes its limits upon itself and only
then reads code or arguments. Its messages are lines "token kind text".

Sources: the kernel's documents on seccomp_filter and landlock; namespaces(7), bwrap(1).
"""

import atexit
import builtins
import ctypes
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMITS = {  # of a run, beside the one on CPU seconds
    resource.RLIMIT_AS: (4 << 30) - 1,  # threads reserve much that they never touch
    resource.RLIMIT_DATA: 2 << 30,
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NPROC: 128,  # of the uid (tier A: in the sandbox), beside what it has
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
}
TMP_OPTIONS = b"size=64m,nr_inodes=4096,mode=1777"  # the one writable place of tier A
MAX_VALUE_CHARS = 1 << 22
FIRST_UID, FEW_UIDS = 200_000, (20_000, 40_000)

SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
DEVICES = ["/dev/null", "/dev/urandom", "/dev/random"]  # not zero, which is memory to share

SET_DEATH_SIGNAL, SET_SECCOMP, SET_SUBREAPER, NO_NEW_PRIVS = 1, 22, 36, 38  # of prctl
NEW_MOUNTS, NEW_IPC, NEW_PIDS, ANY_NAMESPACE = 0x20000, 0x8000000, 0x20000000, 0x7E020000
BIND, RECURSIVE, PRIVATE, NO_SUID_NO_DEVICES = 4096, 16384, 1 << 18, 6  # of mount

# System calls with their numbers on x86_64 and aarch64 (-: none). These end in EPERM:
DENIED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, bpf 321 280,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432,
fspick 433 433, mount_setattr 442 442, open_by_handle_at 304 265, name_to_handle_at 303 264,
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, userfaultfd 323 282,
perf_event_open 298 241, keyctl 250 219, add_key 248 217, request_key 249 218, syslog 103 116,
kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, delete_module 176 106,
finit_module 313 273, swapon 167 224, reboot 169 142, acct 163 89, quotactl 179 60, socket 41 198,
move_pages 279 239, personality 135 92, memfd_create 319 279, memfd_secret 447 447, mq_open 240 180,
shmget 29 194, semget 64 190, msgget 68 186, tkill 200 130, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_getfd 438 438, process_madvise 440 440,
setsockopt 54 208, inotify_add_watch 254 27, fanotify_init 300 262, sync 162 81, syncfs 306 267
"""
# Tier B has no namespaces: all of a run stays in its process group, signals only itself, and changes
# nothing of files, processes and messages that landlock leaves open.
DENIED_IN_B = """
setsid 112 157, setpgid 109 154, setpriority 141 140, ioprio_set 251 30, sched_setparam 142 118,
sched_setscheduler 144 119, sched_setattr 314 274, sched_setaffinity 203 122, migrate_pages 256 238,
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55,
lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466, file_setattr 469 469,
truncate 76 45, shmat 30 196, shmctl 31 195, semop 65 193, semtimedop 220 192, semctl 66 191,
msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_unlink 241 181, mq_timedsend 242 182,
mq_timedreceive 243 183
"""
SELF_ONLY_IN_B = "kill 62 129, tgkill 234 131, prlimit64 302 261"
# Owners of files get signals, 8 10 15; leases and notices disturb or watch others, 1024 1026.
FCNTL, NOT_OF_FCNTL = "fcntl 72 25", (8, 10, 15, 1024, 1026)
IOCTL, TERMINAL_FIRST, TERMINAL_END = "ioctl 16 29", 0x5400, 0x5500  # others change files
SOCKETPAIR, NO_STREAM = "socketpair 53 199", 0xE  # bits of other types, which can be addressed
MMAP, SHARED, ANONYMOUS = "mmap 9 222", 1, 32  # of which no limit would know
CLONE, CLONE3 = "clone 56 220", "clone3 435 435"
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column, audit number
LOAD, IF_EQUAL, IF_ABOVE, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026  # what it may return

libc = ctypes.CDLL(None, use_errno=True)
Send = Callable[..., None]


def checked(result: int) -> int:
    """The result of a call to libc; OSError where it is an error."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main() -> None:
    settings = json.loads(sys.argv[1])
    if "inside" not in settings:
        launch(settings["tier"], [*settings["paths"], __file__])
        if settings["tier"] == "A":
            become_bubblewrap(settings)
    serve(settings)


# --- the launcher -------------------------------------------------------------------------------


def launch(tier: str, paths: list[str]) -> None:
    """Another uid where this is root; an empty working folder; first to go when memory is out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    empty = tempfile.mkdtemp()
    os.chmod(empty, 0o755)
    os.chdir("/" if tier == "A" else empty)
    os.rmdir(empty)  # takes no files any more
    if os.geteuid() == 0:
        with suppress(OSError):
            reveal(sorted(paths))
        if tier != "C" or not any(map(closed_folder, paths)):
            take_own_uid()


def closed_folder(path: str) -> str | None:
    """The outermost folder on the way to the path that others may not enter; None if none."""
    folders = reversed(Path(path).parents)
    return next((str(folder) for folder in folders if not folder.stat().st_mode & 1), None)


def reveal(paths: list[str]) -> None:
    """In mounts of its own, covers closed folders and puts the paths alone back in their places."""
    if not any(map(closed_folder, paths)):
        return
    checked(libc.unshare(NEW_MOUNTS))
    checked(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None))
    for path, fd in [(path, os.open(path, os.O_PATH)) for path in paths]:
        source = f"/proc/self/fd/{fd}"
        while os.path.exists(path) and (closed := closed_folder(path)):
            checked(libc.mount(b"tmpfs", closed.encode(), b"tmpfs", 0, b"mode=755"))
        if not os.path.exists(path):
            os.makedirs(path if os.path.isdir(source) else os.path.dirname(path), exist_ok=True)
            if not os.path.isdir(source):
                Path(path).touch()
            checked(libc.mount(source.encode(), path.encode(), None, BIND | RECURSIVE, None))
        os.close(fd)


def take_own_uid() -> None:
    """Takes a uid of nobody else: no other process has this pid."""
    first, count = FEW_UIDS
    try:
        os.setgid(FIRST_UID + os.getpid())
    except OSError:  # in a container that maps few
        os.setgid(first + os.getpid() % count)
    os.setgroups([])
    os.setuid(os.getgid())


def become_bubblewrap(settings: dict[str, Any]) -> None:
    """A root of libraries, four devices and a /tmp, which each run covers with its own."""
    command = "bwrap --die-with-parent --as-pid-1 --unshare-all --unshare-user".split()
    command += ["--cap-add", "CAP_SYS_ADMIN"]  # in its own user namespace, until a run starts
    for path in SYSTEM:
        command += ["--ro-bind-try", path, path]
    command += "--size 67108864 --tmpfs /tmp --dir /empty".split()
    for path, place in sorted(settings["paths"].items()):
        command += ["--ro-bind", path, place]
    for path in DEVICES:
        command += ["--dev-bind", path, path]
    command += ["--ro-bind", __file__, "/zygote.py", "--symlink", "../tmp", "/dev/shm"]
    command += "--remount-ro / --chdir /empty".split()
    command += [sys.executable, *settings["options"], "/zygote.py"]
    os.execvp("bwrap", [*command, json.dumps({**settings, "inside": True})])


# --- the zygote ---------------------------------------------------------------------------------


def serve(settings: dict[str, Any]) -> None:
    """Answers requests, a byte with two files each, until the caller's end of the socket closes.

    A run lasts until the next byte comes; a byte goes back when nothing of it is left.
    """
    tier, ruleset = settings["tier"], -1
    is_alone = tier == "A" or os.getuid() != settings["uid"]  # among processes of its uid
    if tier == "A":
        checked(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None))
    else:
        checked(libc.prctl(SET_SUBREAPER, 1, 0, 0, 0))
    if tier == "B":
        ruleset = landlock_ruleset([*SYSTEM, *settings["paths"], "."])
    if settings["sys_path"]:  # for calls; what each process has from a big zygote is free to it
        LIMITS[resource.RLIMIT_NPROC] = 32
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
    own = os.pidfd_open(os.getpid()) if tier == "A" else -1
    control.send(b"+")
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 2)
    more = True
    while more:
        message, files, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        for fd in files:
            os.set_inheritable(fd, False)
        if tier == "A":
            checked(libc.setns(own, NEW_PIDS))  # undoes the next line of the run before
            checked(libc.unshare(NEW_PIDS))  # for children
        pid = os.fork()
        if not pid:
            if tier == "A":
                os.close(own)
            begin(tier, files, ruleset, is_alone)
        for fd in files:
            os.close(fd)
        more = control.recv(1)
        end(pid, tier, is_alone)
        control.send(b"+")


def begin(tier: str, files: list[int], ruleset: int, is_alone: bool) -> None:
    """The life of a new child; never returns."""
    try:
        if not is_alone:
            LIMITS[resource.RLIMIT_NPROC] += number_of_tasks(os.getuid())
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        if tier == "A":
            enter_namespaces()
        run(tier, files[0], files[1], ruleset)
    except Exception as problem:  # counts before the first message; afterwards it has no token
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
    with suppress(ChildProcessError):  # nobody is left to wait for
        for _ in range(0 if tier == "A" else 10_000):
            kill_strays(is_alone)
            os.waitpid(-1, 0)


def kill_strays(is_alone: bool) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for stray in [-1] if is_alone else map(int, children.read_text().split()):
        with suppress(ProcessLookupError):
            os.kill(stray, signal.SIGKILL)


# --- the run ------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Gives mounts and IPC of their own, gives up capabilities, and leaves an init behind.

    The pid 1 of a namespace ignores what its processes send to it, so the run may not be it.
    """
    checked(libc.unshare(NEW_MOUNTS | NEW_IPC))
    checked(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NO_SUID_NO_DEVICES, TMP_OPTIONS))
    checked(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)))
    child = os.fork()
    while child:
        if os.wait()[0] == child:
            os._exit(0)


def number_of_tasks(uid: int) -> int:
    """The processes and threads of a uid that can be seen."""
    number = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == uid:
                number += len(os.listdir(process / "task"))
    return number


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
    checked(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))  # a killed zygote cannot
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for limit, size in {resource.RLIMIT_CPU: cpu_s, **LIMITS}.items():
        hard = resource.getrlimit(limit)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(limit, (size, size))
    checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    if tier == "B":
        checked(libc.syscall(446, ruleset, 0))  # landlock_restrict_self
        os.close(ruleset)  # or the run could add to the rules of later ones
    if tier != "C":
        program = seccomp_program(os.uname().machine, os.getpid() if tier == "B" else 0)
        code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
        checked(libc.prctl(SET_SECCOMP, 2, header, 0, 0))


def landlock_ruleset(paths: list[str]) -> int:
    """A ruleset that lets read below the paths, use the devices, and nothing else of files."""
    execute, write, read, list_folder = 1, 2, 4, 8
    version = checked(libc.syscall(444, None, 0, 1))
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("=Q", handled)
    if version >= 6:  # neither abstract sockets nor signals outside
        attributes = struct.pack("=QQQ", handled, 0, 3)
    ruleset = checked(libc.syscall(444, attributes, len(attributes), 0))
    for path in filter(os.path.exists, [*paths, *DEVICES]):
        access = read | (write if path in DEVICES else execute)
        access |= list_folder if os.path.isdir(path) else 0
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        checked(libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, fd), 0))
        os.close(fd)
    return ruleset


def seccomp_program(machine: str, own_pid: int) -> bytes:
    """The filter of system calls; that of tier B where there is a pid."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def numbers(table: str) -> list[int]:
        found = [row.split()[column] for row in table.split(",")]
        return [int(number) for number in found if number != "-"]

    column, audit = MACHINES[machine]
    refuse, allow, first_argument = step(RETURN, EPERM), step(RETURN, ALLOW), step(LOAD, 16)
    second_argument, flags_of_mmap = step(LOAD, 24), step(LOAD, 40)
    steps = [step(LOAD, 4), step(IF_EQUAL, audit, 1), step(RETURN, KILL)]
    steps += [step(LOAD, 0), step(IF_ABOVE, 1 << 30, 0, 1), step(RETURN, KILL)]  # x32 numbers
    for number in numbers(DENIED) + (numbers(DENIED_IN_B) if own_pid else []):
        steps += [step(IF_EQUAL, number, 0, 1), refuse]
    # Programs fall back on clone, whose flags can be read, when clone3 seems not to be there.
    steps += [step(IF_EQUAL, numbers(CLONE3)[0], 0, 1), step(RETURN, ENOSYS)]
    steps += [step(IF_EQUAL, numbers(CLONE)[0], 0, 4), first_argument]
    steps += [step(IF_ANY_BIT, ANY_NAMESPACE, 0, 1), refuse, allow]
    steps += [step(IF_EQUAL, numbers(MMAP)[0], 0, 5), flags_of_mmap, step(IF_ANY_BIT, SHARED, 0, 2)]
    steps += [step(IF_ANY_BIT, ANONYMOUS, 0, 1), refuse, allow]
    for number in numbers(SELF_ONLY_IN_B) if own_pid else []:
        steps += [step(IF_EQUAL, number, 0, 5), first_argument, step(IF_EQUAL, 0, 2)]
        steps += [step(IF_EQUAL, own_pid, 1), refuse, allow]
    steps += [step(IF_EQUAL, numbers(FCNTL)[0], 0, 2 * len(NOT_OF_FCNTL) + 2), second_argument]
    for value in NOT_OF_FCNTL:
        steps += [step(IF_EQUAL, value, 0, 1), refuse]
    steps += [allow, step(IF_EQUAL, numbers(IOCTL)[0], 0, 5), second_argument]
    steps += [step(IF_ABOVE, TERMINAL_END, 1), step(IF_ABOVE, TERMINAL_FIRST, 1), refuse, allow]
    if own_pid:
        steps += [step(IF_EQUAL, numbers(SOCKETPAIR)[0], 0, 4), second_argument]
        steps += [step(IF_ANY_BIT, NO_STREAM, 0, 1), refuse, allow]
    return b"".join([*steps, allow])


def answer_call(send: Send, function: str, arguments: str) -> None:
    """Calls "module:function"; sends the value, or how it raised, as JSON."""
    module, name = function.split(":")
    try:
        send("V", json.dumps(getattr(sys.modules[module], name)(*json.loads(arguments))))
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
            text = text if len(text) <= MAX_VALUE_CHARS else ""  # such an answer is no answer
        except BaseException:
            text = ""
        send(index, text)
    send("E")


def execute(program: types.CodeType, name: str) -> dict[str, Any]:
    """Runs code as a module of that name; what it defined. Only ever in a confined run."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(program, module.__dict__)
    return module.__dict__


def call(namespace: dict[str, Any], name: str, arguments: list[Any]) -> Any:
    """The value of a function, or of a method of `class Solution`."""
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)(*arguments)
    return namespace[name](*arguments)


def run_script(program: types.CodeType, text: str, stdin: int, stdout: int) -> str:
    """What a program prints that reads the text from standard input, in a process of its own."""
    for target, fd, content in ((0, stdin, text.encode()), (1, stdout, b"")):
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_SET))
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        os.dup2(fd, target)
    pid = os.fork()
    if not pid:
        try:
            be_script(program)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] != 0:
        raise ChildProcessError("the program failed")
    os.lseek(stdout, 0, os.SEEK_SET)
    with open(stdout, "rb", closefd=False) as file:
        return file.read().decode("utf-8", "replace")


def be_script(program: types.CodeType) -> None:
    """Runs a program as the main module, and ends as an interpreter does."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = stdout = open(1, "w", encoding="utf-8", closefd=False)
    try:
        execute(program, "__main__")
    except SystemExit as problem:
        if problem.code not in (None, 0):
            raise
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()  # writes what open files hold back
    for file in (sys.stdout, stdout):
        with suppress(AttributeError, ValueError):  # no file, or closed
            file.flush()


if __name__ == "__main__":
    main()
