"""Programs: the share of the tests that the response's Python code passes.

Extraction: the text after the last "```python" up to the next "```" (or the end) of the final
answer text. The code runs in a child process that gets the inputs, never the expected outputs; the
comparison happens here. All tests run; a syntax error, a failing import or a run beyond the total
time limit scores 0, an exception or a crash in one test fails that test alone.

Kinds of reference, all of JSON values:

- `inputs`, `outputs`: texts on standard input, and those expected on standard output.
- `fn_name`, `inputs`, `outputs`: argument lists of the function (or method of `class Solution`)
  and its values; a tuple counts as a list. `wrapped`: the only element of an output will do too.
- `expressions`, `outputs`, `setup`, `tolerance` (see `from_asserts`): the values of Python
  expressions behind the response and the setup, `spelled`, are equal, or within the tolerance
  (relative, absolute) of an expected float.
- `asserts`, `hackable`: tests that could not be taken apart run beside the response, which can
  read the expected values there or forge the outcome: for evaluation only, never for training.

Options: `time_limit_s` for all tests together (5 s, as in the recipe, arXiv 2505.24864);
`test_time_limit_s` for each (then each has a process of its own); `special_judge` where several
outputs are right: such a problem is not scored.
"""

import ast
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from prolong_jax.verifiers import Status, Verdict, error, final_answer_text, remembered, sandbox

PROMPT_SUFFIX = "Enclose the final Python code within triple backticks: ```python ... ```."
EXAMPLE = (
    "</think>```python\nfrom collections import Counter\ndef f(x): return len(Counter(x))\n```",
    {"fn_name": "f", "inputs": [["aab"], [""]], "outputs": [2, 0]},
)

TIME_LIMIT_S = 5.0  # for all tests together, as in the recipe
TOLERANCE = (1e-6, 1e-9)  # relative and absolute, where a float is expected
MAX_CHARS = 1_000_000  # of code

_FENCE = "```python"
_cache: dict[bytes, Verdict] = {}  # of code and tests


def extract_code(text: str) -> str | None:
    """The code of the last block, or None if there is none."""
    start = text.rfind(_FENCE)
    if start < 0:
        return None
    return text[start + len(_FENCE) :].split("```", 1)[0].strip("\n")


def verify(response: str, reference: Mapping[str, Any]) -> Verdict:
    """Score passed / all tests.

    Status TIMEOUT (score 0) beyond the total limit; ERROR if the tests are malformed or need a
    special judge.
    """
    problem = _problem(reference)
    if problem:
        return error(f"code: {problem}")
    code = extract_code(final_answer_text(response))
    if not code or not code.strip() or len(code) > MAX_CHARS:
        return Verdict(0.0, detail="no code block" if not code else "code empty or too long")
    return remembered(_cache, [code, dict(reference)], lambda: _score(code, reference))


def _problem(reference: Mapping[str, Any]) -> str:
    """What is wrong with the tests, "" if nothing is."""
    if reference.get("special_judge"):
        return "the problem needs a special judge"
    if isinstance(reference.get("asserts"), str):
        return ""
    inputs = reference.get("expressions", reference.get("inputs"))
    outputs = reference.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return "expected lists of inputs and outputs in the reference"
    if not inputs or len(inputs) != len(outputs):
        return f"expected as many outputs as inputs, got {len(outputs)} and {len(inputs)}"
    if reference.get("fn_name") is not None:
        fine = all(isinstance(arguments, list) for arguments in inputs)
        return "" if fine else "expected each input to be a list of arguments"
    texts = inputs if "expressions" in reference else inputs + outputs
    fine = all(isinstance(text, str) for text in texts)
    return "" if fine else "expected texts as inputs and outputs where there is no fn_name"


def _score(code: str, reference: Mapping[str, Any]) -> Verdict:
    try:
        return _judged(_run(code, reference), reference)
    except OSError as problem:  # no process, no disk
        return error(f"code: {problem}")
    except MemoryError:  # here: 4 MiB of JSON can be a hundred times as much
        return Verdict(0.0, detail="the values are too large")


