"""Programs of responses: scores, comparison, and what hostile code gains (nothing)."""

import json
import os
import subprocess
import time

import pytest

from prolong_jax.verifiers import Status, Verdict, code, sandbox

INPUTS, OUTPUTS = [[1], [2], [3], [4]], [2, 4, 6, 8]


def run(body: str, inputs=None, outputs=None, **settings):
    reference = {
        "fn_name": "f",
        "inputs": INPUTS if inputs is None else inputs,
        "outputs": OUTPUTS if outputs is None else outputs,
        **settings,
    }
    return code.verify(f"<think>no</think>So:\n```python\n{body}\n```\n", reference)


def run_script(body: str, inputs: list[str], outputs: list[str], **settings):
    reference = {"inputs": inputs, "outputs": outputs, **settings}
    return code.verify(f"```python\n{body}\n```", reference)


def test_the_score_is_the_share_of_all_tests():
    assert run("def f(x): return 2 * x").score == 1.0
    assert run("def f(x): return 2 * x if x != 2 else 0").score == 0.75
    assert run("def f(x): return 4").score == 0.25
    assert run("def f(x): return None").score == 0.0
    assert run("class Solution:\n    def f(self, x): return 2 * x").score == 1.0


@pytest.mark.parametrize(
    "body",
    ["def f(x: return 2", "import no_such_module", "raise SystemExit(0)", "def g(x): return 2 * x"],
)
def test_code_that_does_not_load_scores_zero(body):
    verdict = run(body)
    assert verdict.score == 0.0 and verdict.status == Status.OK


@pytest.mark.parametrize(
    "response",
    ["def f(x): return 2 * x", "```python\n```", "<think>```python\ndef f(x): return 2*x\n```", ""],
)
def test_only_a_code_block_of_the_final_text_counts(response):
    reference = {"fn_name": "f", "inputs": INPUTS, "outputs": OUTPUTS}
    verdict = code.verify(response, reference)
    assert verdict.score == 0.0 and verdict.status == Status.OK


def test_the_last_block_counts():
    two = "```python\na\n```\n```python\nb\n```\ntext ```c\n```"
    assert code.extract_code(two) == "b"
    assert code.extract_code("```python\nopen end") == "open end"


@pytest.mark.parametrize(
    "fault",
    [
        "raise ValueError",
        "raise SystemExit(0)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "return f(x)",
        "raise KeyboardInterrupt",
        "return object()",
        "b = [0] * 10**10",
        "return 'x' * 10**8",
    ],
)
def test_a_fault_in_one_test_fails_that_test_alone(fault):
    verdict = run(f"def f(x):\n    if x == 2:\n        {fault}\n    return 2 * x")
    assert verdict.score == 0.75 and verdict.status == Status.OK, verdict


def test_an_endless_loop_is_a_timeout_and_leaves_nothing():
    marker = "1234.5678"
    body = "import subprocess\ndef f(x):\n    while True:\n"
    body += f"        try: subprocess.Popen(['sleep', '{marker}']).wait()\n"
    body += "        except OSError: pass\n"  # where the sandbox has no such program
    verdict = run(body, time_limit_s=1.0)
    assert verdict == Verdict(0.0, Status.TIMEOUT, "total time limit")
    end = time.monotonic() + 60.0
    while (
        marker
        in subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    ):
        assert time.monotonic() < end  # it was killed before, but may take its time to go
        time.sleep(0.02)


def test_a_hung_import_is_a_timeout_too():
    verdict = run("import time\ntime.sleep(60)", time_limit_s=0.5)
    assert verdict.status == Status.TIMEOUT


def test_equality_overrides_gain_nothing():
    forged = "class L(list):\n    __eq__ = lambda s, o: True\n    __len__ = lambda s: 4\n"
    assert run(forged + "def f(x): return L([1])", outputs=[[0]] * 4).score == 0.0
    forged = "class I(int):\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: '2'\n"
    assert run(forged + "def f(x): return I(99)").score == 0.0
    assert run("class L(list): pass\ndef f(x): return L([x])", outputs=[[1]] * 4).score == 0.25


