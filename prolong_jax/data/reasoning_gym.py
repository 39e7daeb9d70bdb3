"""Reasoning Gym as in ProRL (arXiv 2505.24864, appendix D): JSON lines on disk, made once.

Per task, items of the default configuration are drawn from one seed until `size` different
questions are there, at most 2.5 times as many. The first 80% go to train.jsonl and the rest to
test.jsonl; of a held-out task only the rest is kept, in ood.jsonl. A line holds the fields of
`Prompt`. Numbers and prompt are those of the authors' public generator script.

Every task is created by an interpreter of its own with a fixed hash seed, every item with fixed
global random seeds, on which some generators depend: the files are the same, byte for byte, on
every day. The generator of codeio runs the snippets that come with reasoning_gym; its items that
change with those seeds or the clock have no answer that could be known, and are left out.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prolong_jax.data.prompts import Prompt
from prolong_jax.verifiers.logic import PROMPT_SUFFIX

TRAIN_TASKS = """\
complex_arithmetic intermediate_integration polynomial_equations polynomial_multiplication
simple_equations simple_integration ab base_conversion binary_alternation binary_matrix
caesar_cipher count_primes cryptarithm game_of_life graph_color group_anagrams isomorphic_strings
jugs letter_counting letter_jumble manipulate_matrix number_filtering number_sorting
palindrome_generation palindrome_partitioning pool_matrix ransom_note rotate_matrix rotten_oranges
sentence_reordering spell_backward spiral_matrix string_insertion string_manipulation
string_splitting string_synthesis word_ladder word_sequence_reversal word_sorting arc_1d arc_agi
rearc basic_arithmetic bitwise_arithmetic calendar_arithmetic chain_sum count_bits
decimal_arithmetic decimal_chain_sum dice fraction_simplification gcd gsm_symbolic lcm leg_counting
number_format power_function prime_factorization products time_intervals bf codeio
color_cube_rotation figlet_font needle_haystack number_sequence rectangle_count rubiks_cube
countdown emoji_mystery futoshiki knight_swap mahjong_puzzle maze mini_sudoku n_queens rush_hour
sokoban sudoku tower_of_hanoi tsumego advanced_geometry simple_geometry course_schedule
family_relationships largest_island quantum_lock shortest_path list_functions aiw circuit_logic
knights_knaves propositional_logic self_reference syllogism zebra_puzzles""".split()
HELD_OUT_TASKS = ["acre", "boxnet", "game_of_life_halting", "puzzle24"]
ALL_TASKS = (*TRAIN_TASKS, *HELD_OUT_TASKS)
SIZE, SEED, OVERDRAW, TRAIN_SHARE = 500, 42, 2.5, 0.8
DRAWN_AT_MOST = {"sokoban": 100}
REDRAWS = {"codeio": 8}  # times that an item is drawn, with different global random seeds
UNSTABLE = {"time_intervals": ("start_time", "end_time")}  # metadata that holds the day of creation
_CREATE = """import json, sys; from prolong_jax.data.reasoning_gym import create
record = json.dumps(create(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), default=str)
open(sys.argv[4], "w").write(record)"""


def build(
    directory: str | Path,
    tasks: Sequence[str] = ALL_TASKS,
    size: int = SIZE,
    seed: int = SEED,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Makes the directory with train.jsonl, test.jsonl, ood.jsonl and manifest.json, all or nothing.

    A directory that holds the same build already is left as it is. A task that fails is left out
    and named in the manifest with the reason.

    Returns:
      The manifest: settings, counts by task, SHA-256 of the files.

    Raises:
      ValueError: the directory holds anything else.
    """
    directory = Path(directory).absolute()
    settings = {"reasoning_gym": version("reasoning_gym"), "size": size, "seed": seed}
    settings["tasks"] = list(tasks)
    if directory.exists() and any(directory.iterdir()):
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text()) if path.exists() else {"settings": "no manifest"}
        if manifest["settings"] == settings:
            return manifest
        raise ValueError(
            f"directory: expected nothing or a build with {settings} in {directory}, got "
            f"{manifest['settings']}; choose another directory."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        with ThreadPoolExecutor(num_workers) as pool:
            records = list(pool.map(partial(_create_apart, Path(scratch), size, seed), tasks))
        built = Path(scratch, "built")
        built.mkdir()
        manifest = {"settings": settings, **_write(built, dict(zip(tasks, records, strict=True)))}
        (built / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        built.rename(directory)
    return manifest


def create(task: str, size: int, seed: int) -> dict[str, Any]:
    """The number of items drawn ("created"), and those with different questions ("entries")."""
    import reasoning_gym

    limit = min(int(size * OVERDRAW), DRAWN_AT_MOST.get(task, sys.maxsize))
    dataset = reasoning_gym.create_dataset(task, size=limit, seed=seed)
    created, unique = 0, {}
    while created < limit and len(unique) < size:
        entry = _draw(dataset, created, seed)
        again = (_draw(dataset, created, seed + i) for i in range(1, REDRAWS.get(task, 0)))
        if all(repr(other) == repr(entry) for other in again):
            for name in UNSTABLE.get(task, ()):
                del entry["metadata"][name]
            unique.setdefault(entry["question"], entry)
        created += 1
    return {"created": created, "entries": list(unique.values())}


def _draw(dataset: Any, index: int, global_seed: int) -> dict[str, Any]:
    import numpy

    random.seed(global_seed + index)
    numpy.random.seed(global_seed + index)
    return dataset[index]


def _create_apart(scratch: Path, size: int, seed: int, task: str) -> dict[str, Any]:
    """What `create` returns, from an interpreter of its own; or {"failed": reason}."""
    command = [sys.executable, "-c", _CREATE, task, str(size), str(seed), str(scratch / task)]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:  # some tasks run snippets that write files
        done = subprocess.run(command, env=environment, capture_output=True, cwd=folder)
    if done.returncode:
        return {"failed": done.stderr.decode(errors="replace").strip().split("\n")[-1]}
    return json.loads((scratch / task).read_text())


def _write(built: Path, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Deals the entries out to the files; the counts by task and the hashes by file."""
    splits: dict[str, list[str]] = {"train": [], "test": [], "ood": []}
    counts = {}
    for task, record in records.items():
        lines = [_line(task, i, entry) for i, entry in enumerate(record.pop("entries", ()))]
        cut, held_out = int(len(lines) * TRAIN_SHARE), task in HELD_OUT_TASKS
        dealt = {"ood": lines[cut:]} if held_out else {"train": lines[:cut], "test": lines[cut:]}
        for split, part in dealt.items():
            splits[split] += part
        sizes = {split: len(part) for split, part in dealt.items()}
        counts[task] = {**record, "unique": len(lines), **sizes}
    hashes = {}
    for split, lines in splits.items():
        content = "".join(lines).encode()
        (built / f"{split}.jsonl").write_bytes(content)
        hashes[f"{split}.jsonl"] = hashlib.sha256(content).hexdigest()
    return {"tasks": counts, "sha256": hashes}


def _line(task: str, index: int, entry: dict[str, Any]) -> str:
    messages = ({"role": "user", "content": f"{entry['question']} {PROMPT_SUFFIX}"},)
    reference = {"task": task, "entry": entry}
    name = f"reasoning_gym/{task}/{index}"
    prompt = Prompt(name, "logic", "", "logic", messages, reference, "reasoning_gym")
    return json.dumps(asdict(prompt)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the Reasoning Gym data.")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument("--tasks", default=",".join(ALL_TASKS))
    options = parser.parse_args()
    for task, row in build(options.out, options.tasks.split(","))["tasks"].items():
        print(f"{task}: {', '.join(f'{name} {value}' for name, value in row.items())}")


if __name__ == "__main__":
    main()
