r"""Rows of public data sets to prompts: one function per schema, row -> Prompt or BadRow.

A format is told the domain that the settings give to the source, "" for none. The prompt suffix of
the recipe (arXiv 2505.24864, appendix D) is added, to a chat unless it has the same mark-up.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prolong_jax.data.prompts import BadRow, Prompt
from prolong_jax.verifiers import VERIFIERS, Status, code, instruct, logic, math, stem

Row = Mapping[str, Any]

# domain: the suffix, and what a chat contains that has such a request already
_SUFFIXES = {
    "math": (" " + math.PROMPT_SUFFIX, r"\boxed"),
    "stem": (" " + stem.PROMPT_SUFFIX, r"\boxed"),
    "code": ("\n\n" + code.PROMPT_SUFFIX, "```python"),
    "logic": (" " + logic.PROMPT_SUFFIX, "<answer>"),
    "instruct": ("", ""),
}
EURUS_CODE = ("apps", "codecontests", "codeforces", "taco")
_DOMAIN_WORDS = {  # of ability and data_source in verl rows
    "math": "math mathematics deepscaler numina aime amc minerva olympiad_bench gsm8k",
    "code": f"code coding {' '.join(EURUS_CODE)}",
    "stem": "stem science physics chemistry biology scp116k scp-116k gpqa",
    "instruct": "instruct instruction_following if_eval ifeval",
}
_DOMAIN_OF = {word: domain for domain, words in _DOMAIN_WORDS.items() for word in words.split()}
_ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "extracted_answer")


def ask(domain: str, prompt: Any, reference: Row, source: Any = "", solution: Any = "") -> Prompt:
    """A prompt record without id: a text or chat messages, with the suffix of its domain."""
    is_chat = isinstance(prompt, list | tuple) and any(isinstance(t, Mapping) for t in prompt)
    turns = prompt if is_chat else [{"role": "user", "content": prompt}]
    if not all(isinstance(t, Mapping) and {"role", "content"} <= t.keys() for t in turns):
        raise BadRow("no prompt", f"{str(prompt)[:80]!r} is no text and no chat")
    messages = [{"role": str(t["role"]), "content": text_of(t["content"])} for t in turns]
    suffix, mark = _SUFFIXES[domain]
    if (mark if is_chat else suffix) not in messages[-1]["content"]:
        messages[-1]["content"] += suffix
    solution = solution if isinstance(solution, str) else ""
    return Prompt("", domain, "", domain, tuple(messages), reference, str(source or ""), solution)


def text_of(value: Any) -> str:
    """A text that tokenizers accept; lists of texts or of {"text"} parts are joined by line."""
    if isinstance(value, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        value = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(value, str) or not value.strip():
        raise BadRow("no prompt", f"{str(value)[:80]!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow("text is not Unicode", "it holds half of a surrogate pair")
    return value


def answer_of(value: Any) -> str:
    r"""A gold answer as text: of a list of one, of a whole float, out of its box or `$...$`."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple) and value:
        raise BadRow("several answers", str(value)[:80])
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("no answer", f"{value!r}")
    text = str(whole(value)).rpartition("\n#### ")[2].strip()
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
        inner = text.removeprefix(left).removesuffix(right)
        if len(inner) == len(text) - len(left) - len(right) and left not in inner:
            text = inner.strip()
    if text.startswith(r"\boxed") and text.endswith("}"):
        text = math.last_boxed(text) or text
    if text.lower() in ("", "none", "nan", "null", "n/a"):
        raise BadRow("no answer", f"{value!r}")
    if problem := math.refusal(text):
        raise BadRow("unparsable gold", problem)
    if math.last_boxed(rf"\boxed{{{text}}}") != text:
        raise BadRow("unparsable gold", f"braces do not match in {text[:80]!r}")
    return text


def whole(value: Any) -> Any:
    """Whole floats as integers, all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def loaded(value: Any, what: str, kind: Any = dict) -> Any:
    """The dict (or what `kind` names), out of its JSON text where it is one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as problem:
        raise BadRow(f"unreadable {what}", str(problem)) from None
    if not isinstance(found, kind):
        raise BadRow(f"unreadable {what}", f"{str(found)[:80]!r} is of another kind")
    return found


def tests_of(value: Any) -> dict[str, Any]:
    """The code verifier's reference of {"inputs", "outputs", "fn_name"?} or its JSON text."""
    tests = loaded(value or {}, "tests")
    if not tests.get("inputs"):
        raise BadRow("no tests")
    try:
        return code.normalise(tests)
    except ValueError as problem:
        raise BadRow("unusable tests", str(problem)) from None


