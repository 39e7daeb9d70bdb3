"""The prompt record that every data source is turned into, and what stands for a bad row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One task: what the policy reads, and what its verifier compares with."""

    id: str  # unique within a run; seeds the samples drawn for this prompt
    domain: str  # math, code, stem, logic, instruct
    level: str  # difficulty, "" where the source has none
    verifier: str  # key of prolong_jax.verifiers.VERIFIERS, or a module of its own
    messages: tuple[Mapping[str, str], ...]  # chat messages {"role", "content"}
    reference: Mapping[str, Any]  # what the verifier needs, JSON-able
    source: str  # data set or generator
    solution: str = ""  # a right program, where the data set has one; read for checks only


@dataclass(frozen=True)
class Skipped:
    """A row that gives no prompt."""

    reason: str  # a few words, the same for all rows with this fault
    where: str  # file and row number, from 0
    detail: str = ""
    is_bad: bool = True  # False: left out because the settings say so


class BadRow(ValueError):
    """Raised by a format for a row that cannot be used."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail
