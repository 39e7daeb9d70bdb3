"""Every reader on a small file of the exact schema, good rows and bad ones; and the real files."""

import csv
import gzip
import json
import os
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prolong_jax.config import SourceSettings
from prolong_jax.data.procedural import make_prompt
from prolong_jax.data.prompts import Prompt, Skipped
from prolong_jax.data.readers import FORMATS, read
from prolong_jax.verifiers import VERIFIERS, Status, code, logic, math

BOXED = math.PROMPT_SUFFIX
HUGE = "Add 1 and 1. " * 160_000  # 2 MB


def items(path: Path, **settings: Any) -> list[Prompt | Skipped]:
    return list(read("src", SourceSettings(str(path), **settings)))


def read_rows(tmp_path: Path, rows: list[Any], **settings: Any) -> list[Prompt | Skipped]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return items(path, **settings)


def one(tmp_path: Path, row: Any, **settings: Any) -> Prompt:
    (item,) = read_rows(tmp_path, [row], **settings)
    assert isinstance(item, Prompt), item
    assert set(item.messages[0]) == {"role", "content"} and item.verifier in VERIFIERS
    json.dumps(dict(item.reference))
    return item


def prompts_of(found: list[Prompt | Skipped]) -> list[Prompt]:
    assert all(isinstance(item, Prompt) for item in found), found
    return [item for item in found if isinstance(item, Prompt)]


def reasons(found: list[Prompt | Skipped]) -> list[str]:
    return [item.reason if isinstance(item, Skipped) else "" for item in found]


def test_deepscaler_json_array(tmp_path):
    rows = [
        {"problem": "1+1?", "answer": "2", "solution": "..."},
        {"problem": "x", "answer": None, "solution": r"\boxed{3}"},
        {"problem": "x", "answer": "  ", "solution": ""},
        {"problem": None, "answer": "2", "solution": ""},
        {"problem": "AMC", "answer": 142.0, "solution": ""},
        {"problem": "Minerva", "answer": ["2.5\n"], "solution": ""},
        {"problem": "Olympiad", "final_answer": ["$(1,2)$", "3"]},
        {"problem": "MATH", "solution": r"so \boxed{\frac{1}{2}}"},
        {"problem": ["Größe", "→ 数学?"], "answer": r"\(\boxed{7}\)"},
        {"problem": "x", "answer": "9^{9^{9^{9}}}"},
        {"problem": "x", "answer": r"\frac{1}{2"},
        {"problem": "x", "answer": True},
        {"problem": "x", "answer": [None]},
        {"problem": "x", "answer": {"value": 1}},
        {"problem": "half \ud800", "answer": 1},
        {"problem": HUGE, "answer": 2},
        "text",
        None,
    ]
    path = tmp_path / "deepscaler.json"
    path.write_text(" \n" + json.dumps(rows))
    found = items(path)
    expected = ["", "no answer", "no answer", "no prompt", "", "", "several answers", "", ""]
    expected += ["unparsable gold"] * 2 + ["no answer"] * 3 + ["text is not Unicode", ""]
    assert reasons(found) == [*expected, "no row of fields", "no row of fields"]
    first = found[0]
    assert first == Prompt(
        "src/0",
        "math",
        "",
        "math",
        ({"role": "user", "content": f"1+1? {BOXED}"},),
        {"answer": "2"},
        "src",
    )
    golds = [x.reference["answer"] for x in found if isinstance(x, Prompt)]
    assert golds == ["2", "142", "2.5", r"\frac{1}{2}", "7", "2"]
    assert isinstance(found[8], Prompt) and found[8].messages[0]["content"].startswith("Größe\n→")
    assert isinstance(found[1], Skipped) and found[1].where == "deepscaler.json:2"


VERL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)


