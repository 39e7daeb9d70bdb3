"""What the benchmarks share: the name of the machine, limits, and baselines/MACHINE.json."""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

BASELINES = Path(__file__).parent / "baselines"
Limits = Mapping[str, tuple[str, float]]  # figure: ("at least" or "at most", the number)


def machine() -> str:
    """The CPU model and the number of cores, as a file name."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    name = f"{model[1] if model else 'unknown cpu'} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def wants_to_write(description: str | None) -> bool:
    """Whether the command line has --write."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="make the figures the baseline")
    return parser.parse_args().write


def report(name: str, figures: Mapping[str, float], limits: Limits, write: bool) -> bool:
    """Prints a line per figure beside its limit and baseline; whether all keep their limits."""
    path = BASELINES / f"{machine()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    baseline, kept = known.get(name, {}), True
    for key, figure in figures.items():
        line = f"{key:16} {figure:10.3f}"
        if key in limits:
            kind, limit = limits[key]
            good = figure >= limit if kind == "at least" else figure <= limit
            kept = kept and good
            line += f"   {kind} {limit:g}: {'kept' if good else 'MISSED'}"
        if key in baseline:
            line += f"   baseline {baseline[key]:.3f}, x{figure / baseline[key]:.2f}"
        print(line)
    if write:
        known[name] = {key: float(f"{figure:.4g}") for key, figure in figures.items()}
        path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    return kept