def _judged(run: sandbox.ProgramRun, reference: Mapping[str, Any]) -> Verdict:
    outputs = reference.get("outputs", ["None"])  # of asserts
    if run.timed_out:
        return Verdict(0.0, Status.TIMEOUT, "total time limit")
    if run.problem:
        return Verdict(0.0, detail=run.problem)
    same = _comparison(reference)
    passed = [i in run.values and same(run.values[i], want) for i, want in enumerate(outputs)]
    return Verdict(sum(passed) / len(passed), detail=f"{sum(passed)} of {len(passed)} tests")


def _run(code: str, reference: Mapping[str, Any]) -> sandbox.ProgramRun:
    """Runs all tests in one process, or each in one of its own under a limit of its own."""
    fn_name, inputs = reference.get("fn_name"), reference.get("inputs", [])
    if "asserts" in reference or "expressions" in reference:
        code = f"{code}\n{reference.get('setup', '')}\n{_EVALUATE}"
        texts = reference.get("expressions", [reference.get("asserts")])
        mode = "exec" if "asserts" in reference else "eval"
        fn_name, inputs = "prolong_evaluate", [[text, mode] for text in texts]
    limit_s = reference.get("time_limit_s")
    limit_s = TIME_LIMIT_S if limit_s is None else limit_s
    test_limit_s = reference.get("test_time_limit_s")
    if test_limit_s is None:
        return sandbox.run_program(code, inputs, fn_name, limit_s)
    whole, end = sandbox.ProgramRun(), time.monotonic() + limit_s
    for index, one in enumerate(inputs):
        left_s = max(0.0, end - time.monotonic())
        run = sandbox.run_program(code, [one], fn_name, min(test_limit_s, left_s))
        if run.problem or (run.timed_out and left_s < test_limit_s):
            return run
        if not run.timed_out and 0 in run.values:
            whole.values[index] = run.values[0]
    return whole


def _comparison(reference: Mapping[str, Any]) -> Callable[[Any, Any], bool]:
    """How the value of a test is compared with the expected one."""
    if "asserts" in reference or "expressions" in reference:
        return partial(same_text, symmetric=True, tolerance=reference.get("tolerance", TOLERANCE))
    if reference.get("fn_name") is None:
        return same_text
    if reference.get("wrapped"):
        return lambda got, want: same_value(got, want) or same_value([got], want)
    return same_value


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


def same_text(
    got: Any, want: str, symmetric: bool = False, tolerance: Sequence[float] = TOLERANCE
) -> bool:
    """Equality of printed tokens by line; expected decimals as floats.

    Symmetric: a decimal that is given where an integer is expected equals it exactly.
    """
    if not isinstance(got, str):
        return False
    lines, wanted = ([x.split() for x in text.rstrip().split("\n")] for text in (got, want))
    if [*map(len, lines)] != [*map(len, wanted)]:
        return False
    return all(
        a == b or ("." in b and _close(a, b, tolerance)) or (symmetric and _is_integer(a, b))
        for a, b in zip(chain(*lines), chain(*wanted), strict=True)
    )


def _close(got: str | float, want: str | float, tolerance: Sequence[float] = TOLERANCE) -> bool:
    try:
        return math.isclose(float(got), float(want), rel_tol=tolerance[0], abs_tol=tolerance[1])
    except (OverflowError, ValueError):  # an integer beyond the floats; no number
        return False


def _is_integer(got: str, want: str) -> bool:
    try:
        return "." in got and float(got) == int(want)
    except ValueError:  # no number
        return False


def spelled(value: object) -> str:
    """The tokens of a value, the same for values that are equal in Python but for int and float.

    Runs here and in the child. Sets and dicts in sorted order, bool as int, every finite float with
    a dot, no white space in strings.

    Raises:
      TypeError: a value of another type.
    """
    if isinstance(value, dict):
        return f"dict( {' '.join(sorted(f'{spelled(k)} {spelled(v)}' for k, v in value.items()))} )"
    if isinstance(value, (set, frozenset)):
        return f"set( {' '.join(sorted(map(spelled, value)))} )"
    for kind in (list, tuple):
        if isinstance(value, kind):
            return f"{kind.__name__}( {' '.join(map(spelled, value))} )"
    if isinstance(value, (str, bytes)):
        return ascii(value).replace(" ", "\\x20")
    if isinstance(value, float):
        return f"{value:.17e}"
    if isinstance(value, complex):
        return f"complex( {value.real:.17e} {value.imag:.17e} )"
    if value is None or isinstance(value, int):
        return "None" if value is None else int.__repr__(value)
    raise TypeError(f"a {type(value).__name__} is no constant")