def eurus(source: str, ability: str | None, truth: str | None) -> dict[str, Any]:
    system = {"role": "system", "content": "Choose one action: [ASSESS] ..."}
    return {
        "data_source": source,
        "prompt": [system, {"role": "user", "content": "Do it."}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
    }


def test_eurus_parquet(tmp_path):
    stdin = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3", ["7", ""]]}
    calls = {"fn_name": "add", "inputs": ["1\n[2, 3]"], "outputs": ["[3, 4]"]}
    rows = [
        eurus("taco", "code", json.dumps(stdin)),
        eurus("apps", "code", json.dumps(calls)),
        eurus("numina_olympiads", "math", r"\frac{1}{2}"),
        eurus("codeforces", "code", json.dumps({"inputs": [], "outputs": []})),
        eurus("codeforces", "code", "{"),
        eurus("codecontests", "code", None),
        eurus("taco", "code", json.dumps({"inputs": ["1"], "outputs": ["1", "2"]})),
        eurus("numina_cn_k12", "math", None),
        eurus("mystery", None, "3"),
        {**eurus("taco", "code", json.dumps(stdin)), "prompt": None},
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=VERL), path, row_group_size=3)
    found = items(path)
    assert reasons(found) == [
        *("", "", "", "no tests", "unreadable tests", "no tests", "unusable tests", "no answer"),
        *("unknown domain", "unreadable prompt"),
    ]
    first, second, third = [item for item in found if isinstance(item, Prompt)]
    assert first.reference == {"inputs": ["1 2\n", "3\n4"], "outputs": ["3", "7\n"]}
    assert second.reference["inputs"] == [[1, [2, 3]]] and second.reference["outputs"] == [[3, 4]]
    assert first.messages == ({"role": "user", "content": f"Do it.\n\n{code.PROMPT_SUFFIX}"},)
    assert (third.domain, third.source, third.reference) == (
        "math",
        "numina_olympiads",
        {"answer": r"\frac{1}{2}"},
    )
    assert [type(x) for x in items(path, only="taco")].count(Prompt) == 1
    left_out = items(path, only="code")[2]
    assert isinstance(left_out, Skipped) and not left_out.is_bad
    judged = tmp_path / "output_spj.jsonl"
    judged.write_text('{"idx":0,"special_judge":true,"case":1}\n{"idx":1,"special_judge":false}\n')
    assert reasons(items(path, special_judge=str(judged)))[:2] == ["needs a special judge", ""]


def test_other_verl_rows(tmp_path):
    user = [{"role": "user", "content": "Sum?"}]
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum"}}
    graded = {"reasoning_task": "chain_sum", "style": "rule", "entry": json.dumps(entry)}
    row = {"data_source": "reasoning_gym", "prompt": user, "reward_model": graded}
    prompt = one(tmp_path, row)
    assert prompt.messages[0]["content"] == f"Sum? {logic.PROMPT_SUFFIX}"
    assert prompt.reference == {"task": "chain_sum", "entry": entry}
    inside = {**row, "reward_model": {"style": "rule"}, "extra_info": {"reward_model": graded}}
    assert one(tmp_path, inside).reference == prompt.reference
    told = json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]})
    row = {"data_source": "if_eval", "prompt": user, "reward_model": {"ground_truth": told}}
    assert one(tmp_path, row).reference["kwargs"] == [{}]


def test_scp116k_releases(tmp_path):
    first = {
        "domain": "Physics",
        "problem": "How far?",
        "matched_solution": "Long text without a box.\n" * 9,
        "qwq_solution": r"\boxed{1}",
        "o1_solution": r"\boxed{84 \text{ m}}",
        "is_qwq_solution_same_with_matched_solution": False,
        "is_o1_solution_same_with_matched_solution": True,
    }
    prompt = one(tmp_path, first)
    assert (prompt.domain, prompt.reference) == ("stem", {"answer": r"84 \text{ m}"})
    book = {**first, "matched_solution": r"hence \boxed{9}"}
    assert one(tmp_path, book).reference == {"answer": "9"}
    unknown = {**first, "is_o1_solution_same_with_matched_solution": None}
    later = {
        "domain": "Chemistry",
        "problem": "Which?",
        "r1_response": r"\boxed{NaCl}",
        "r1_reasoning_content": "hm",
        "extract_solution": "NaCl",
    }
    long = {**later, "extract_solution": "One line.\nAnother."}
    extracted = {
        "data_source": "scp116k",
        "prompt": [{"role": "user", "content": "Which?"}],
        "ability": "chemistry",
        "reward_model": {"ground_truth": "NaCl", "style": "rule"},
    }
    figure = {**unknown, "matched_solution": "See Fig. 3"}
    found = read_rows(tmp_path, [unknown, later, long, extracted, figure], domain="stem")
    assert reasons(found) == ["no answer", "", "no answer", "", "no answer"]
    assert isinstance(found[1], Prompt) and found[1].reference == {"answer": "NaCl"}
    assert isinstance(found[3], Prompt) and found[3].verifier == "stem"