def test_printing_gains_nothing():
    body = "import sys, os\n"
    body += "for fd in range(3, 20):\n    try: os.write(fd, b'0 2\\n1 4\\nE \\n')\n"
    body += "    except OSError: pass\nprint('0 2', flush=True)\ndef f(x): print(2); return 0"
    assert run(body).score == 0.0


def test_expected_outputs_never_reach_the_child():
    """The program looks through all that its process holds for the expected output."""
    secret = "expected-output-734921"
    body = (
        "import gc, sys\n"
        "def f(x):\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame:\n"
        "        seen += [repr(frame.f_locals), repr(frame.f_globals)]\n"
        "        frame = frame.f_back\n"
        "    seen += [repr(o)[:10000] for o in gc.get_objects() if isinstance(o, (dict, list))]\n"
        "    try: seen.append(open('/proc/self/cmdline').read())\n"
        "    except OSError: pass\n"
        "    whole = ' '.join(seen)\n"
        "    part = 'output-7349'\n"
        "    at = whole.replace(part + \"'\", '').find('expected-' + part)\n"
        "    return whole[at:at + 22] if at >= 0 else 'not found'\n"
    )
    verdict = run(body, inputs=[[1], [2]], outputs=[secret, "not found"])
    assert verdict.score == 0.5, verdict


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("PROLONG_SECRET_TOKEN", "hush")
    body = "import os\ndef f(x): return [os.environ.get('PROLONG_SECRET_TOKEN'), len(os.listdir())]"
    assert run(body, inputs=[[1]], outputs=[[None, 0]]).score == 1.0
    names = "import os\ndef f(x): return sorted(set(os.environ) - {'LC_CTYPE'})"
    assert run(names, inputs=[[1]], outputs=[[]]).score == 1.0


def test_what_a_program_writes_is_never_our_error(monkeypatch):
    def with_memory_used_up(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sandbox.json, "loads", with_memory_used_up)
        assert run("def f(x): return [[]] * 9").status == Status.OK
    name = "type('E' * (1 << 20), (ValueError,), {})"
    verdict = run(f"raise {name}")
    assert verdict.score == 0.0 and verdict.status == Status.OK and len(verdict.detail) < 200


def test_reading_values_counts_as_time(monkeypatch):
    """4 MiB of small lists take a second: 40 of them would outlast the pool's limit."""
    read = []
    monkeypatch.setattr(sandbox.json, "loads", lambda text: (time.sleep(0.3), read.append(text)))
    verdict = run("def f(x): return 0", [[x] for x in range(40)], [0] * 40, time_limit_s=1.0)
    assert verdict.status == Status.TIMEOUT and len(read) <= 4


def test_memory_and_answers_are_bounded():
    body = "def f(x):\n    b = bytearray(4 << 30)\n    return 2 * x"
    assert run(body).score == 0.0
    flood = "def f(x): return 'x' * (100 << 20)"
    assert run(flood, time_limit_s=3.0).score == 0.0


