"""Programs: the share of the tests that the response's Python code passes.

Extraction: the text after the last "```python" up to the next "```" (or the end) of the final
answer text. The code runs in a child process that gets the inputs, never the expected outputs; the
comparison happens here. All tests run; a syntax error, a failing import or a run beyond the total
time limit scores 0, an exception or a crash in one test fails that test alone.

Two kinds of reference. With `fn_name`: each input is the argument list of one call (of the function
or of the method of `class Solution`) and each output its value. Without: each input is the text on
standard input and each output the text expected on standard output.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prolong_jax.verifiers import Status, Verdict, error, final_answer_text, sandbox

PROMPT_SUFFIX = "Enclose the final Python code within triple backticks: ```python ... ```."
EXAMPLE = (
    "</think>```python\nfrom collections import Counter\ndef f(x): return len(Counter(x))\n```",
    {"fn_name": "f", "inputs": [["aab"], [""]], "outputs": [2, 0]},
)

TIME_LIMIT_S = 5.0  # for all tests together, as in the recipe
REL_TOL, ABS_TOL = 1e-6, 1e-9  # where a float is expected
CACHE_SIZE = 4096
MAX_CHARS = 1_000_000  # of code

_FENCE = "```python"
_cache: dict[tuple[str, str], Verdict] = {}


def extract_code(text: str) -> str | None:
    """The code of the last block, or None if there is none."""
    start = text.rfind(_FENCE)
    if start < 0:
        return None
    return text[start + len(_FENCE) :].split("```", 1)[0].strip("\n")


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    """Score passed / all tests. `time_limit_s` in the reference replaces the default of 5 s.

    Status TIMEOUT (score 0) beyond the limit, ERROR if the tests are malformed.
    """
    problem = _problem(reference)
    if problem:
        return error(f"code: {problem}")
    code = extract_code(final_answer_text(response))
    if not code or not code.strip() or len(code) > MAX_CHARS:
        return Verdict(0.0, detail="no code block" if not code else "code empty or too long")
    key = (code, json.dumps(dict(reference), sort_keys=True))
    if key not in _cache:
        verdict = _run(code, reference)
        if verdict.status != Status.OK:
            return verdict  # may be the fault of a busy machine: not kept
        if len(_cache) >= CACHE_SIZE:
            _cache.pop(next(iter(_cache)))
        _cache[key] = verdict
    return _cache[key]


def _problem(reference: Mapping[str, Any]) -> str:
    """What is wrong with the tests, "" if nothing is."""
    inputs, outputs = reference.get("inputs"), reference.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return "expected lists of inputs and outputs in the reference"
    if not inputs or len(inputs) != len(outputs):
        return f"expected as many outputs as inputs, got {len(outputs)} and {len(inputs)}"
    if reference.get("fn_name") is not None:
        fine = all(isinstance(arguments, list) for arguments in inputs)
        return "" if fine else "expected each input to be a list of arguments"
    fine = all(isinstance(text, str) for text in inputs + outputs)
    return "" if fine else "expected texts as inputs and outputs where there is no fn_name"


def _run(code: str, reference: Mapping[str, Any]) -> Verdict:
    inputs, outputs = reference["inputs"], reference["outputs"]
    fn_name = reference.get("fn_name")
    limit_s = reference.get("time_limit_s")
    try:
        run = sandbox.run_program(
            code, inputs, fn_name, TIME_LIMIT_S if limit_s is None else limit_s
        )
    except OSError as problem:  # no process, no disk
        return error(f"code: {problem}")
    if run.timed_out:
        return Verdict(0.0, Status.TIMEOUT, "total time limit")
    if run.problem:
        return Verdict(0.0, detail=run.problem)
    same = same_value if fn_name is not None else same_text
    passed = [i in run.values and same(run.values[i], outputs[i]) for i in range(len(inputs))]
    return Verdict(sum(passed) / len(passed), detail=f"{sum(passed)} of {len(passed)} tests")


def same_value(got: Any, want: Any) -> bool:
    """Typed equality of JSON values; a float is expected to a relative 1e-6, bool is no number."""
    if isinstance(want, bool) or isinstance(got, bool) or want is None or got is None:
        return got is want
    if isinstance(want, float) and isinstance(got, (int, float)):
        return _close(got, want)
    if type(got) is not type(want):
        return False
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same_value, got, want))
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same_value(got[key], want[key]) for key in want)
    return got == want


def same_text(got: Any, want: str) -> bool:
    """Equality of printed texts, trailing white space aside; expected decimals as floats."""
    if not isinstance(got, str):
        return False
    lines, wanted = _lines(got), _lines(want)
    if lines == wanted:
        return True
    tokens, expected = [line.split() for line in lines], [line.split() for line in wanted]
    return len(tokens) == len(expected) and all(map(_same_tokens, tokens, expected))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_tokens(got: Sequence[str], want: Sequence[str]) -> bool:
    return len(got) == len(want) and all(map(_same_token, got, want))


def _same_token(got: str, want: str) -> bool:
    if got == want or "." not in want:
        return got == want
    try:
        return _close(float(got), float(want))
    except ValueError:
        return False


def _close(got: float, want: float) -> bool:
    try:
        return math.isclose(got, want, rel_tol=REL_TOL, abs_tol=ABS_TOL)
    except OverflowError:  # an integer beyond the floats
        return False
