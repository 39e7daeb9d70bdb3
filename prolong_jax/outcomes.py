"""What an evaluation found, prompt by prompt, and the tables made of it.

A record is a row of responses.jsonl, one response with its verdict; the records of a prompt stand
together. Scores are right or wrong in math, code and STEM, continuous in the other domains
(arXiv 2505.24864, section 3.4); solved is a score of 1 in all of them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from prolong_jax.config import DOMAINS
from prolong_jax.data.prompts import Prompt
from prolong_jax.scores import bootstrap_interval, maj_at_k, pass_at_k, powers_of_two
from prolong_jax.verifiers import Status, final_answer_text, logic, math, stem

BINARY_DOMAINS = ("math", "code", "stem")
VOTING = ("math", "stem", "logic")  # verifiers of short answers: these have a maj@k
EMBEDDED, OOD = "procedural", "reasoning_gym_ood"  # sources
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40}|/[1-9][0-9]{0,39})?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(frozen=True)
class Outcome:
    """One prompt of an evaluation; lists are over its n responses."""

    id: str
    domain: str
    level: str
    source: str
    task: str  # of reasoning_gym; else ""
    fingerprint: str  # of what was asked, and of what its verifier compares with
    scores: np.ndarray  # [n] in [0, 1], of those that were scored
    answers: list[str | None] | None  # of those that were scored; None: no votes on such a prompt
    lengths: list[int]  # tokens
    stopped: list[bool]  # ended by a stop token or string
    nll: list[float]  # nats per response, under the distribution that was sampled

    @property
    def solved(self) -> int:
        return int((self.scores >= 1).sum())

    @property
    def average(self) -> float:
        return float(self._counted.mean())

    @property
    def majority(self) -> float:
        return maj_at_k(self.answers or [], self._counted.tolist())

    @property
    def _counted(self) -> np.ndarray:
        return self.scores >= 1 if self.domain in BINARY_DOMAINS else self.scores

    def pass_at(self, k: int) -> float:
        """pass@k; where verifiers failed on so many responses that fewer are left, of those."""
        return pass_at_k(self.solved, len(self.scores), min(k, len(self.scores)))


def vote_of(verifier: str, reference: Mapping[str, Any], response: str) -> str | None:
    r"""The answer that a response votes for, None where it gives none or the verifier knows none.

    math: the last `\boxed{}`. stem: the letter of a multiple choice, else the last box. logic: the
    last `<answer>`. Plain numbers are equal by value, other texts but for white space.
    """
    text = final_answer_text(response)
    if verifier == "stem" and reference.get("options"):
        return stem.extract_letter(text)
    found = {"math": math.last_boxed, "stem": math.last_boxed, "logic": logic.last_answer}
    answer = found[verifier](text) if verifier in found else None
    plain = "".join((answer or "").replace("{,}", ",").split())
    number = plain.replace(",", "") if _THOUSANDS.fullmatch(plain) else plain
    if verifier != "logic" and _NUMBER.fullmatch(number):
        return str(Fraction(number))
    return plain or None


def fingerprint(prompt: Prompt) -> str:
    content = json.dumps([*map(dict, prompt.messages), prompt.reference], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def outcomes(records: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    """One for each prompt, in the order of the records."""
    for _, group in groupby(records, lambda record: record["id"]):
        rows = list(group)
        scored = [row for row in rows if row["status"] != Status.ERROR]
        votes = [row["answer"] for row in scored] if rows[0]["verifier"] in VOTING else None
        yield Outcome(
            **{key: rows[0][key] for key in ("id", "domain", "level", "source")},
            **{key: rows[0][key] for key in ("task", "fingerprint")},
            scores=np.array([row["score"] for row in scored], float),
            answers=votes,
            lengths=[row["len"] for row in rows],
            stopped=[row["stopped"] for row in rows],
            nll=[row["nll"] for row in rows],
        )


def read_outcomes(path: Path, samples: int) -> tuple[list[Outcome], int]:
    """The prompts of a responses.jsonl that have all their samples, and the bytes they take.

    What stands behind them is the work of a process that was stopped while it wrote.

    Raises:
      ValueError: a whole line that is no record.
    """
    found, size, end = [], 0, 0
    records: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                del record["prompt"], record["response"]  # they may be long, and are many
                records.append(record)
                complete = record["index"] == samples - 1
                found += outcomes(records) if complete else []
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: expected a response in line {number}, got {line[:60]!r}; remove it "
                    "and all lines behind it."
                ) from error
            end += len(line)
            if complete:
                size, records = end, []
    return found, size


# --- tables --------------------------------------------------------------------------------------


def subsets(found: Sequence[Outcome], levels: bool = False) -> dict[str, list[Outcome]]:
    """The prompts of each row of a table: domains, all, levels, data sets, tasks out of them.

    With `levels` also the levels of each domain.
    """
    rows: dict[str, list[Outcome]] = {name: [] for name in (*DOMAINS, "all", "easy_middle", "hard")}
    for outcome in found:
        names = [outcome.domain, "all"]
        if outcome.level in ("easy", "middle", "hard"):
            names.append("hard" if outcome.level == "hard" else "easy_middle")
        if outcome.source != EMBEDDED:
            names.append(f"source/{outcome.source}")
        if outcome.source == OOD:
            names.append(f"source/{OOD}/{outcome.task}")
        if levels and outcome.level:
            names.append(f"{outcome.domain}/{outcome.level}")
        for name in names:
            rows.setdefault(name, []).append(outcome)
    return {name: chosen for name, chosen in rows.items() if chosen}


def summarise(found: Sequence[Outcome], levels: bool = False) -> dict[str, dict[str, Any]]:
    """The table of an evaluation: a row for each of `subsets`, without prompts that nobody scored.

    A row has "avg_at_k" (mean over prompts of the mean score, with "ci95" by bootstrap over
    prompts), "k" = n, "pass_at_k" at k = n and "pass_at" at "1", "2", "4", ..., "maj_at_k" where all
    prompts have short answers, "prompts", "len_mean" (tokens), "terminated" (share of responses
    that ended before the budget), and "sampled_nll": -log p of a sampled token, mean, in nats.
    That is under the distribution that was sampled, so it is no entropy of the policy.
    """
    scored = [outcome for outcome in found if len(outcome.scores)]
    return {name: _row(chosen) for name, chosen in subsets(scored, levels).items()}


def _row(chosen: Sequence[Outcome]) -> dict[str, Any]:
    averages, most = np.array([o.average for o in chosen]), max(len(o.lengths) for o in chosen)
    lengths = [length for o in chosen for length in o.lengths]
    row = {
        "avg_at_k": float(averages.mean()),
        "k": most,
        "ci95": bootstrap_interval(averages),
        "pass_at": {
            str(k): float(np.mean([o.pass_at(k) for o in chosen])) for k in powers_of_two(most)
        },
        "prompts": len(chosen),
        "len_mean": float(np.mean(lengths)),
        "terminated": float(np.mean([stopped for o in chosen for stopped in o.stopped])),
        "sampled_nll": sum(nll for o in chosen for nll in o.nll) / max(1, sum(lengths)),
    }
    row["pass_at_k"] = row["pass_at"][str(most)]
    if all(o.answers is not None for o in chosen):
        row["maj_at_k"] = float(np.mean([o.majority for o in chosen]))
    return row
