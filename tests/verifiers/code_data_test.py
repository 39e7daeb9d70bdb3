"""Programs of real data sets: gold passes, mutants of it do not, labels of others agree.

The data comes from the folder that PROLONG_TEST_DATA names (humaneval, mbpp, evalplus, nemo_gym and
taco, each with the files of the public release). A few problems run by default, all with `slow`.
"""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from prolong_jax.verifiers import Status, Verdict, code, sandbox

DATA = os.environ.get("PROLONG_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="needs PROLONG_TEST_DATA")

SAMPLE = pytest.param(13, id="sample")  # one row in 13
WHOLE = pytest.param(1, id="whole", marks=pytest.mark.slow)

# Their tests draw random inputs, compute what they expect or loop.
HACKABLE = {f"HumanEval/{number}" for number in (4, 8, 32, 38, 44, 50, 53, 151)}
HACKABLE |= {"mbpp/596", "sanitized/596", "sanitized/803"}


def rows(path: str) -> list[dict]:
    content = (Path(DATA or "") / path).read_bytes()
    content = gzip.decompress(content) if path.endswith(".gz") else content
    text = content.decode()
    return json.loads(text) if path.endswith(".json") else [*map(json.loads, text.split("\n")[:-1])]


def human_eval() -> dict[str, tuple[str, str, str]]:
    """Program, entry point and tests by id."""
    return {
        row["task_id"]: (row["prompt"] + row["canonical_solution"], row["entry_point"], row["test"])
        for row in rows("humaneval/HumanEval.jsonl.gz")
    }


def mbpp() -> dict[str, tuple[str, None, str]]:
    found = {}
    for name, path in (("mbpp", "mbpp.jsonl"), ("sanitized", "sanitized-mbpp.json")):
        for row in rows(f"mbpp/{path}"):
            setup = row["test_imports"] if name == "sanitized" else [row["test_setup_code"]]
            tests = "\n".join([*setup, *row["test_list"], *row.get("challenge_test_list", [])])
            program = row["code"].replace("\r", "")
            found[f"{name}/{row['task_id']}"] = program, None, tests.replace("\r", "")
    return found


def verify(program: str, reference: dict, limit_s: float = 60.0) -> Verdict:
    reference = json.loads(json.dumps(reference | {"time_limit_s": limit_s}))
    return code.verify(f"```python\n{program}\n```", reference)


@pytest.mark.parametrize("problems", [human_eval, mbpp])
def test_only_the_known_problems_are_hackable(problems):
    found = {
        name
        for name, (_, entry_point, tests) in problems().items()
        if "hackable" in code.from_asserts(tests, entry_point)
    }
    assert found == HACKABLE & problems().keys()


@pytest.mark.parametrize("every", [SAMPLE, WHOLE])
@pytest.mark.parametrize("problems", [human_eval, mbpp])
def test_gold_programs_score_one(problems, every):
    every *= 1 if problems is human_eval or every == 1 else 8
    failed = {}
    for name, (program, entry_point, tests) in list(problems().items())[::every]:
        verdict = verify(program, code.from_asserts(tests, entry_point))
        if verdict.score != 1.0:
            failed[name] = verdict
    assert not failed


NEXT = """
def next_to(value):
    if isinstance(value, bool) or value is None: return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, dict): return {**value, "one": 1}
    return value[:-1] if value else {str: " ", list: [0], tuple: (0,)}[type(value)]
"""


class Returns(ast.NodeTransformer):
    """Returns something else; in nested functions nothing changes."""

    def __init__(self, text: str):
        self.text = text

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        return ast.parse(
            "return " + self.text.format(ast.unparse(node.value or ast.Constant(None)))
        ).body[0]


def mutants(program: str, entry_point: str) -> dict[str, str]:
    """The program with one fault in its entry point, by the kind of fault."""
    changes = {"off by one": "next_to({})", "wrong return": "None", "wrong type": "[{}]"}
    found = {}
    for kind, text in (changes | {"infinite loop": "{}"}).items():
        tree = ast.parse(program)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        entry = [node for node in functions if node.name == entry_point][-1]
        entry.body = [Returns(text).visit(statement) for statement in entry.body]
        if kind == "infinite loop":
            entry.body.insert(0, ast.parse("while True: pass").body[0])
        found[kind] = ast.unparse(ast.fix_missing_locations(tree)) + NEXT
    return found


@pytest.mark.parametrize("every", [SAMPLE, WHOLE])
def test_mutants_of_gold_programs_score_below_one(every):
    """Also where the tests are hackable: the mutants do not try to."""
    scored, survivors = 0, []
    for name, (program, entry_point, tests) in list(human_eval().items())[::every]:
        reference = code.from_asserts(tests, entry_point)
        for kind, changed in mutants(program, entry_point).items():
            loop = kind == "infinite loop"
            verdict = verify(changed, reference, 0.3 if loop else 60.0)
            survivors += [(name, kind, verdict)] if verdict.score == 1.0 else []
            assert verdict.status == (Status.TIMEOUT if loop else Status.OK), (name, kind, verdict)
            scored += 1
    assert not survivors and scored == 4 * len(range(0, 164, every))


def plus_table(row: dict) -> str:
    """The tests of a row of EvalPlus as its release with a `test` field writes them."""
    inputs = row["base_input"] + row["plus_input"]
    program = row["prompt"] + row["canonical_solution"]
    program += f"\ndef shown(arguments): return repr({row['entry_point']}(*eval(arguments)))"
    run = sandbox.run_program(program, [[repr(given)] for given in inputs], "shown", 60.0)
    results = ", ".join(run.values[index] for index in range(len(inputs)))
    return (
        "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert out == exp\n\n"
        f"def check(candidate):\n    inputs = {inputs!r}\n    results = [{results}]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        f"        assertion(candidate(*inp), exp, {row['atol']})\n"
    )


# Their own solutions do not give every value in time (15), in 4 MiB (130) or in 4,300 digits.
WITHOUT_TABLE = {f"HumanEval/{number}" for number in (15, 83, 100, 130, 139)}


@pytest.mark.parametrize("every", [SAMPLE, WHOLE])
def test_evalplus_tables_accept_gold_and_no_mutant(every):
    wrong = []
    for row in rows("evalplus/HumanEvalPlus-Mini.jsonl.gz")[:: every * (1 if every == 1 else 3)]:
        name, entry_point = row["task_id"], row["entry_point"]
        if name in WITHOUT_TABLE:
            continue
        reference = code.from_asserts(plus_table(row), entry_point)
        assert len(reference["outputs"]) == len(row["base_input"] + row["plus_input"])
        gold = row["prompt"] + row["canonical_solution"]
        for kind, program in {"gold": gold, **mutants(gold, entry_point)}.items():
            if kind != "infinite loop":
                verdict = verify(program, reference)
                wrong += [(name, kind, verdict)] if (verdict.score == 1) != (kind == "gold") else []
    assert not wrong


def test_labelled_rollouts_agree():
    """Real responses with the reward (all tests or nothing) that another verifier gave them."""
    tests = {
        row["responses_create_params"]["input"][0]["content"]: row["verifier_metadata"]
        for row in rows("nemo_gym/code_gen__example.jsonl")
    }
    rewards = []
    for row in rows("nemo_gym/code_gen__example_rollouts.jsonl"):
        reference = code.normalise(
            tests[row["responses_create_params"]["input"][0]["content"]]["unit_tests"]
        )
        parts = [part for item in row["response"]["output"] for part in item.get("content") or []]
        text = "".join(part["text"] for part in parts)
        verdict = code.verify(text, reference | {"time_limit_s": 60.0})
        assert verdict.status == Status.OK
        assert (verdict.score == 1.0) == (row["reward"] == 1.0), (verdict, row["metadata"])
        rewards.append(row["reward"])
    assert sorted(rewards) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_problems_that_need_a_judge_are_not_scored():
    flags = [row["special_judge"] for row in rows("taco/output_spj.jsonl")]
    tests = {"inputs": ["1\n"], "outputs": ["1\n"]}
    verdicts = [code.verify("", {**tests, "special_judge": flag}) for flag in flags]
    assert [verdict.status == Status.ERROR for verdict in verdicts] == flags
    assert sum(flags) == 218