@pytest.mark.parametrize(
    "got, want, same",
    [
        (1, 1, True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        (1.0, 1, False),
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (float("nan"), 0.3, False),
        ("1", 1, False),
        (None, None, True),
        (0, None, False),
        ([1, [2.0, "a"]], [1, [2.0, "a"]], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        (10**400, 1.0, False),
    ],
)
def test_values_are_compared_by_type(got, want, same):
    assert code.same_value(got, want) is same


def test_values_of_all_kinds_come_back():
    values = [None, True, -7, 10**30, 1.5, 'é\n"\\\ud800', [1, [2]], {"a": [None], "3": 1.0}]
    body = "def f(x): return x"
    assert run(body, inputs=[[v] for v in values], outputs=values).score == 1.0
    body = "def f(x): return (1, (2, 3)), {3: 'a'}"
    assert run(body, inputs=[[1]], outputs=[[[1, [2, 3]], {"3": "a"}]]).score == 1.0


def test_scripts_read_and_print():
    tests = (["3\n1 2 3\n", "1\n5\n"], ["6\n", "5"])
    body = "n = int(input())\nprint(sum(map(int, input().split())))"
    assert run_script(body, *tests).score == 1.0
    body = "import sys\nd = sys.stdin.buffer.read().split()\nprint(sum(map(int, d[1:])), ' ')"
    assert run_script(body, *tests).score == 1.0
    body = "import os\nd = os.read(0, 99).split()\nos.write(1, b'%d' % sum(map(int, d[1:])))"
    assert run_script(body, *tests).score == 1.0
    body = "def main():\n    print(6)\nif __name__ == '__main__':\n    main()\n    exit(0)"
    assert run_script(body, *tests).score == 0.5
    assert run_script("print(6)\nraise ValueError", *tests).score == 0.0
    body = "import threading\nthreading.Thread(target=lambda: print(6)).start()"
    if os.geteuid() == 0:  # other uids may have used up their processes
        assert run_script(body, *tests).score == 0.5


@pytest.mark.parametrize(
    "got, want, same",
    [
        ("a \nb\n\n", "a\nb", True),
        ("a b", "a  b", True),
        ("0.33333333", "0.333333333", True),
        ("0.34", "0.33", False),
        ("3.0", "3", False),
        ("3", "3.0", True),
        ("a\nb", "a b", False),
        ("", "a", False),
        ("nan", "0.5", False),
    ],
)
def test_printed_texts_are_compared_by_token(got, want, same):
    assert code.same_text(got, want) is same


@pytest.mark.parametrize(
    "reference",
    [
        {},
        {"inputs": [], "outputs": [], "fn_name": "f"},
        {"inputs": [[1]], "outputs": [1, 2], "fn_name": "f"},
        {"inputs": [1], "outputs": [1], "fn_name": "f"},
        {"inputs": [[1]], "outputs": [1]},
    ],
)
def test_malformed_tests_are_our_error(reference):
    assert code.verify("```python\ndef f(x): return x\n```", reference).status == Status.ERROR


def test_equal_code_runs_once(monkeypatch):
    body = "def f(x): return 2 * x  # run once"
    assert run(body).score == 1.0
    monkeypatch.setattr(sandbox, "run_program", None)
    assert run(body).score == 1.0
    with pytest.raises(TypeError):
        run(body + ", not this")


def test_a_limit_on_each_test_fails_that_test_alone():
    hang = "def f(x):\n    while x == 2: pass\n    return 2 * x"
    verdict = run(hang, test_time_limit_s=0.5)
    assert verdict.score == 0.75 and verdict.status == Status.OK
    script = ("x = input()\nwhile x == '2': pass\nprint(1)", ["2", "1"], ["1", "1"])
    assert run_script(*script, test_time_limit_s=0.5).score == 0.5
    verdict = run_script(*script, time_limit_s=0.5)
    assert verdict.status == Status.TIMEOUT and verdict.score == 0.0
    start = time.monotonic()
    verdict = run("while True: pass", test_time_limit_s=60.0, time_limit_s=0.9)
    assert time.monotonic() - start < 30.0
    assert verdict.status == Status.TIMEOUT and verdict.score == 0.0


def test_special_judge_problems_are_not_scored():
    verdict = run("def f(x): return 2 * x", special_judge=True)
    assert verdict.status == Status.ERROR and "special judge" in verdict.detail
    assert run("def f(x): return 2 * x", special_judge=False).score == 1.0


def test_wrapped_outputs_may_be_the_value_itself():
    wrapped = [[2], [4], [6], [8]]
    for body in ("def f(x): return 2 * x", "def f(x): return [2 * x]"):
        assert run(body, outputs=wrapped, wrapped=True).score == 1.0
    assert run("def f(x): return 2 * x", outputs=wrapped).score == 0.0
    assert run("def f(x): return x", outputs=wrapped, wrapped=True).score == 0.0
    assert run("def f(x): return [x, x]", outputs=[[x, x] for x in (1, 2, 3, 4)]).score == 1.0


@pytest.mark.parametrize(
    "raw, reference",
    [
        ({"inputs": ["1\n"], "outputs": ["2"]}, {"inputs": ["1\n"], "outputs": ["2"]}),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, {"inputs": ["1\n2"], "outputs": ["3"]}),
        (
            {"fn_name": "f", "inputs": ['[1, 2]\n"a"\n'], "outputs": ["[true]"]},
            {"fn_name": "f", "inputs": [[[1, 2], "a"]], "outputs": [[True]], "wrapped": False},
        ),
        (
            {"fn_name": "f", "inputs": [[1], []], "outputs": [[True], [False]]},
            {"fn_name": "f", "inputs": [[1], []], "outputs": [[True], [False]], "wrapped": True},
        ),
        (
            {"fn_name": "", "inputs": ["é"], "outputs": [""], "other": 1},
            {"inputs": ["é"], "outputs": [""]},
        ),
    ],
)
def test_raw_tests_become_references(raw, reference):
    assert code.normalise(raw) == reference


@pytest.mark.parametrize(
    "raw, problem",
    [
        ({}, "lists of inputs"),
        ({"inputs": None, "outputs": ["1"]}, "lists of inputs"),
        ({"inputs": [], "outputs": []}, "as many outputs"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "as many outputs"),
        ({"inputs": [1.0], "outputs": ["1"]}, "texts"),
        ({"inputs": [["1", 2]], "outputs": ["1"]}, "texts"),
        ({"fn_name": "f", "inputs": ["[1"], "outputs": ["1"]}, "JSON"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["["]}, "JSON"),
        ({"fn_name": "f", "inputs": [3], "outputs": ["1"]}, "list of arguments"),
        ({"fn_name": "f", "inputs": ["[" * 100_000], "outputs": ["1"]}, "JSON"),
    ],
)
def test_raw_tests_that_cannot_be_used_are_refused(raw, problem):
    with pytest.raises(ValueError, match=problem):
        code.normalise(raw)


