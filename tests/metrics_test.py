import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from prolong_jax.metrics import Progress, Writer, final_table, read_rows


def writer(workdir, resume_step=None, wandb="off"):
    return Writer(workdir, wandb=wandb, config={"seed": 0}, resume_step=resume_step)


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
    assert [row["step"] for row in read_rows(path, last=1)] == [2]


ROW = {
    "step": 12, "stage": "two", "stage_index": 1, "reset": "plateau", "reward/mean": 0.41,
    "reward/math": 0.52, "update/entropy": 0.61, "groups/kept": 17, "time/step_s": 2.0,
    "validation/all/avg": 0.512, "validation/all/lo": 0.48, "validation/all/hi": 0.54,
}  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_matters(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    with Progress(150, console) as view:
        view.show(ROW)
        view.show({"step": 13, "stage_index": 1})  # a step without an update
    for part in ("step  12/150", "stage 2", "reward 0.41 (math .52)", "entropy 0.61", "plateau"):
        assert part in out.getvalue()
    assert "validation @ 12: all 0.512 [0.48, 0.54]" in out.getvalue()
    if terminal:
        assert "4 min 36 s left" in out.getvalue()  # 138 steps of 2 s


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


def test_wandb_offline_writes_under_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    ours = writer(tmp_path, wandb="offline")
    ours.step({"step": 1, "update/loss": 0.5, "reset": None})
    ours.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb_id").read_text()
    again = writer(tmp_path, wandb="offline", resume_step=1)
    again.close()
    assert (tmp_path / "wandb_id").read_text() == identity
