"""Rows of public sets of programming problems to prompts; see also `formats.verl`."""

import base64
import io
import pickle
import zlib
from typing import Any

from prolong_jax.data.formats import Row, ask, loaded, tests_of, text_of
from prolong_jax.data.prompts import BadRow, Prompt
from prolong_jax.verifiers import code

MAX_TEST_BYTES = 1 << 29  # of the unpacked private tests of one problem
_PYTHON_3 = 3  # in the language fields of CodeContests


class _TextOnly(pickle.Unpickler):
    """Loads plain values; refuses everything that is looked up by name, so nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def unpack_tests(packed: str) -> str:
    """The JSON text in base64-coded, zlib-compressed, pickled private tests of LiveCodeBench.

    Raises:
      BadRow: it is something else, above all a pickle that would call anything.
    """
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), MAX_TEST_BYTES)
        text = _TextOnly(io.BytesIO(data)).load()
    except Exception as problem:  # a broken pickle raises almost anything
        raise BadRow("unreadable tests", f"{type(problem).__name__}: {problem}") from None
    if not isinstance(text, str) or not stream.eof:
        raise BadRow("unreadable tests", f"expected a text, got {type(text).__name__}")
    return text


def _problem(told: Any, starter: Any, tests: Any, source: str, solution: Any = "") -> Prompt:
    """A problem with its starter code, or with how input and output go."""
    reference, told = tests_of(tests), text_of(told)
    if isinstance(starter, str) and starter.strip():
        told += f"\n\nStart from this code:\n\n{starter}"
    if "fn_name" not in reference:
        told += "\n\nRead from standard input and print to standard output."
    return ask("code", told, reference, source, solution)


def competition(row: Row, domain: str) -> Prompt:
    """APPS and TACO: question, input_output, solutions, starter_code."""
    solution = [*loaded(row.get("solutions") or [], "solutions", list), ""][0]
    source = "taco" if "skill_types" in row else "apps"
    tests = row.get("input_output")
    return _problem(row.get("question"), row.get("starter_code"), tests, source, solution)


def code_contests(row: Row, domain: str) -> Prompt:
    """CodeContests: description; public, private and generated tests together."""
    if row.get("input_file") or row.get("output_file"):
        raise BadRow("tests through files", "standard input and output expected")
    groups = [row.get(f"{name}_tests") or {} for name in ("public", "private", "generated")]
    tests = {f"{k}s": [t for g in groups for t in g.get(k) or []] for k in ("input", "output")}
    given = row.get("solutions") or {}
    pairs = zip(given.get("language") or [], given.get("solution") or [], strict=False)
    solution = next((text for language, text in pairs if language == _PYTHON_3), "")
    return _problem(row.get("description"), "", tests, "codecontests", solution)


def live_code_bench(row: Row, domain: str) -> Prompt:
    """LiveCodeBench: question_content, starter_code, public and private tests, metadata."""
    private = row.get("private_test_cases") or []
    if isinstance(private, str) and not private.lstrip().startswith("["):
        private = unpack_tests(private)
    tests = loaded(row.get("public_test_cases") or [], "tests", list)
    tests = [*tests, *loaded(private, "tests", list)]
    pairs: dict[str, Any] = {f"{k}s": [test[k] for test in tests] for k in ("input", "output")}
    if any(test.get("testtype") == "functional" for test in tests):
        pairs["fn_name"] = loaded(row.get("metadata"), "metadata")["func_name"]
    content, starter = row.get("question_content"), row.get("starter_code")
    return _problem(content, starter, pairs, "livecodebench")


def human_eval(row: Row, domain: str) -> Prompt:
    """HumanEval and HumanEval+: prompt, entry_point, canonical_solution, test."""
    start = text_of(row.get("prompt"))
    solution = f"{start}{row.get('canonical_solution') or ''}"
    reference = _asserts(row.get("test"), row.get("entry_point"))
    return ask("code", f"Complete this program:\n\n{start}", reference, "humaneval", solution)


def mbpp(row: Row, domain: str) -> Prompt:
    """MBPP: text or prompt, code, test_list."""
    before = row.get("test_imports") or [row.get("test_setup_code")]
    tests = [line for line in [*before, *(row.get("test_list") or [])] if line]
    told = f"{text_of(row.get('text') or row.get('prompt'))}\n\nThe tests:\n\n"
    reference = _asserts("\n".join(tests), None)
    return ask("code", told + "\n".join(tests), reference, "mbpp", row.get("code"))


def _asserts(test: Any, entry_point: Any) -> dict[str, Any]:
    if not isinstance(test, str) or not test.strip():
        raise BadRow("no tests")
    try:
        return code.from_asserts(test, entry_point)
    except ValueError as problem:
        raise BadRow("unusable tests", str(problem)) from None
