"""What every task of reasoning_gym pays for right, empty, junk and hostile answers, as a table.

`python -m tests.verifiers.logic_table [task ...]` prints it. The entries are drawn in a fresh
interpreter with a fixed hash seed, on which some generators depend, and the answers are scored by
the worker pool, as in a run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prolong_jax.verifiers import Verdict, logic
from prolong_jax.verifiers.pool import Pool

COUNT, SEED, LIMIT_S = 2, 7, 2 * logic.TIME_LIMIT_S
SALAD = "perhaps the answer lies somewhere between these lines and nobody knows " * 20
CREATE = """import json, sys
from prolong_jax.data.reasoning_gym import create
tasks, count, seed = json.loads(sys.argv[1])
entries = {task: create(task, count, seed)["entries"] for task in tasks}
open(sys.argv[2], "w").write(json.dumps(entries, default=str))
"""


def all_tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - set(logic.EXCLUDED))


def entries(tasks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """`COUNT` entries of every task, as they come back from JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "entries.json")
        request = json.dumps([list(tasks), COUNT, SEED])
        paths = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", CREATE, request, str(path)]
        subprocess.run(command, env={**os.environ, **paths}, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


def oracle(task: str, entry: dict[str, Any]) -> str:
    """A right answer: the entry's own, or for tasks that give none a worked one."""
    metadata = entry["metadata"]
    if task == "graph_color":
        return json.dumps(metadata["possible_answer"])
    if task == "boxnet":
        return json.dumps(boxnet_plan(metadata["initial_state"]))
    if task == "rush_hour":
        return rush_hour_moves(entry["question"].split("Board:\n")[1].split())
    for name in ("example_correct_answer", "example_answer"):  # rubiks_cube, propositional_logic
        if entry["answer"] is None:
            entry = {**entry, "answer": metadata.get(name)}
    return entry["answer"]


def boxnet_plan(state: dict[str, list[str]]) -> list[dict[str, str]]:
    """Carries one box after the other to its target, first along one axis, then the other."""
    places = {item: tuple(map(float, at.split("_"))) for at in state for item in state[at]}
    plan = []
    for box in (item for item in places if item.startswith("box_")):
        target = "target" + box.removeprefix("box")
        (x, y), (to_x, to_y) = places[box], places[target]
        while (x, y) != (to_x, to_y):
            agent = f"Agent[{x}, {y}]"
            if x != to_x:
                x += 1 if x < to_x else -1
            else:
                y += 1 if y < to_y else -1
            plan.append({agent: f"move({box}, square[{x}, {y}])"})
        plan.append({f"Agent[{x}, {y}]": f"move({box}, {target})"})
    return plan


def rush_hour_moves(rows: list[str]) -> str:
    """A shortest solution, by breadth-first search over the boards."""
    start, size = "".join(rows), len(rows)
    came_from: dict[str, tuple[str, str]] = {start: ("", "")}
    boards = deque([start])
    while boards and not (board := boards.popleft()).endswith("A", 0, size * (size // 2)):
        for move, after in rush_hour_steps(board, size):
            if after not in came_from:
                came_from[after] = (board, move)
                boards.append(after)
    moves = []
    while came_from[board][0]:
        board, move = came_from[board]
        moves.append(move)
    return " ".join(reversed(moves))


def rush_hour_steps(board: str, size: int):
    """Every move by one space: its text and the board after it."""
    for car in sorted(set(board) - set(".x")):
        at = [i for i, cell in enumerate(board) if cell == car]
        stride = at[1] - at[0]
        for sign, front, back in (("+", at[-1], at[0]), ("-", at[0], at[-1])):
            to = front + (stride if sign == "+" else -stride)
            same_line = stride == size or to // size == front // size
            if 0 <= to < len(board) and same_line and board[to] == ".":
                cells = list(board)
                cells[to], cells[back] = car, "."
                yield f"{car}{sign}1", "".join(cells)


def probes(task: str, drawn: list[dict[str, Any]], marker: Path) -> list[tuple[str, int, str]]:
    """(probe, index of the entry, answer) for all drawn entries of a task."""
    rows = []
    for i, entry in enumerate(drawn):
        following = drawn[(i + 1) % len(drawn)]
        shell = f"__import__('os').system('touch {marker}')"
        answers = {
            "oracle": oracle(task, entry),
            "empty": "",
            "word": "qwerty",
            "salad": SALAD,
            "zero": "0",
            "nan": "nan",
            "nans": json.dumps(
                [float("nan")] * max(1, len(re.findall(r"[\d.]+", str(entry["answer"]))))
            ),
            "other": oracle(task, following),
            "shell": shell,
            "list": f"[{shell}]",
            "equal": "type('X', (), {'__eq__': lambda a, b: True, '__sub__': lambda a, b: 0})()",
        }
        rows += [(probe, i, answer) for probe, answer in answers.items()]
    return [*rows, ("power", 0, "9**9**9**9"), ("digits", 0, "9" * 100_000)]


def table(tasks: Sequence[str], marker: Path) -> dict[str, dict[str, list[Verdict]]]:
    """The verdicts by task and probe."""
    drawn = entries(tasks)
    rows = [(task, *probe) for task in tasks for probe in probes(task, drawn[task], marker)]
    requests = [
        ("logic", f"<answer>{answer}</answer>", {"task": task, "entry": drawn[task][i]})
        for task, _, i, answer in rows
    ]
    with Pool(num_workers=2, time_limit_s=LIMIT_S) as pool:
        pool.check(["logic"])
        verdicts = pool.score_all(requests)
    found: dict[str, dict[str, list[Verdict]]] = {task: {} for task in tasks}
    for (task, probe, i, answer), verdict in zip(rows, verdicts, strict=True):
        found[task].setdefault(probe, []).append(verdict)
        if probe == "oracle":  # an equal answer scores 1 without its scorer
            scored = logic._scored(task, answer, drawn[task][i])
            found[task].setdefault("scorer", []).append(scored)
    return found


def treatment(task: str) -> str:
    """What the verifier's tables say about the task."""
    tables = {"guarded": logic.GUARDED, "re-implemented": logic.REIMPLEMENTED}
    said = [f"{name}: {rows[task][1]}" for name, rows in tables.items() if task in rows]
    if task in logic.FLOORS:
        said.append("floor {}: {}".format(*logic.FLOORS[task]))
    return "; ".join(said)


def main() -> None:
    tasks = sys.argv[1:] or all_tasks()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "ran")
        found = table(tasks, marker)
        ran = marker.exists()
    names = list(found[tasks[0]])
    print(f"{'task':26}", *(f"{name:>7}" for name in names), sep="")
    for task, row in found.items():
        cells = []
        for name in names:
            worst = min if name in ("oracle", "scorer") else max
            worst = worst(row[name], key=lambda verdict: verdict.score)
            statuses = {str(verdict.status) for verdict in row[name]} - {"ok"}
            cells.append(f"{'/'.join(statuses) or format(worst.score, '.3g'):>7}")
        print(f"{task:26}", *cells, "  ", re.sub(r"\s+", " ", treatment(task)), sep="")
    for task, reason in logic.EXCLUDED.items():
        print(f"{task:26}  excluded: {reason}")
    print(f"injected code ran: {ran}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
