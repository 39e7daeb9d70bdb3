"""Verifiers score a response against a reference: pure functions that never raise on any text.

Importing this package is light. A verifier loads its heavy libraries (sympy, reasoning_gym, pint)
when it first runs, which should be inside a worker of `prolong_jax.verifiers.pool`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

CACHE_SIZE = 4096  # verdicts that `remembered` keeps


class Status(StrEnum):
    """How the scoring went, beside the score."""

    OK = "ok"  # scored; a wrong or unreadable answer is OK with score 0
    TIMEOUT = "timeout"  # the response used up its time: score 0, counted
    ERROR = "error"  # our fault (broken reference, crash): no score of the response


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification."""

    score: float  # in [0, 1]
    status: Status = Status.OK
    detail: str = ""  # for people


def final_answer_text(response: str) -> str:
    """The text after the last `</think>`; "" while a `<think>` is still open; else all of it."""
    opened, closed = response.rfind("<think>"), response.rfind("</think>")
    if opened > closed:
        return ""
    return response if closed < 0 else response[closed + len("</think>") :]


def error(detail: str) -> Verdict:
    """The verdict for a fault of ours."""
    return Verdict(0.0, Status.ERROR, detail)


def remembered(cache: dict[bytes, Verdict], item: Any, score: Callable[[], Verdict]) -> Verdict:
    """The verdict on an equal item, of JSON values, that was scored before; else a new one.

    TIMEOUT and ERROR, which may be the fault of a busy machine, are not kept.
    """
    key = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).digest()
    if key in cache:
        return cache[key]
    verdict = score()
    if verdict.status == Status.OK:
        if len(cache) >= CACHE_SIZE:
            cache.pop(next(iter(cache)))
        cache[key] = verdict
    return verdict


def verify(name: str, response: str, reference: Mapping[str, Any]) -> Verdict:
    """The verdict of a verifier: one of VERIFIERS, or a module of one's own with `verify`.

    Raises:
      TypeError: a module of one's own returns something else.
    """
    verdict = _module(name).verify(response, reference)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"verify: expected a Verdict, got {verdict!r}; return Verdict(score).")
    return verdict


VERIFIERS: dict[str, Callable[[str, Mapping[str, Any]], Verdict]] = {
    domain: partial(verify, domain) for domain in ("math", "code", "stem", "logic", "instruct")
}


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}" if name in VERIFIERS else name)


def refuse_unknown(name: str) -> None:
    """Raises ValueError where a verifier is none of VERIFIERS and no module that Python finds."""
    try:
        is_known = name in VERIFIERS or find_spec(name) is not None
    except (ImportError, ValueError):  # of a package that there is not; no name at all
        is_known = False
    if not is_known:
        raise ValueError(
            f"verifier: expected one of {', '.join(VERIFIERS)} or a module on the Python path, "
            f"got {name!r}."
        )


def warm_up(name: str) -> None:
    """Loads what the verifier needs and tries it once; raises what stands in its way.

    Raises:
      ValueError: unknown verifier, or it does not give full marks to a right answer.
    """
    refuse_unknown(name)
    response, reference = _module(name).EXAMPLE
    verdict = verify(name, response, reference)
    if verdict.score != 1.0:
        raise ValueError(
            f"verifier {name}: expected score 1 for its example, got {verdict.score} "
            f"({verdict.status}: {verdict.detail})."
        )
