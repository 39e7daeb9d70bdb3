"""Files to prompts: JSON, JSON lines, CSV, parquet, Arrow and TFDS directories, whatever the schema.

A path is a file, a directory of files (`split` picks those whose names, or folders' names, begin with
it), a Hugging Face data set saved to disk, or a directory of tensorflow-datasets in the
array_record format. Paths may be `gs://` or `s3://` ones through pyarrow; those of
tensorflow-datasets go through etils. Rows come one by one; only a JSON array is read as a whole.
"""

import codecs
import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pyarrow import fs

from prolong_jax.config import SourceSettings
from prolong_jax.data import formats, programs
from prolong_jax.data.formats import Row
from prolong_jax.data.prompts import BadRow, Prompt, Skipped
from prolong_jax.verifiers import VERIFIERS

# name: (the format, fields that tell it; the first format whose fields are all there is taken)
FORMATS: dict[str, tuple[Callable[[Row, str], Prompt], set[str]]] = {
    "verl": (formats.verl, {"prompt", "reward_model"}),
    "nemo_gym": (formats.nemo_gym, {"responses_create_params"}),
    "nemotron": (formats.nemotron, {"input", "args"}),
    "ifeval": (formats.ifeval, {"prompt", "instruction_id_list", "kwargs"}),
    "gpqa": (formats.gpqa, {"Question", "Correct Answer"}),
    "competition": (programs.competition, {"question", "input_output"}),
    "code_contests": (programs.code_contests, {"description", "public_tests"}),
    "live_code_bench": (programs.live_code_bench, {"question_content", "public_test_cases"}),
    "human_eval": (programs.human_eval, {"prompt", "entry_point"}),
    "mbpp": (programs.mbpp, {"test_list", "code"}),
    "plain": (formats.plain, {"domain", "reference"}),
    "scp116k": (formats.scp116k, {"problem", "matched_solution"}),
    "scp116k_later": (formats.scp116k, {"problem", "extract_solution"}),
    "question_answer": (formats.question_answer, set()),
}
csv.field_size_limit(1 << 30)  # characters; the default would refuse long problems
BATCH_ROWS = 64  # of a parquet file that are in memory at once
EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_ROW_IDS = ("id", "question_id", "problem_id", "task_id", "hash_id", "unique_id", "uuid", "idx")
_SPLITS = ("train", "test", "valid", "dev", "ood")
OTHER_SOURCE, NEEDS_JUDGE = "of another domain or data_source", "needs a special judge"
UNREADABLE = (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError)
UNREADABLE += (csv.Error,)


def read(name: str, settings: SourceSettings) -> Iterator[Prompt | Skipped]:
    """The prompts of a source in the order of its files, and what stands for its other rows.

    Ids are "name/number of the row"; our own records keep theirs.

    Raises:
      ValueError: no data there, no such split, an unknown format or domain.
    """
    known = {"format": FORMATS, "domain": VERIFIERS}
    for key, names in known.items():
        value = getattr(settings, key)
        if value and value not in names:
            raise ValueError(
                f"data: {key} of source {name!r}: expected one of {', '.join(names)}, "
                f"got {value!r}; mend it or leave it empty."
            )
    judged = records(settings.special_judge, "idx", "special_judge")
    unscored = {idx for idx, needed in judged.items() if needed}
    for number, (where, row) in enumerate(rows_of(settings.path, settings.split)):
        try:
            yield _prompt_of(row, number, name, settings, unscored)
        except BadRow as problem:
            is_bad = problem.reason not in (OTHER_SOURCE, NEEDS_JUDGE)
            yield Skipped(problem.reason, where, problem.detail, is_bad)


def records(path: str, key: str, value: str) -> dict[str, Any]:
    """One field by another, as text, of all rows of a file; empty without a path.

    Raises:
      ValueError: a row that lacks a field.
    """
    found = {}
    for where, row in rows_of(path) if path else ():
        if not isinstance(row, Mapping) or not {key, value} <= row.keys():
            raise ValueError(f"data: expected {key!r} and {value!r} in row {where} of {path!r}.")
        found[str(row[key])] = row[value]
    return found


def _prompt_of(
    row: Any, number: int, name: str, settings: SourceSettings, unscored: Collection[str]
) -> Prompt:
    if not isinstance(row, Mapping):
        raise BadRow("no row of fields", f"{str(row)[:80]!r}")
    row = {**row, **{ours: row.get(theirs) for ours, theirs in settings.fields.items()}}
    has_source = settings.only not in VERIFIERS and isinstance(row.get("data_source"), str)
    if settings.only and has_source and row["data_source"] != settings.only:
        raise BadRow(OTHER_SOURCE, row["data_source"])
    mark = next((str(row[key]) for key in _ROW_IDS if key in row), str(number))
    if row.get("special_judge") is True or mark in unscored:
        raise BadRow(NEEDS_JUDGE)
    guess = next(key for key, (_, fields) in FORMATS.items() if row.keys() >= fields)
    if guess == "question_answer" and row.get("domain") in VERIFIERS:
        guess = "plain"
    try:
        is_own = settings.verifier and not settings.format and "reference" in row
        read_row = formats.own if is_own else FORMATS[settings.format or guess][0]
        prompt = read_row(row, settings.domain)
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as problem:
        raise BadRow("fields of another shape", repr(problem)) from None
    if settings.only and settings.only not in (prompt.domain, prompt.source):
        raise BadRow(OTHER_SOURCE, f"{prompt.domain}, {prompt.source}")
    identity, domain = prompt.id or f"{name}/{number}", settings.domain or prompt.domain
    scored_by = settings.verifier or prompt.verifier
    return replace(
        prompt, id=identity, domain=domain, verifier=scored_by, source=prompt.source or name
    )


