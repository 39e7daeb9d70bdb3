"""What happens to a run when something goes wrong: one fault after the other, and a table.

    python -m tests.faults [NAME ...]

Every fault meets a small run half-way; then the run goes on, and its end is compared with that of a
run without faults. The exit code is 1 where a message or an end is not the expected one. The full disk
and the read-only workdir need root, for a small tmpfs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from prolong_jax.metrics import read_rows
from tests import runs

HALF = 6  # steps


@dataclass
class Bench:
    """A scratch directory with a whole run and a half one, whose programs are compiled."""

    scratch: Path
    whole: Path
    half: Path
    expected: dict = field(default_factory=dict)

    def copy(self, name: str) -> Path:
        return shutil.copytree(self.half, self.scratch / name, dirs_exist_ok=True)

    def lost(self, workdir: Path) -> str:
        """The run is continued; what its end then lacks."""
        code, printed = runs.start(runs.arguments(workdir))
        if code:
            return f"exit {code}: {said(printed)}"
        return ", ".join(runs.differences(runs.result(workdir), self.expected)) or "nothing"


def said(printed: str, start: str = "error: ") -> str:
    """The line that begins so."""
    lines = [line for line in printed.splitlines() if line.startswith(start)]
    return lines[-1].removeprefix(start) if lines else "no message: " + printed[-300:]


def newest_file(workdir: Path) -> Path:
    files = (f for f in (workdir / "checkpoints" / str(HALF)).rglob("*") if f.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def damaged(bench: Bench, workdir: Path, damage: Callable[[Path], object]) -> tuple[str, str]:
    damage(newest_file(workdir))
    code, printed = runs.start(runs.arguments(workdir))
    assert code == 0, printed
    lost = ", ".join(runs.differences(runs.result(workdir), bench.expected)) or "nothing"
    return said(printed, "damaged checkpoints"), lost


def truncated(bench: Bench, workdir: Path) -> tuple[str, str]:
    return damaged(bench, workdir, lambda file: os.truncate(file, file.stat().st_size // 2))


def missing(bench: Bench, workdir: Path) -> tuple[str, str]:
    return damaged(bench, workdir, lambda file: file.unlink())


def flipped(bench: Bench, workdir: Path) -> tuple[str, str]:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return damaged(bench, workdir, flip)


@contextmanager
def mounted(workdir: Path, size_mb: int):
    """A small file system at the workdir; its old content is in it."""
    aside = workdir.rename(workdir.with_name(workdir.name + ".aside"))
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(workdir)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(aside, workdir, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def remount(workdir: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(workdir)], check=True)


def used_mb(workdir: Path) -> int:
    return sum(f.stat().st_size for f in workdir.rglob("*") if f.is_file()) // 2**20 + 1


def full_disk(bench: Bench, workdir: Path) -> tuple[str, str]:
    with mounted(workdir, used_mb(workdir) + 10):  # a checkpoint has 16 MB
        code, printed = runs.start(runs.arguments(workdir))
        assert code == 1, printed
        remount(workdir, "size=500m")
        return said(printed), bench.lost(workdir)


def read_only(bench: Bench, workdir: Path) -> tuple[str, str]:
    with mounted(workdir, 500):
        remount(workdir, "ro")
        code, printed = runs.start(runs.arguments(workdir))
        assert code == 2, printed
        remount(workdir, "rw")
        return said(printed), bench.lost(workdir)


def two_runs(bench: Bench, workdir: Path) -> tuple[str, str]:
    first = subprocess.Popen(
        runs.command(runs.arguments(workdir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while (
            not (workdir / "lock").exists() or str(first.pid) not in (workdir / "lock").read_text()
        ):
            time.sleep(0.1)
        code, printed = runs.start(runs.arguments(workdir))
        assert code == 2, printed
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) in (75, -signal.SIGTERM)
    return said(printed), bench.lost(workdir)


def changed_settings(bench: Bench, workdir: Path) -> tuple[str, str]:
    other = runs.arguments(workdir, loss__kl_coef=0.01)
    code, printed = runs.start(other)
    assert code == 2, printed
    lost = bench.lost(shutil.copytree(workdir, workdir.with_name("same_settings")))
    code, allowed = runs.start([*other, "--allow-changes"])
    assert code == 0, allowed
    (change,) = read_rows(workdir / "changes.jsonl")
    expected = {"loss.kl_coef": [0.001, 0.01], "total_steps": [6, 12]}
    assert change == {"step": HALF, "changes": expected}, change
    return f"{said(printed)} / {said(allowed, 'settings changed')}", lost


def missing_data(bench: Bench, workdir: Path) -> tuple[str, str]:
    shutil.rmtree(workdir)
    data = workdir.with_suffix(".jsonl")
    rows = [f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(1, 9)]
    data.write_text("".join(rows))
    sums = {"data__sources": {"sums": {"path": str(data), "domain": "math"}}}
    sums |= {"stages": [{"mixture": {"math": 1.0}}]}
    whole = workdir.with_name("whole_sums")
    for where, steps in ((whole, 4), (workdir, 2)):
        code, printed = runs.start(runs.arguments(where, **sums, total_steps=steps))
        assert code == 0, printed
    aside = data.rename(data.with_suffix(".aside"))
    code, printed = runs.start(runs.arguments(workdir, **sums, total_steps=4))
    assert code == 2, printed
    aside.rename(data)
    assert runs.start(runs.arguments(workdir, **sums, total_steps=4))[0] == 0
    parts = runs.differences(runs.result(workdir), runs.result(whole))
    return said(printed), ", ".join(parts) or "nothing"


def workers_of(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):  # of each thread
        with suppress(OSError):  # it has ended meanwhile
            for child in children.read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                found += [int(child)] if b"verifiers.pool" in command else []
    return found


def dead_worker(bench: Bench, workdir: Path) -> tuple[str, str]:
    """A worker of the verifiers is killed again and again while the run goes on."""
    with open(workdir / "log", "w") as log:
        run = subprocess.Popen(runs.command(runs.arguments(workdir)), stdout=log, stderr=log)
    killed = 0
    while run.poll() is None:
        time.sleep(2.0)
        is_on = "continuing" in (workdir / "log").read_text()  # the check at the start is over
        if is_on and killed < 4 and (alive := workers_of(run.pid)):
            os.kill(alive[0], signal.SIGKILL)
            killed += 1
    assert run.returncode == 0 and killed, (workdir / "log").read_text()

    lost = ", ".join(runs.differences(runs.result(workdir), bench.expected)) or "nothing"
    return f"none; {killed} workers were killed and replaced, their items scored again", lost


def nan_gradient(bench: Bench, workdir: Path) -> tuple[str, str]:
    code, printed = runs.start(runs.arguments(workdir), nan=f"{HALF + 2}")
    assert code == 0, printed
    row = read_rows(workdir / "metrics.jsonl")[HALF + 2]
    assert row["update/skipped_nonfinite"] == 1.0, row
    again = bench.copy("nan_again")
    steps = ",".join(str(step) for step in range(HALF + 2, 20))
    code, printed = runs.start(runs.arguments(again, update__max_skipped=3), nan=steps)
    assert code == 2, printed  # a setting that may not change
    shutil.rmtree(again)
    code, printed = runs.start(
        runs.arguments(again, total_steps=20, update__max_skipped=3), nan="3,4"
    )
    assert code == 1, printed
    return (
        f"one step: update/skipped_nonfinite is 1; more: {said(printed)}",
        "the updates of that step",
    )


FAULTS = {
    "truncated checkpoint file": truncated,
    "missing checkpoint file": missing,
    "flipped bit in a checkpoint": flipped,
    "full disk": full_disk,
    "read-only workdir": read_only,
    "two runs in one workdir": two_runs,
    "changed settings": changed_settings,
    "missing data file": missing_data,
    "dead workers": dead_worker,
    "NaN gradient": nan_gradient,
}
MESSAGES = {
    "truncated checkpoint file": r"step 6 \(state/.* has \d+ bytes of \d+\).*goes on from step",
    "missing checkpoint file": r"step 6 \(state/.* is missing\).*goes on from step",
    "flipped bit in a checkpoint": r"step 6 \(state/.* changed\).*goes on from step",
    "full disk": r"No space left on device.*is of step 6; make room",
    "read-only workdir": r"cannot be written to",
    "two runs in one workdir": r"in use by process \d+ on",
    "changed settings": r"loss.kl_coef: 0.001 -> 0.01; give another.* / .*after step 6: .*loss.kl_coef",
    "missing data file": r"expected a file",
    "dead workers": r"none; [1-4] workers were killed",
    "NaN gradient": r"non-finite gradient",
}


def main(names: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/compiled"
        bench = Bench(Path(scratch), Path(scratch) / "whole", Path(scratch) / "half")
        for workdir, steps in ((bench.half, HALF), (bench.whole, runs.SMALL["total_steps"])):
            code, printed = runs.start(runs.arguments(workdir, total_steps=steps))
            assert code == 0, printed
        (bench.half / "summary.json").unlink()
        bench.expected = runs.result(bench.whole)
        for name in names or FAULTS:
            message, lost = FAULTS[name](bench, bench.copy(name.replace(" ", "_")))
            message = message.replace(scratch, "...")
            fits = re.search(MESSAGES[name], message) is not None
            fits &= lost == ("the updates of that step" if name == "NaN gradient" else "nothing")
            failed += not fits
            print(f"{'ok ' if fits else 'BAD'} {name:28} lost: {lost}", flush=True)
            print(textwrap.indent(textwrap.fill(message, 92), " " * 8), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
