"""What a person asks of a running run: control.json in its workdir, or SIGUSR1 for a reset.

    echo '{"reset": true}' > WORKDIR/control.json

Names are those of `stages.REQUESTS`; stop saves and ends as SIGTERM does. A request is carried out
before the next step. Those that change the run are kept as control/STEP.json and carried out again
at that step by a run that goes on from an earlier checkpoint, so that it ends with the same weights.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from prolong_jax.processes import exchange, is_first, write_json
from prolong_jax.stages import REQUESTS

KEPT = ("reset", "advance", "evaluate")


class Control:
    """Takes requests; every process of a run has one, the first looks for them."""

    def __init__(self, workdir: Path):
        self._asked, self._kept = workdir / "control.json", workdir / "control"
        self._signalled = False
        self._previous: Any = None

    def __enter__(self) -> "Control":
        self._previous = signal.signal(signal.SIGUSR1, self._note)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGUSR1, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        self._signalled = True

    def take(self, step: int) -> frozenset[str]:
        """The requests after `step` steps, agreed on by all processes; each has to ask."""
        signalled = self._signalled
        if signalled:  # one that comes meanwhile is not lost
            self._signalled = False
        signalled = any(exchange(signalled))
        return exchange(self._found(step, signalled) if is_first() else None)[0] or frozenset()

    def _found(self, step: int, signalled: bool) -> frozenset[str]:
        kept, taken = self._kept / f"{step}.json", self._asked.with_suffix(".taken")
        files, asked = [kept] if kept.exists() else [], {"reset"} if signalled else set()
        if self._asked.exists():
            os.replace(self._asked, taken)
            files.append(taken)
        for path in files:
            try:
                asked |= _read(path)
            except ValueError as error:
                print(f"control.json: {error}; it is left as {path.name}")
        if known := sorted(asked.intersection(KEPT)):
            self._kept.mkdir(exist_ok=True)
            write_json(kept, dict.fromkeys(known, True))
        return frozenset(asked)


def _read(path: Path) -> set[str]:
    """The names that are true.

    Raises:
      ValueError: no JSON object of known names.
    """
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not set(values) <= set(REQUESTS):
        raise ValueError(f"expected an object of {', '.join(REQUESTS)}, got {values!r}")
    return {name for name, value in values.items() if value}