def check(asserts: str, body: str, entry_point: str | None = None):
    reference = json.loads(json.dumps(code.from_asserts(asserts, entry_point)))
    assert "hackable" not in reference, reference
    return code.verify(f"```python\n{body}\n```", reference)


@pytest.mark.parametrize(
    "test, right, wrong",
    [
        ("f((1, 2)) == (1, 2)", "x", "list(x)"),
        ("f((1, 2)) == [1, 2]", "list(x)", "x"),
        ("f([2, 1, 3]) == {3, 1, 2}", "set(x)", "x"),
        ("set(f([2, 1])) == set([1, 2])", "x", "[1]"),
        ("f({1: 'a', (2,): None}) == {(2,): None, 1: 'a'}", "x", "{'1': 'a', (2,): None}"),
        ("f(1) == {'a': 1}", "__import__('collections').Counter('a')", "{'a': 2}"),
        ("f(1) == 2", "2.0", "3"),
        ("f(1) == 2", "2 * x", "2 + 1e-9"),
        ("f(1) == 2880067194370816120", "2880067194370816120", "2880067194370816120 * (1 + 3e-7)"),
        ("f(1) == [100000000000000000001]", "[10**20 + 1]", "[1e20]"),
        ("f(1) == True", "1", "2"),
        ("f(1) == 0.3", "0.1 + 0.2", "0.301"),
        ("f(1) == 1e-07", "1.00000001e-07", "2e-07"),
        ("f(1) == 1e16", "10**16", "2 * 10**16"),
        ("f('bcade') == {'a', 'b', 'c', 'd', 'e'}", "set(x)", "set(x[1:])"),
        ("f(1) == 1 + 2j", "1 + 2j", "1 + 3j"),
        ("f(1) == b'a b'", "b'a b'", "'a b'"),
        ("f(1) == 'a  b'", "'a  b'", "'a b'"),
        ("f(1) == '1.5'", "'1.5'", "1.5"),
        ("f(1) == 'x 1.50'", "'x 1.50'", "'x 1.5'"),
        ("f(1) == ')'", "')'", "''"),
        ("f(1) == 10**20", None, None),
        ("f(1) == 100000000000000000001", "10**20 + 1", "10**20"),
        ("f(1) is True", "True", "1"),
        ("f(1) is None", "None", "0"),
        ("f(1)", "[0]", "[]"),
        ("not f(1)", "''", "'a'"),
        ("abs(f(1) - 3.14) < 0.01", "3.1416", "3.2"),
        ("abs(f(1) - 3) < 1e-3", "3.0001", "3.01"),
        ("abs(f(1) - 3) < 1e-3", "3", "4"),
        ("math.isclose(f(1), 100, rel_tol=0.01)", "100.5", "102"),
        (f"abs(f(1) - {10**400}) < 1e-3", None, None),
        ("math.isclose(f(1), 100.0, rel_tol=0.01)", "100.5", "102"),
        ("f(1) == []", "[]", "()"),
        ("f(1) == float('nan')", None, None),
        ("f(f(1)) == f(1)", None, None),
        ("f(1) == g(1)", None, None),
        ("f(1) in (1, 2)", None, None),
        ("same(f(1), 2)", None, None),
        ("f(1) == 1 and f(2) == 2", None, None),
    ],
)
def test_asserts_are_taken_apart(test, right, wrong):
    if right is None:
        reference = code.from_asserts(f"assert {test}", None)
        assert reference == {"asserts": f"assert {test}", "hackable": True}
        return
    assert check(f"assert {test}", f"def f(x): return {right}").score == 1.0
    verdict = check(f"assert {test}", f"def f(x): return {wrong}")
    assert verdict.score == 0.0 and verdict.status == Status.OK


