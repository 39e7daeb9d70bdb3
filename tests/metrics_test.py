import io
import json
import math
import re
import struct
import sys

import numpy as np
import pytest
from rich.console import Console

from prolong_jax.metrics import Progress, Writer, final_table, read_rows


def writer(workdir, resume_step=None, wandb="off", tensorboard=False):
    config = {"seed": 0, "metrics": {"tensorboard": tensorboard}}
    return Writer(workdir, wandb=wandb, config=config, resume_step=resume_step)


def steps(path):
    return [row["step"] for row in read_rows(path)]


def test_a_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    first = writer(tmp_path)
    for step in range(5):
        first.step({"step": step, "update/loss": 0.5})
        first.samples([{"step": step, "response": "a"}] * 2)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "upd')  # a kill in the middle of a line
    second = writer(tmp_path, resume_step=2)
    second.step({"step": 3})
    second.close()
    assert steps(tmp_path / "metrics.jsonl") == [0, 1, 2, 3]
    assert steps(tmp_path / "samples.jsonl") == [0, 0, 1, 1, 2, 2]
    writer(tmp_path).close()  # a fresh start in a workdir without a checkpoint
    assert steps(tmp_path / "metrics.jsonl") == []


def test_rows_are_on_disk_before_the_next_one_and_are_strict_json(tmp_path):
    ours = writer(tmp_path)
    ours.step({"step": 1, "a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": np.int64(3)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "a": None, "b": None, "c": 0.5, "d": 3,
    }  # fmt: skip
    ours.close()


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match="expected JSON lines, got 'rubbish"):
        read_rows(path)
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert steps(path) == [1, 2]
    assert read_rows(path, lambda row: row | {"step": -row["step"]}) == [{"step": -1}, {"step": -2}]


ROW = {
    "step": 12, "stage": "two", "stage_index": 1, "reset": "plateau", "reward/mean": 0.41,
    "reward/math": 0.52, "update/entropy": 0.61, "update/kl_ref": 0.0312, "groups/kept": 17,
    "time/step_s": 2.0, "tokens/per_s": 3116.2,
    "validation/all/avg": 0.512, "validation/all/lo": 0.48, "validation/all/hi": 0.54,
}  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_matters(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    with Progress(150, console) as view:
        view.show(ROW)
        view.show({"step": 13, "stage": "two", "stage_index": 1})  # a step without an update
    for part in (
        "0.41 (math .52)",
        "entropy 0.61",
        "kl 0.0312",
        "3,116 tokens/s  2.0 s/step",
        "plateau",
    ):
        assert part in out.getvalue()
    assert "validation @ 12: all 0.512 [0.48, 0.54]" in out.getvalue()
    if terminal:
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
        lines = dict(re.findall(r"^(stage|last reset|validation) +(.*?) *$", shown, re.MULTILINE))
        assert lines == {
            "stage": "2: two", "last reset": "plateau, after step 11",
            "validation": "@ 12: all 0.512 [0.48, 0.54]",
        }  # fmt: skip
        assert "12/150" in out.getvalue() and "4 min 36 s left" in out.getvalue()  # 138 of 2 s
    else:
        assert "step  12/150  stage 2  reward 0.41" in out.getvalue()


def test_final_table_shows_base_and_final():
    scores = {"avg_at_k": 0.25, "k": 16, "ci95": [0.2, 0.3], "pass_at_k": 0.5}
    final = scores | {"avg_at_k": 0.875, "ci95": [0.8, 0.9], "pass_at_k": 1.0}
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as captured:
        console.print(
            final_table({"validation": {"base": {"all": scores}, "final": {"all": final}}})
        )
    for part in ("avg@16", "0.250 [0.20, 0.30]", "0.875 [0.80, 0.90]", "+0.625", "1.00"):
        assert part in captured.get()


SAMPLES = [
    {"step": 1, "prompt": "2 + 2?", "response": "a\0\ud800b", "score": 1.0},
    {"step": 1, "prompt": "1?", "response": "# 1", "score": 0.0},
]


def events(directory):
    """(step, tag, number or text) of all TensorBoard events in the order of their files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # records: length u64, its checksum u32, content, its checksum u32
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "start", event.session_log.status))
            for value in event.summary.value:
                is_text = value.HasField("tensor")
                content = value.tensor.string_val[0].decode() if is_text else value.simple_value
                found.append((event.step, value.tag, content))
    return found


def test_tensorboard_has_the_numbers_and_the_samples_and_hides_what_a_resume_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    ours = writer(tmp_path, tensorboard=True)
    for step in (1, 2):
        ours.step({"step": step, "update/loss": np.float32(0.5), "stage": "one", "reset": None})
    ours.step({"step": 3, "update/loss": math.nan, "reset": "plateau", "timeline": []})
    ours.samples(SAMPLES)
    ours.close()
    found = events(tmp_path / "tensorboard")
    assert [event for event in found if event[1] == "update/loss"] == [
        (1, "update/loss", 0.5),
        (2, "update/loss", 0.5),
    ]
    texts = {tag.split("/text_summary")[0]: text for _, tag, text in found if type(text) is str}
    assert texts["reset"].strip() == "plateau"
    assert "response:\n\n    a\0?b\n" in texts["samples/0"]
    assert "\n    # 1\n" in texts["samples/1"]  # as code, not as a heading
    again = writer(tmp_path, resume_step=1, tensorboard=True)
    again.step({"step": 2, "update/loss": 0.25})
    again.close()
    found = events(tmp_path / "tensorboard")
    start = found.index((2, "start", 1))  # TensorBoard drops what it has from step 2 on
    assert (2, "update/loss", 0.25) in found[start:] and (1, "update/loss", 0.5) in found[:start]
    writer(tmp_path, tensorboard=True).close()
    assert events(tmp_path / "tensorboard") == []  # the run began anew


def test_tensorboard_is_refused_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="'metrics.tensorboard' needs the package tensorboardX"):
        writer(tmp_path, tensorboard=True)


def test_wandb_offline_writes_under_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    ours = writer(tmp_path, wandb="offline")
    ours.step({"step": 1, "update/loss": 0.5, "reset": None})
    ours.samples(SAMPLES)
    ours.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.json")
    assert json.loads(table.read_text()) == {
        "columns": list(SAMPLES[0]),
        "data": [[1, "2 + 2?", "a\0?b", 1.0], [1, "1?", "# 1", 0.0]],
    }
    identity = (tmp_path / "wandb_id").read_text()
    again = writer(tmp_path, wandb="offline", resume_step=1)
    again.close()
    assert (tmp_path / "wandb_id").read_text() == identity