# Stands behind the response, in a namespace of its own: responses name their variables `list`.
_SOURCE = inspect.getsource(spelled) + (
    "def evaluate(text, mode): return spelled(eval(compile(text, '<test>', mode), space))\n"
)
_EVALUATE = f"""
import builtins as prolong_evaluate
prolong_space = {{"space": prolong_evaluate.globals()}}
prolong_evaluate.exec({_SOURCE!r}, prolong_space)
prolong_evaluate = prolong_space["evaluate"]
"""


def normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The reference of raw tests as Eurus-2-RL, APPS, TACO and LiveCodeBench have them.

    Args:
      raw: `inputs`, `outputs`, perhaps `fn_name`. Without it: texts or lists of lines. With it: an
        input is one JSON value per line or a list of arguments, an output a JSON text or a value;
        values that are all lists of one element (as APPS wraps them) make it `wrapped`.

    Raises:
      ValueError: what is wrong with the tests.
    """
    fn_name, inputs, outputs = (raw.get(key) for key in ("fn_name", "inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("tests: expected lists of inputs and outputs; skip the row.")
    try:
        if fn_name:
            reference = {"fn_name": str(fn_name), "inputs": [*map(_arguments, inputs)]}
            reference["outputs"] = [json.loads(x) if isinstance(x, str) else x for x in outputs]
            reference["wrapped"] = all(isinstance(x, list) and len(x) == 1 for x in outputs)
        else:
            reference = {"inputs": [*map(_text, inputs)], "outputs": [*map(_text, outputs)]}
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"tests: expected texts or JSON values, got {problem}; skip it.") from None
    if problem := _problem(reference):
        raise ValueError(f"tests: {problem}; skip the row.")
    return reference


def _text(item: Any) -> str:
    return "\n".join(item) if isinstance(item, list) else "".join([item])  # of texts only


def _arguments(item: Any) -> Any:
    lines = item.split("\n") if isinstance(item, str) else None
    return item if lines is None else [json.loads(line) for line in lines if line.strip()]


def from_asserts(test_code: str, entry_point: str | None) -> dict[str, Any]:
    """The reference of tests written as asserts (HumanEval, MBPP, EvalPlus).

    Taken apart into `expressions` where every assert is E == y, E is y, abs(E - y) < eps,
    isclose(E, y), f(x) or not f(x) with literals x and y, or where it is EvalPlus' table (`inputs`,
    `results` and a loop over `assertion`); otherwise the whole is `asserts` and `hackable`. What
    compares a thing with itself is left out.

    Args:
      test_code: asserts, or a function `check(candidate)` that has them; imports, definitions and
        assignments before the first assert are the setup.
      entry_point: the function that `check` gets; None where there is no `check`.

    Raises:
      ValueError: the source does not parse, has no assert, or `check` has no entry point.
    """
    try:
        tree = ast.parse(test_code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise ValueError(f"asserts: expected Python source, got {problem}; skip it.") from None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError("asserts: expected an assert in the tests, got none; skip the row.")
    statements = list(tree.body)
    for check in [s for s in statements if isinstance(s, ast.FunctionDef) and s.name == "check"]:
        if entry_point is None:
            raise ValueError("asserts: expected the entry point of check(), got None; name it.")
        for node in ast.walk(check):
            if isinstance(node, ast.Name) and node.id == check.args.args[0].arg:
                node.id = entry_point
        statements.remove(check)
        statements += check.body
        test_code += f"\ncheck({entry_point})\n"
    try:
        return _taken_apart(statements)
    except (ArithmeticError, RecursionError, TypeError, ValueError):
        return {"asserts": test_code, "hackable": True}


def _taken_apart(statements: list[ast.stmt]) -> dict[str, Any]:
    """The reference of expressions; TypeError or ValueError where it is not that simple."""
    tests, setup = _table(statements), []
    for statement in [] if tests else statements:
        match statement:
            case ast.Expr(ast.Constant() | ast.Name() | ast.Call(ast.Name("check"))):
                continue
            case ast.Assert(ast.Constant(True)):
                continue
            case ast.Assert(ast.Compare(a, [ast.Eq()], [b])) if ast.dump(a) == ast.dump(b):
                continue
            case ast.Assert(test):
                tests.append(_test(test))
            case (
                ast.Import() | ast.ImportFrom() | ast.Assign() | ast.FunctionDef() | ast.ClassDef()
            ):
                setup.append(ast.unparse(statement))
                if tests or any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
                    raise ValueError("changes between the asserts, or asserts further inside")
            case _:
                raise ValueError("more than asserts")
    expressions, outputs, tolerances = map(list, zip(*tests, strict=True))
    return {
        "expressions": expressions,
        "outputs": outputs,
        "setup": "\n".join(setup),
        "tolerance": [max(each) for each in zip(*tolerances, strict=True)],
    }


def _table(statements: list[ast.stmt]) -> list[tuple[str, str, Sequence[float]]]:
    """The tests of EvalPlus: inputs, results and a loop; none if it is something else."""
    match statements:
        case [
            *_,
            ast.Assign([ast.Name("inputs")], ast.List(inputs)),
            ast.Assign([ast.Name("results")], ast.List(results)),
            ast.For(body=[ast.Expr(ast.Call(ast.Name("assertion"), [call, _, atol]))]),
        ]:
            name, tolerance = ast.unparse(call).removesuffix("(*inp)"), _constant(atol)
            read = _rough if tolerance else (lambda value: value)
            calls = [f"{name}(*{ast.unparse(arguments)})" for arguments in inputs]
            wanted = [spelled(read(_constant(result))) for result in results]
            return [(*test, (1e-7, tolerance or 1e-6)) for test in zip(calls, wanted, strict=True)]
    return []


def _test(node: ast.expr) -> tuple[str, str, Sequence[float]]:
    """Expression, output, tolerance of an assert; ValueError if the child would see the output."""
    match node:
        case ast.Compare(value, [ast.Eq()], [want]):
            return ast.unparse(value), spelled(_constant(want)), TOLERANCE
        case ast.Compare(value, [ast.Is()], [ast.Constant(bool() | None as want)]):
            typed = f"[(type(value).__name__, value) for value in [{ast.unparse(value)}]]"
            return typed, spelled([(type(want).__name__, want)]), TOLERANCE
        case ast.Compare(
            ast.Call(ast.Name("abs"), [ast.BinOp(value, ast.Sub(), want)]), [ast.Lt()], [eps]
        ):
            return ast.unparse(value), spelled(_rough(_constant(want))), (0.0, _constant(eps))
        case ast.Call(ast.Attribute(attr="isclose"), [value, want], [ast.keyword("rel_tol", tol)]):
            return ast.unparse(value), spelled(_rough(_constant(want))), (_constant(tol), 0.0)
        case ast.Call(ast.Name(), arguments, []) | ast.UnaryOp(
            ast.Not(), ast.Call(ast.Name(), arguments, [])
        ):
            _ = [_constant(argument) for argument in arguments]
            negated = isinstance(node, ast.UnaryOp)
            value = node.operand if negated else node
            return f"not not {ast.unparse(value)}", spelled(not negated), TOLERANCE
    raise ValueError("not one of the known forms")


def _rough(value: Any) -> Any:
    """The value with its integers as floats, so that the tolerance holds for them."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_rough, value))
    return float(value) if type(value) is int else value


def _constant(node: ast.expr) -> Any:
    """The value of a literal, or of set(), tuple() of one; ValueError for all else."""
    match node:
        case ast.Call(ast.Name("set" | "tuple" as name), [inner], []):
            return {"set": set, "tuple": tuple}[name](ast.literal_eval(inner))
    return ast.literal_eval(node)
