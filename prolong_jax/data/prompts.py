"""The prompt record that every data source is turned into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One task: what the policy reads, and what its verifier compares with."""

    id: str  # unique within a run; seeds the samples drawn for this prompt
    domain: str  # math, code, stem, logic, instruct
    level: str  # difficulty, "" where the source has none
    verifier: str  # key of prolong_jax.verifiers.VERIFIERS
    messages: tuple[Mapping[str, str], ...]  # chat messages {"role", "content"}
    reference: Mapping[str, Any]  # what the verifier needs, JSON-able
    source: str  # data set or generator