def instructions_of(given: Row) -> dict[str, Any]:
    """The instruct verifier's reference; nulls are left out, whole floats become integers."""
    ids, kwargs = given.get("instruction_id_list"), given.get("kwargs")
    kwargs = given.get("instruction_kwargs") if kwargs is None else kwargs
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise BadRow("no instructions", f"{str(ids)[:80]!r}")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise BadRow("as many arguments as instructions expected", f"{str(kwargs)[:80]!r}")
    if unknown := instruct.unknown_ids(given):
        raise BadRow("instructions without a checker", ", ".join(unknown))
    filled = [{k: whole(v) for k, v in (a or {}).items() if v is not None} for a in kwargs]
    mode = "all" if given.get("grading_mode", given.get("mode")) in ("binary", "all") else "mean"
    reference = {"instruction_id_list": ids, "kwargs": filled, "mode": mode}
    verdict = instruct.verify("", reference)
    if verdict.status == Status.ERROR:
        raise BadRow("unusable arguments of instructions", verdict.detail)
    return reference


def entry_of(task: Any, entry: Row) -> dict[str, Any]:
    """The logic verifier's reference; the answer of some tasks is None, for there are many."""
    if not isinstance(task, str) or not {"answer", "metadata"} <= entry.keys():
        raise BadRow("no reasoning_gym entry", f"task {task!r}, fields {', '.join(entry)}")
    return {"task": task, "entry": dict(entry)}


# --- formats -------------------------------------------------------------------------------------


def question_answer(row: Row, domain: str) -> Prompt:
    """DeepScaleR, MATH, AIME, AMC, Minerva, OlympiadBench, GSM8K: a problem and a short answer.

    Where there is no field for the answer, it is the last box of the solution.
    """
    problem = next((row[k] for k in ("problem", "question", "prompt") if k in row), None)
    given = [row[name] for name in _ANSWERS if name in row]
    if not given and "solution" not in row:
        raise BadRow("no answer", f"no {', '.join(_ANSWERS)} or solution in {', '.join(row)}"[:200])
    answer = answer_of(given[0] if given else math.last_boxed(str(row.get("solution"))))
    return ask(domain if domain == "stem" else "math", problem, {"answer": answer})


def verl(row: Row, domain: str) -> Prompt:
    """verl rows: prompt, reward_model.ground_truth, ability, data_source; Eurus-2-RL among them.

    The system turn of Eurus-2-RL is left out: it asks for an action format that nothing here reads.
    """
    graded = loaded(row.get("reward_model"), "reward_model")
    graded = {**graded, **((row.get("extra_info") or {}).get("reward_model") or {})}
    source, prompt = str(row.get("data_source") or ""), loaded(row.get("prompt"), "prompt", list)
    if source in EURUS_CODE or source.startswith("numina_"):
        prompt = [turn for turn in prompt if turn["role"] != "system"]
    if graded.get("entry"):
        entry = entry_of(graded.get("reasoning_task"), loaded(graded["entry"], "entry"))
        return ask("logic", prompt, entry, source)
    words = (source.lower(), source.lower().split("_")[0], str(row.get("ability")).lower())
    kind = next((_DOMAIN_OF[word] for word in words if word in _DOMAIN_OF), "")
    if not kind or {kind, domain} == {"math", "stem"}:  # else a row of a mixed file
        kind = domain
    truth = graded.get("ground_truth")
    if kind == "code":
        return ask("code", prompt, tests_of(truth), source)
    if kind == "instruct":
        return ask("instruct", prompt, instructions_of(loaded(truth, "instructions")), source)
    if not kind:
        raise BadRow("unknown domain", f"ability {row.get('ability')!r}, data_source {source!r}")
    return ask(kind, prompt, {"answer": answer_of(truth)}, source)


def scp116k(row: Row, domain: str) -> Prompt:
    """SCP-116K: rows with an extracted answer (verl or plain), or the raw releases.

    Raw rows hold long solutions. In the first release the answer is the last box of the book's
    solution, or of a model's that was judged the same; in the later one it is `extract_solution`
    (its last box, or the whole if it is one short line).
    """
    if "reward_model" in row:
        return verl(row, domain or "stem")
    if any(name in row for name in _ANSWERS):
        return question_answer(row, domain or "stem")
    told = str(row.get("extract_solution") or "").strip()
    answer = math.last_boxed(told or str(row.get("matched_solution")))
    for model in ("qwq", "o1"):
        if answer is None and row.get(f"is_{model}_solution_same_with_matched_solution") is True:
            answer = math.last_boxed(str(row.get(f"{model}_solution")))
    if answer is None and 0 < len(told) <= 80 and "\n" not in told:
        answer = told
    return question_answer({"problem": row.get("problem"), "answer": answer}, domain or "stem")


