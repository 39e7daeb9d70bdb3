"""The README's figure from a finished run: python experiments/figure.py runs/tiny experiments/tiny_run.svg"""

import re
import sys
from pathlib import Path

from prolong_jax.config import ASSETS
from prolong_jax.report import read_workdir, validation_chart


def main(workdir: str, out: str) -> None:
    card = validation_chart([read_workdir(Path(workdir))], "easy_middle")
    svg = re.search(r"<svg (.*)</svg>", card, re.DOTALL)
    if svg is None:
        raise ValueError(f"{workdir!r} has no evaluations to draw.")
    attributes, body = svg.group(1).split(">", 1)
    style = (ASSETS / "report.css").read_text()
    name = 'xmlns="http://www.w3.org/2000/svg"'
    Path(out).write_text(f"<svg {name} {attributes}><style>{style}</style>{body}</svg>\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