def test_llama_nemotron_instructions(tmp_path):
    row = {
        "input": [{"role": "user", "content": "Write. No commas, 3 words."}],
        "args": {
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "instruction_kwargs": [
                {"num_words": None},
                {"num_words": 3.0, "relation": "at least", "x": None},
            ],
            "task": "instruction_following",
            "num_instructions": 2,
        },
        "category": "instruction following",
        "license": "odc-by",
        "reasoning": "off",
        "used_in_training": "Ultra, Super",
        "version": "v1",
        "system_prompt": "detailed thinking off",
    }
    prompt = one(tmp_path, row)
    kwargs = [{}, {"num_words": 3, "relation": "at least"}]
    assert prompt.reference["kwargs"] == kwargs and type(kwargs[1]["num_words"]) is int
    assert prompt.messages == tuple(row["input"]), "no format instruction is added"
    assert VERIFIERS["instruct"]("</think>one two three", prompt.reference).score == 1.0
    bad = [
        {**row, "args": {**row["args"], "instruction_id_list": None}},
        {**row, "args": {**row["args"], "instruction_kwargs": [{}]}},
        {**row, "args": {"instruction_id_list": ["no:such"], "instruction_kwargs": [None]}},
        {**row, "args": {**row["args"], "instruction_kwargs": [None, {"num_words": "many"}]}},
        {**row, "args": None},
        {**row, "input": None},
    ]
    assert reasons(read_rows(tmp_path, bad)) == [
        "no instructions",
        "as many arguments as instructions expected",
        "instructions without a checker",
        "unusable arguments of instructions",
        "unreadable args",
        "no prompt",
    ]


def gym(text: str, **fields: Any) -> dict[str, Any]:
    return {"responses_create_params": {"input": [{"role": "user", "content": text}]}, **fields}


def test_nemo_gym_rows(tmp_path):
    tests = {"unit_tests": {"inputs": ["1\n"], "outputs": ["1\n"]}}
    rows = [
        gym("Use ```python.", verifier_metadata=tests, hash_id="c6", dataset="taco", source="cf"),
        gym(
            r"\boxed{} A: x B: y",
            options=[{"A": "x"}, {"B": "y"}],
            expected_answer="B",
            grading_mode="strict_single_letter_boxed",
            uuid="3c",
        ),
        gym(r"Put it in \boxed{}.", question="?", expected_answer=r"\(\frac{333}{1997}\)"),
        gym(
            "1 + 1 =",
            question="1 + 1 =",
            answer="2",
            metadata={"source_dataset": "chain_sum", "source_index": 0},
        ),
        gym(
            "Say.",
            id=1,
            prompt="Say.",
            instruction_id_list=["punctuation:no_comma"],
            kwargs=[{"N": None}],
            grading_mode="binary",
        ),
        gym(
            "Say.",
            verifier_metadata={
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [None],
                "grading_mode": "fraction",
            },
        ),
        gym("Find the toast.", expected_answer="To the sea!", dataset="mrcr"),
        gym("Nothing.", verifier_metadata=None),
    ]
    found = read_rows(tmp_path, rows)
    assert reasons(found) == [""] * 6 + ["unknown kind of task"] * 2
    prompts = [item for item in found if isinstance(item, Prompt)]
    domains = ["code", "stem", "math", "logic", "instruct", "instruct"]
    assert [p.domain for p in prompts] == domains
    assert prompts[0].messages[0]["content"] == "Use ```python."
    assert prompts[1].reference == {"answer": "B", "options": ["x", "y"]}
    assert prompts[2].reference == {"answer": r"\frac{333}{1997}"}
    assert prompts[3].reference["entry"]["answer"] == "2"
    assert [p.reference["mode"] for p in prompts[4:]] == ["all", "mean"]