def nemotron(row: Row, domain: str) -> Prompt:
    """Llama-Nemotron RL/instruction_following: input, args.instruction_id_list and _kwargs."""
    return ask("instruct", row.get("input"), instructions_of(loaded(row.get("args"), "args")))


def ifeval(row: Row, domain: str) -> Prompt:
    """IFEval: prompt, instruction_id_list, kwargs."""
    return ask("instruct", row.get("prompt"), instructions_of(row))


def nemo_gym(row: Row, domain: str) -> Prompt:
    """NeMo-Gym rows: responses_create_params.input, and grading fields that tell the domain."""
    prompt = loaded(row.get("responses_create_params"), "prompt").get("input")
    given = {**row, **loaded(row.get("verifier_metadata") or {}, "verifier_metadata")}
    metadata, source = given.get("metadata") or {}, row.get("dataset")
    if "unit_tests" in given:
        return ask("code", prompt, tests_of(given["unit_tests"]), source)
    if "instruction_id_list" in given:
        return ask("instruct", prompt, instructions_of(given), source)
    if "source_dataset" in metadata:
        entry = {name: given.get(name) for name in ("question", "answer", "metadata")}
        return ask("logic", prompt, entry_of(metadata["source_dataset"], entry), source)
    if "expected_answer" not in given or not (domain or r"\boxed" in str(prompt)):
        raise BadRow("unknown kind of task", f"fields {', '.join(row)}")
    reference: dict[str, Any] = {"answer": answer_of(given["expected_answer"])}
    if given.get("options"):
        reference["options"] = [text for option in given["options"] for text in option.values()]
    return ask("stem" if domain == "stem" or len(reference) > 1 else "math", prompt, reference)


def gpqa(row: Row, domain: str) -> Prompt:
    """GPQA: Question, Correct Answer, Incorrect Answer 1..3; the order hangs on the question."""
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    question, *options = [text_of(row.get(name)).strip() for name in ("Question", *names)]
    right, letters = options[0], "ABCD"
    random.Random(f"gpqa/0/{question}").shuffle(options)
    listed = [f"{letter}) {text}" for letter, text in zip(letters, options, strict=True)]
    told = "\n\n".join([question, "\n".join(listed), "Answer with the letter of the right option."])
    return ask("stem", told, {"answer": letters[options.index(right)], "options": options})


def own(row: Row, domain: str) -> Prompt:
    """Rows for a verifier of one's own: prompt or messages, taken as they are, and reference."""
    turns = row.get("messages") or row.get("prompt")
    return ask("instruct", turns, loaded(row.get("reference"), "reference"), row.get("source"))


def plain(row: Row, domain: str) -> Prompt:
    """Our own records: the fields of Prompt as they are, or prompt, domain, answer or reference."""
    kind = row.get("domain") or domain
    if kind not in VERIFIERS:
        raise BadRow("unknown domain", f"{kind!r}; expected one of {', '.join(VERIFIERS)}")
    extras = {key: row[key] for key in ("answer", "options", "rel_tol") if row.get(key) is not None}
    reference = dict(loaded(row.get("reference") or extras, "reference"))
    if kind in ("math", "stem"):
        reference["answer"] = answer_of(reference.get("answer"))
    elif kind == "instruct":
        reference = instructions_of(reference)
    elif kind == "logic":
        reference = entry_of(reference.get("task"), loaded(reference.get("entry"), "entry"))
    elif not reference.get("outputs") and not reference.get("asserts"):
        raise BadRow("no tests")
    verdict = VERIFIERS[kind]("", reference)
    if verdict.status == Status.ERROR:
        raise BadRow("unusable reference", verdict.detail)
    turns = row.get("messages") or row.get("prompt")
    prompt = ask(kind, turns, reference, row.get("source"), row.get("solution"))
    if row.get("messages"):  # written by this project: nothing is to be added
        messages = ({**t, "content": text_of(t["content"])} for t in row["messages"])
        prompt = replace(prompt, messages=tuple(messages))
    return replace(prompt, id=str(row.get("id") or ""), level=str(row.get("level") or ""))