# --- containers ----------------------------------------------------------------------------------


def rows_of(path: str, split: str = "") -> Iterator[tuple[str, Any]]:
    """("file:number", row) of every row, numbered from 1; what is no JSON comes as its text.

    Raises:
      ValueError: no data at the path, no such split, or a file that cannot be read.
    """
    try:
        system, root = _locate(path)
        if not find(path):
            raise ValueError(f"data: expected a file or directory at {path!r}, found none.")
        if system.get_file_info(root).type == fs.FileType.File:
            yield from _rows_of_file(system, root)
        elif find(f"{path}/dataset_dict.json"):  # several splits saved to disk
            if not split:
                raise ValueError(f"data: split: expected one of those saved in {path!r}, got none.")
            yield from rows_of(f"{path}/{split}")
        elif find(f"{path}/features.json"):
            yield from _rows_of_tfds(path, split)
        else:
            for file in _files_of(system, root, split):
                yield from _rows_of_file(system, file)
    except UNREADABLE as problem:
        raise ValueError(f"data: {path!r} cannot be read ({problem}); mend it.") from problem


def find(path: str) -> bool:
    """Whether there is a file or a directory at a local or remote path."""
    system, root = _locate(path)
    return system.get_file_info(root).type != fs.FileType.NotFound


def _locate(path: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), os.path.abspath(path)
    return fs.FileSystem.from_uri(path)


def _files_of(system: fs.FileSystem, root: str, split: str) -> list[str]:
    """The data files of a directory, in order; beside Arrow files JSON ones hold no rows."""
    infos = system.get_file_info(fs.FileSelector(root, recursive=True))
    files = sorted(info.path for info in infos if _extension(info.path) in EXTENSIONS)
    files = [file for file in files if file.endswith(".arrow")] or files
    parts = {file: file[len(root) :].strip("/").split("/") for file in files}
    named = [file for file in files if any(part.startswith(split) for part in parts[file])]
    found = {s for file in files for part in parts[file] for s in _SPLITS if part.startswith(s)}
    if not split and len(found) > 1:
        raise ValueError(
            f"data: split: expected one of {', '.join(sorted(found))} of {root!r}, got none."
        )
    if not named:
        raise ValueError(
            f"data: expected files {split}*{{{','.join(EXTENSIONS)}}} in {root!r}, found none."
        )
    return named


def _extension(file: str) -> str:
    stem, last = posixpath.splitext(file)
    return posixpath.splitext(stem)[1] if last in _COMPRESSED else last


def _rows_of_file(system: fs.FileSystem, file: str) -> Iterator[tuple[str, Any]]:
    extension, name = _extension(file), posixpath.basename(file)
    if extension == ".parquet":
        with system.open_input_file(file) as source:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(BATCH_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{name}:{i}", row) for i, row in enumerate(rows, 1))
        return
    with system.open_input_stream(file, compression="detect") as stream:
        if extension == ".arrow":
            rows = (row for batch in pyarrow.ipc.open_stream(stream) for row in batch.to_pylist())
        elif extension == ".csv":
            rows = csv.DictReader(io.TextIOWrapper(io.BufferedReader(stream), "utf-8", newline=""))
        elif extension in EXTENSIONS:
            rows = _json_rows(io.BufferedReader(stream))
        else:
            raise ValueError(f"data: expected one of {', '.join(EXTENSIONS)}, got {file!r}.")
        yield from ((f"{name}:{i}", row) for i, row in enumerate(rows, 1))


def _json_rows(stream: io.BufferedReader) -> Iterator[Any]:
    """The elements of one JSON array, or one value a line."""
    first = stream.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        yield from json.load(stream)
        return
    for line in stream:
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            yield line[:80].decode(errors="replace")


def _rows_of_tfds(path: str, split: str) -> Iterator[tuple[str, Any]]:
    import tensorflow_datasets as tfds  # heavy, and needed by these directories alone

    builder: Any = tfds.builder_from_directory(path)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"data: split: expected one of {known} of {path!r}, got {split!r}.")
    source = builder.as_data_source(split=split)
    for i in range(len(source)):
        yield f"{split}:{i}", _plain_values(source[i])


def _plain_values(value: Any) -> Any:
    """bytes as text, arrays as lists, NumPy scalars as numbers."""
    if isinstance(value, Mapping):
        return {key: _plain_values(inner) for key, inner in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        return [_plain_values(inner) for inner in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value