def test_own_records_survive_a_round_trip(tmp_path):
    domains = ("math", "code", "stem", "instruct")
    prompts = [make_prompt(domain, "easy", "train", 0, i) for domain in domains for i in range(9)]
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
    reference = {"task": "chain_sum", "entry": entry}
    prompts.append(replace(prompts[0], domain="logic", verifier="logic", reference=reference))
    found = read_rows(tmp_path, [asdict(p) for p in prompts])
    assert [p.messages for p in prompts] == [p.messages for p in found if isinstance(p, Prompt)]
    for before, after in zip(prompts, found, strict=True):
        assert isinstance(after, Prompt) and (after.id, after.level) == (before.id, "easy")
        assert before.reference.items() <= after.reference.items()


def test_minimal_records_and_settings(tmp_path):
    rows = [
        {"prompt": "1+1?", "answer": 2, "domain": "math"},
        {"prompt": "Which?", "answer": "B", "domain": "stem", "options": ["x", "y"]},
        {"prompt": "x", "answer": "1", "domain": "poetry"},
        {"prompt": "x", "domain": "code"},
    ]
    found = read_rows(tmp_path, rows, format="plain")
    assert reasons(found) == ["", "", "unknown domain", "no tests"]
    assert read_rows(tmp_path, rows[:2]) == found[:2], "known by their domain"
    unusable = [
        {"domain": "code", "reference": {"inputs": ["1"], "outputs": ["1", "2"]}},
        {"domain": "code", "reference": {"inputs": [1], "outputs": [2]}},
        {"domain": "code", "reference": {"inputs": ["1"], "outputs": ["1"], "special_judge": True}},
        {"domain": "stem", "answer": "Z", "options": ["x", "y"]},
    ]
    found = read_rows(tmp_path, [{"prompt": "x", **row} for row in unusable])
    assert reasons(found) == ["unusable reference"] * 4
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}]
    mixed = one(tmp_path, {"messages": parts, "answer": 2, "domain": "math"})
    assert mixed.messages == ({"role": "user", "content": "1+1?"},)
    renamed = one(tmp_path, {"Q": "1+1?", "A": 2}, fields={"problem": "Q", "answer": "A"})
    assert renamed.reference == {"answer": "2"}
    stem = one(tmp_path, {"problem": "How far?", "answer": "84 m"}, domain="stem")
    assert stem.domain == stem.verifier == "stem"


def test_rows_for_a_verifier_of_ones_own(tmp_path):
    rows = [
        {"prompt": "Say it in 3 words.", "reference": {"words": 3}},
        {"messages": [{"role": "user", "content": "Short!"}], "reference": '{"words": 1}'},
        {"prompt": "1+1?", "reference": "two"},
        {"problem": "1+1?", "answer": "2"},
    ]
    first, second, unreadable, known = read_rows(tmp_path, rows, verifier="my_words")
    assert isinstance(first, Prompt) and isinstance(second, Prompt) and isinstance(known, Prompt)
    assert first.messages == ({"role": "user", "content": "Say it in 3 words."},)
    assert [first.reference, second.reference] == [{"words": 3}, {"words": 1}]
    assert first.domain == "instruct" and reasons([unreadable]) == ["unreadable reference"]
    assert known.reference == {"answer": "2"} and known.domain == "math"
    assert {item.verifier for item in (first, second, known)} == {"my_words"}
    assert (
        prompts_of(read_rows(tmp_path, rows[:1], verifier="v", domain="stem"))[0].domain == "stem"
    )


def test_one_source_of_a_mixed_file(tmp_path):
    """Rows of others are left out unread, whatever domain the settings give to the rest."""
    tests = json.dumps({"inputs": ["1"], "outputs": ["1"]})
    rows = [
        eurus("numina_olympiads", "math", "4"),
        eurus("taco", "code", "{broken"),
        eurus("apps", "code", tests),
        eurus("apps", "code", "{broken"),
    ]
    found = read_rows(tmp_path, rows, only="apps", domain="code")
    assert [isinstance(x, Skipped) and x.is_bad for x in found] == [False, False, False, True]
    found = read_rows(tmp_path, rows, only="math", domain="code")
    assert isinstance(found[0], Prompt) and found[0].verifier == "math"