def test_the_widest_tolerance_counts_for_all_asserts():
    tests = "assert f(1) == 1.0\nassert abs(f(2) - 2.0) < 0.1"
    assert check(tests, "def f(x): return x + (x > 1) * 0.05").score == 1.0
    assert check(tests, "def f(x): return x + (x > 1) * 0.15").score == 0.5


def test_a_check_function_and_its_setup():
    tests = (
        "import math\nMETADATA = {'a': 1}\ndef twice(x): return 2 * x\n\ndef check(candidate):\n"
    )
    tests += (
        "    '''Doc'''\n    low = [1, 2]\n    assert candidate(low) == 3, 'message'\n    print\n"
    )
    tests += "    assert True\n    assert candidate([twice(4)]) == 8\n    assert f(low) == candidate(low)"
    assert check(tests, "def f(x): return sum(x)", "f").score == 1.0
    assert check(tests, "def f(x): return 3", "f").score == 0.5  # of two: one checks itself
    assert check(tests, "def g(x): return sum(x)", "f").score == 0.0
    with pytest.raises(ValueError, match="entry point"):
        code.from_asserts(tests, None)
    late = "def check(f):\n    assert f(1) == 1\n    x = 2\n    assert f(x) == 2\n"
    assert "hackable" in code.from_asserts(late, "f")


@pytest.mark.parametrize("source", ["assert f(1) ==", "x = 1", "", "assert 1\0", "(" * 10_000])
def test_tests_that_are_none_are_refused(source):
    with pytest.raises(ValueError, match="asserts: expected"):
        code.from_asserts(source, None)


def test_a_table_of_inputs_and_results():
    tests = "import numpy as np\ndef assertion(out, exp, atol):\n    assert out == exp\n"
    tests += "def check(candidate):\n    inputs = [[1, 2], [3, 4.0]]\n    results = [3, 7.0]\n"
    tests += "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
    tests += "        assertion(candidate(*inp), exp, 0)\n"
    assert check(tests, "def add(x, y): return x + y", "add").score == 1.0
    assert check(tests, "def add(x, y): return x + y + (x > 1) * 1e-7", "add").score == 1.0
    assert check(tests, "def add(x, y): return x + y + (x > 1) * 1e-3", "add").score == 0.5
    loose = check(tests.replace("exp, 0)", "exp, 0.1)"), "def add(x, y): return x + y + .01", "add")
    assert loose.score == 1.0


def test_names_of_the_response_do_not_disturb_expressions():
    names = ["list", "str", "isinstance", "ascii", "eval", "compile", "globals", "map", "exec"]
    body = "".join(f"{name} = 1\n" for name in names) + "def f(x): return [x, 'a']"
    assert check("assert f(1) == [1, 'a']", body).score == 1.0