def test_a_list_of_special_judges_names_rows_by_id_or_number(tmp_path):
    marks = tmp_path / "marks.jsonl"
    marks.write_text('{"idx": 1, "special_judge": true}\n{"idx": 2, "special_judge": false}\n')
    rows = [{"problem": "p", "answer": 1, "id": i} for i in (1, 0, 2)]
    found = read_rows(tmp_path, rows, special_judge=str(marks))
    assert [isinstance(x, Skipped) for x in found] == [True, False, False]
    assert isinstance(found[0], Skipped) and not found[0].is_bad
    plain = [{"problem": "p", "answer": 1}] * 3
    found = read_rows(tmp_path, plain, special_judge=str(marks))
    assert [isinstance(x, Skipped) for x in found] == [False, True, False]
    marks.write_text('{"idx": 1}\n')
    with pytest.raises(ValueError, match="expected 'idx' and 'special_judge' in row marks.jsonl:1"):
        read_rows(tmp_path, plain, special_judge=str(marks))


def test_a_problem_that_mentions_a_box_gets_the_suffix_all_the_same(tmp_path):
    row = {"problem": r"Simplify \boxed{x} + 1.", "answer": "2"}
    assert one(tmp_path, row).messages[0]["content"].endswith(BOXED)


def test_byte_order_marks_and_long_fields(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"problem": "1+1?", "answer": 2}] * 3), encoding="utf-8-sig")
    assert len(prompts_of(items(path))) == 3
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["problem", "answer"], ["Add. " * 100_000, "2"]])
    assert len(prompts_of(items(path))) == 1


def test_a_bad_line_does_not_hide_the_others(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    good = json.dumps({"problem": "1+1?", "answer": 2})
    path.write_bytes(gzip.compress(f"{good}\n{{broken\n\n{'[' * 100_000}\n{good}\n".encode()))
    found = items(path)
    assert reasons(found) == ["", "no row of fields", "no row of fields", ""]
    assert isinstance(found[3], Prompt) and found[3].id == "src/3"


def test_gpqa_options_are_shuffled_once_and_for_all(tmp_path):
    names = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    path = tmp_path / "gpqa_diamond.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([f"Why {i},\n{i}?", "right", "w1", "w2", "w3"] for i in range(40))
    first, again = items(path), items(path)
    assert first == again and all(isinstance(item, Prompt) for item in first)
    letters = [item.reference["answer"] for item in first if isinstance(item, Prompt)]
    assert set(letters) == set("ABCD")
    for item in first:
        assert isinstance(item, Prompt)
        letter, options = item.reference["answer"], item.reference["options"]
        assert options["ABCD".index(letter)] == "right" and {"w1", "w2", "w3"} <= set(options)
        assert f"{letter}) right" in item.messages[0]["content"]


def test_directories_splits_and_data_sets_saved_to_disk(tmp_path):
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(4)]
    saved, schema = (
        tmp_path / "saved",
        pa.schema([("problem", pa.string()), ("answer", pa.string())]),
    )
    for split, part in (("train", rows), ("test", rows[:1])):
        folder = saved / split
        folder.mkdir(parents=True)
        for shard in range(2):
            table = pa.Table.from_pylist(part[shard::2], schema)
            with pa.ipc.new_stream(
                folder / f"data-0000{shard}-of-00002.arrow", table.schema
            ) as out:
                out.write_table(table)
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text("{}")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [x.reference["answer"] for x in prompts_of(items(saved, split="train"))] == [
        "0",
        "2",
        "1",
        "3",
    ]
    assert len(items(saved / "test")) == 1
    with pytest.raises(ValueError, match="validation"):
        items(saved, split="validation")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(rows), hub / f"{name}.parquet")
    assert len(items(hub.parent, split="train")) == 8 and len(items(hub.parent, split="test")) == 4
    for place in (hub.parent, saved):  # never the test split by oversight
        with pytest.raises(ValueError, match="split: expected one of"):
            items(place)
    (tmp_path / "converted" / "train").mkdir(parents=True)
    (hub / "test-00000-of-00001.parquet").rename(tmp_path / "converted/train/0000.parquet")
    assert len(items(tmp_path / "converted", split="train")) == 4 and len(items(hub)) == 8
    with pytest.raises(ValueError, match="expected files dev"):
        items(hub.parent, split="dev")


def test_tensorflow_datasets_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    array_record = import_module("array_record.python.array_record_module")
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
    features = tfds.features.FeaturesDict({"question": text, "gold": number})
    folder, template = tmp_path / "sums" / "1.0.0", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    folder.mkdir(parents=True)
    file = folder / "sums-train.array_record-00000-of-00001"
    writer = array_record.ArrayRecordWriter(str(file), "group_size:1")
    for i in range(3):
        writer.write(features.serialize_example({"question": f"{i} → ?", "gold": i}))
    writer.close()
    filename_template = tfds.core.ShardedFileTemplate(
        folder, template=template, dataset_name="sums", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[3], num_bytes=1, filename_template=filename_template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,
    )
    fields = {"answer": "gold"}
    found = prompts_of(items(folder, split="train", fields=fields))
    assert sorted(item.reference["answer"] for item in found) == ["0", "1", "2"]
    assert all("→ ?" in item.messages[0]["content"] for item in found)
    with pytest.raises(ValueError, match="expected one of train"):
        items(folder, split="test")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        items(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="format of source 'src'"):
        items(tmp_path, format="excel")
    (tmp_path / "good.json").write_text('[{"problem": "1+1?", "answer": 2}]')
    assert len(list(read("src", SourceSettings(f"file://{tmp_path}/good.json")))) == 1
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        items(tmp_path / "bad.parquet")
    (tmp_path / "bad.json").write_text("[1, ")
    with pytest.raises(ValueError, match="cannot be read"):
        items(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot be read"):
        list(read("src", SourceSettings("no-such://bucket/x")))


JUNK = [None, "", "text", 7, 2.5, float("nan"), [], [None], ["a", "b"], {}, {"a": None}, True]


@pytest.mark.parametrize("name", FORMATS)
def test_no_value_in_any_field_raises(tmp_path, name):
    """Each field of each format in turn holds junk: a row is read or skipped, nothing else."""
    row = {key: "text" for key in FORMATS[name][1]} | {
        "prompt": "x",
        "problem": "x",
        "question": "x",
        "domain": "math",
        "args": {},
        "reward_model": {"ground_truth": "1"},
    }
    rows = [{**row, key: junk} for key in row for junk in JUNK]
    found = read_rows(tmp_path, rows, format=name)
    assert len(found) == len(rows)


def test_real_files():
    folder = os.environ.get("PROLONG_TEST_DATA")
    if not folder:
        pytest.skip("PROLONG_TEST_DATA is not set")
    expected = {
        "skywork/aime24.parquet": (30, 0),
        "skywork/aime25.parquet": (30, 0),
        "gsm8k/test.jsonl": (1319, 0),
        "math/train_math_math.json": (7470, 4),
        "math/test_math_math.json": (500, 0),
        "humaneval/HumanEval.jsonl.gz": (164, 0),
        "mbpp/mbpp.jsonl": (974, 0),
        "evalplus/HumanEvalPlus-Mini.jsonl.gz": (0, 164),  # holds no expected outputs
        "ifeval/input_data.jsonl": (541, 0),
        "nemo_gym/code_gen__example.jsonl": (5, 0),
        "nemo_gym/mcqa__example.jsonl": (5, 0),
        "nemo_gym/math_with_judge__example.jsonl": (5, 0),
        "nemo_gym/reasoning_gym__example.jsonl": (5, 0),
        "nemo_gym/equivalence_rule__example.jsonl": (0, 5),  # no verifier of ours
    }
    for name, (prompts, skipped) in expected.items():
        found = items(Path(folder) / name)
        kinds = [isinstance(item, Prompt) for item in found]
        assert (sum(kinds), len(kinds) - sum(kinds)) == (prompts, skipped), name
        for item in found[:3]:
            wrong = "</think>nothing"
            if isinstance(item, Prompt) and item.verifier in ("math", "instruct"):
                assert VERIFIERS[item.verifier](wrong, item.reference).status == Status.OK
    for name in ("instruction_following", "ifbench"):
        found = items(Path(folder) / "nemo_gym" / f"{name}__example.jsonl")
        assert set(reasons(found)[3:]) <= {"", "instructions without a checker"}, found
        assert reasons(found)[:3] == [""] * 3 and len(found) == 5