def test_expected_values_of_asserts_never_reach_the_child():
    body = "import sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
    body += "        seen += repr(frame.f_locals) + repr(frame.f_globals)\n"
    body += "        frame = frame.f_back\n    return 'secret-' + '4711' in seen"
    tests = "assert f('secret') == 'secret-4711'\nassert f('secret') is False"
    assert check(tests, body).score == 0.5
    asserts = code.from_asserts("assert f(1) in ('secret-4711', True)", None)
    assert code.verify(f"```python\n{body}\n```", asserts).score == 1.0  # hackable indeed


def test_asserts_that_cannot_be_taken_apart_run_beside_the_code():
    tests = "def check(g):\n    for x in range(9):\n        assert g(x) == 2 * x\n"
    reference = code.from_asserts(tests, "f")
    assert reference["hackable"] and "check(f)" in reference["asserts"]
    for body, score in [("return 2 * x", 1.0), ("return x", 0.0), ("raise ValueError", 0.0)]:
        assert code.verify(f"```python\ndef f(x): {body}\n```", reference).score == score
    hang = code.verify(
        "```python\ndef f(x):\n  while 1: pass\n```", {**reference, "time_limit_s": 0.5}
    )
    assert hang.status == Status.TIMEOUT


@pytest.mark.parametrize("forged", ["None", "7", "'list('", "'1.5.2'", "'nan'", "[1]", "'[' * 99"])
def test_what_the_child_sends_instead_of_tokens_scores_zero(forged):
    body = "import builtins\nold = builtins.exec\ndef f(x): return 1\ndef forge(source, space):\n"
    body += f"    space['evaluate'] = lambda text, mode: {forged}\nbuiltins.exec = forge"
    verdict = check("assert f(1) == [1.5]", body)
    assert verdict.score == 0.0 and verdict.status == Status.OK


def test_a_forged_constant_does_not_pass_asserts_of_both_signs():
    """The child sees neither `not` nor what is expected of an assert without a comparison."""
    tests = "".join(f"assert {'not ' * (x % 2)}f({x})\n" for x in range(8))
    assert check(tests, "def f(x): return x % 2 == 0").score == 1.0
    for forged in ("'0'", "'1'", "str(int('not' not in text.replace('not not ', '', 1)))"):
        body = "import builtins\ndef f(x): return 1\ndef forge(source, space):\n"
        body += f"    space['evaluate'] = lambda text, mode: {forged}\nbuiltins.exec = forge"
        assert check(tests, body).score == 0.5


@pytest.mark.parametrize(
    "body",
    [
        "import sys\nprint(int(input()) + 1)\nsys.stdout.close()",
        "out = open(1, 'w')\nout.write(str(int(input()) + 1))",
        "import os\nprint(int(input()) + 1, flush=True)\nos._exit(0)",
        "import sys\nsys.__stdout__.write(str(int(input()) + 1))",
        "import atexit\nx = int(input())\natexit.register(lambda: print(x + 1))",
        "import builtins\nbuiltins.n = getattr(builtins, 'n', 0) + 1\nprint(int(input()) + builtins.n)",
        "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nprint(int(input()) + 1)\n"
        "old.write(sys.stdout.getvalue())",
        "import threading, time\nx = int(input())\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print(x + 1))).start()",
    ],
)
def test_a_script_ends_as_an_interpreter_would(body):
    assert run_script(body, ["1", "2", "3"], ["2", "3", "4"]).score == 1.0


def test_what_a_failing_script_printed_stays_in_its_test():
    body = "x = int(input())\nif x == 2:\n    print('junk')\n    raise ValueError\nprint(x)"
    verdict = run_script(body, ["1", "2", "3"], ["1", "2", "3"])
    assert verdict.detail == "2 of 3 tests"


def test_much_output_in_many_tests_loses_none():
    body = "x = int(input())\nprint('a' * (3 << 20) if x else 0)"
    inputs, outputs = [*"1" * 12, "0"], ["a" * (3 << 20)] * 12 + ["0"]
    assert run_script(body, inputs, outputs, time_limit_s=60.0).detail == "13 of 13 tests"
