import base64
import hashlib
import json
import re
import shutil

import pytest

from prolong_jax import charts, report


def scores(average):
    return {
        "avg_at_k": average,
        "k": 16,
        "ci95": [average - 0.05, average + 0.05],
        "pass_at_k": 0.9,
    }


@pytest.fixture
def workdir(tmp_path):
    rows: list[dict] = [{"step": 0, **validation(0.25)}]
    for step in range(1, 101):
        stage = int(step > 40)
        row = {
            "step": step, "stage": ("first", "second")[stage], "stage_index": stage,
            "reset": {41: "stage", 76: "plateau"}.get(step), "reward/mean": 0.5,
            "update/entropy": 0.3, "update/kl_ref": None, "time/sample_s": 1.0, "time_s": step,
        }  # fmt: skip
        rows.append(row | (validation(0.25 + step / 200) if step % 20 == 0 else {}))
    write_rows(tmp_path / "metrics.jsonl", rows)
    sample = {
        "step": 100, "domain": "math", "level": "easy", "prompt": "Compute 1 + 1.", "score": 1.0,
        "response": "<script>alert('x')</script> & more", "status": "ok", "detail": "",
        "advantage": 0.5, "stopped": True,
    }  # fmt: skip
    write_rows(tmp_path / "samples.jsonl", [sample] * 60)
    (tmp_path / "config.json").write_text(
        json.dumps({"total_steps": 100, "loss": {"kl_coef": 0.5}})
    )
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def validation(average):
    return {
        f"validation/all/{part}": value
        for part, value in zip(
            ("avg", "lo", "hi", "pass", "k"), (average, average - 0.1, average + 0.1, 0.9, 4),
            strict=True,
        )
    }  # fmt: skip


def finish(workdir):
    summary = {
        "steps": 100,
        "resets": [
            {"step": 40, "reason": "stage", "optimizer": True},
            {"step": 75, "reason": "plateau", "optimizer": False},
        ],
        "validation": {"base": {"all": scores(0.25)}, "final": {"all": scores(0.8125)}},
        "phases_s": {"sample": 75.0, "verify": 25.0},
    }
    (workdir / "summary.json").write_text(json.dumps(summary))


def page(workdir):
    return report.write_report(workdir).read_text()


def test_the_page_stands_alone_and_is_small(workdir):
    finish(workdir)
    html = page(workdir)
    assert not re.search(r"(src|href)\s*=", html) and "@import" not in html
    assert not re.search(r"https?://", html)
    assert html.count("<script") == 1 and len(html) < 500_000
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (allowed,) = re.findall(r'Content-Security-Policy" content="(.*?)"', html)
    assert allowed == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_the_timeline_is_that_of_the_last_step_and_to_scale(workdir):
    assert "Timeline of step" not in page(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows[-2:]:
        row["tokens/generated"] = 100
        row["timeline"] = [["sample", 0.0, 1.0], ["workers", 0.5, 2.0]]
    rows[-1]["timeline"] = [["sample", 0.0, 2.0], ["workers", 1.0, 2.0], ["update", 2.0, 4.0]]
    write_rows(workdir / "metrics.jsonl", rows)
    html = page(workdir)
    assert "Timeline of step 100" in html
    spans = re.findall(r'<rect class="span" x="([\d.]+)" width="([\d.]+)" y="(\d+)"', html)
    (x, wide, first), (later, half, second), (last, _, third) = [map(float, s) for s in spans]
    assert (later, last) == pytest.approx((x + wide / 2, x + wide), abs=0.2)
    assert half == pytest.approx(wide / 2, abs=0.2) and first < second < third


def test_responses_are_escaped(workdir):
    html = page(workdir)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more" in html
    assert html.count('<summary><b class="good">') == 60


def test_resets_are_marked_where_they_happened(workdir):
    finish(workdir)
    html = page(workdir)
    entropy = html[html.index("Entropy") :]
    ticks = {
        int(t): float(x) for x, t in re.findall(r'"tick" x="([\d.]+)" y="\d+">(\d+)<', entropy)
    }
    for step in (40, 75):  # on the axis that the reader sees
        x = ticks[0] + (ticks[100] - ticks[0]) * step / 100
        found = re.search(rf'data-step="{step}" x1="([\d.]+)" x2="([\d.]+)"', entropy)
        assert found and [float(end) for end in found.groups()] == pytest.approx([x, x], abs=0.11)
    assert "reset 2, after step 75: plateau" in html
    assert "<td>plateau</td><td></td><td>reference</td>" in html


def with_other_prompts_in_the_second_stage(workdir, **overrides):
    stages = [{"name": "first"}, {"name": "second", "overrides": overrides}]
    (workdir / "config.json").write_text(json.dumps({"validation": {"seed": 7}, "stages": stages}))
    return page(workdir)


def test_scores_on_other_prompts_are_not_compared(workdir):
    """Evaluations at 0, 20 and 40 ask the run's prompts, those from 60 on others."""
    finish(workdir)
    html = with_other_prompts_in_the_second_stage(workdir, **{"validation.seed": 8})
    rows = re.findall(
        r"<tr><td>all levels(.*?)</td><td>([\d.]+).*?<td>([\d.]+) .*?(\d+)</td></tr>", html
    )
    assert rows == [
        ("", "0.250", "0.812", "100"),
        (" (second), from step 60", "0.550", "0.750", "100"),
    ]
    assert "(second): evaluated otherwise than the base (validation.seed 8)" in html
    chart = report.validation_chart([report.read_workdir(workdir)], "all")
    curves = re.findall(r'<g class="(c\d)">.*?class="curve" d="(.*?)"', chart)
    assert [(style, len(re.findall("[ML]", d))) for style, d in curves] == [("c0", 4), ("c2", 3)]
    (workdir / "summary.json").unlink()  # as of a run that goes on
    html = page(workdir)
    assert re.search(r"<td>all levels</td><td>0.250.*?<td>0.450", html)


def test_other_numbers_of_samples_are_compared(workdir):
    same = {"validation.every": 5, "validation.samples": 9, "validation.seed": 7}
    html = with_other_prompts_in_the_second_stage(workdir, **same, **{"loss.kl_coef": 0.1})
    assert "evaluated otherwise" not in html and "+0.500" in html


def test_data_sets_have_rows_of_their_own(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        known = {k: v for k, v in row.items() if k.startswith("validation/all/")}
        row |= {k.replace("/all/", "/source/aime<24>/"): v for k, v in known.items()}
    write_rows(workdir / "metrics.jsonl", rows)
    assert "<td>source/aime&lt;24&gt;</td><td>0.250" in page(workdir)


def test_what_a_reset_says_of_itself_is_shown(workdir):
    rows = [{"step": 1, "reset": "KL <b>", "reset/values": {"kl": 0.123456, "limit": 0.1}}]
    rows[0]["reset/what"] = ["reference", "<i>"]
    write_rows(workdir / "metrics.jsonl", rows)
    cells = ("1", "0", "KL &lt;b&gt;", "kl 0.1235, limit 0.1", "reference, &lt;i&gt;")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page(workdir)


def test_base_and_final_numbers(workdir):
    finish(workdir)
    html = page(workdir)
    assert "<p>finished · step 100 of 100 · 2 stages · 2 resets · 1.7 min" in html
    for part in ("0.250 [0.", "0.812 [0.7", "+0.562", "0.900 (k=16)", "75.0", "final avg@k"):
        assert part in html


def test_an_unfinished_run_is_shown_as_far_as_it_is(workdir):
    html = page(workdir)
    assert "not finished · step 100 of 100" in html and "+0.500" in html


def test_a_summary_of_an_earlier_end_is_not_taken_for_the_final_one(workdir):
    finish(workdir)
    with open(workdir / "metrics.jsonl", "a") as file:  # the run is prolonged
        file.write(json.dumps({"step": 101, "reset": "schedule"}) + "\n")
    html = page(workdir)
    assert "not finished · step 101 of 100" in html and "0.812 [0.7" not in html
    assert "<td>schedule</td><td></td><td>reference, perhaps optimizer</td>" in html


def test_pass_at_different_k_is_not_joined_by_a_line(workdir):
    finish(workdir)  # k is 4 during the run, 16 at its end
    run = report.read_workdir(workdir)
    dashed = re.search(
        r'c1 dashed"><path class="curve" d="(.*?)"', report.validation_chart([run], "all")
    )
    assert dashed and len(re.findall("[ML]", dashed.group(1))) == 5  # steps 0, 20, 40, 60, 80


def test_a_run_without_rows_or_with_odd_text_is_shown(workdir):
    write_rows(workdir / "samples.jsonl", [{"step": 1, "response": "\ud800 " + "a" * 9000}])
    assert "[... 5002 characters ...]" in page(workdir)
    (workdir / "metrics.jsonl").write_text("")
    (workdir / "samples.jsonl").write_text("")
    assert "not finished · step 0 of 100" in page(workdir)


def test_a_gap_where_a_value_is_not_finite(workdir):
    rows = [{"step": s, "update/entropy": None if s == 2 else 0.5} for s in range(1, 5)]
    write_rows(workdir / "metrics.jsonl", rows)
    path = re.search(r'class="curve" d="(.*?)"', page(workdir))
    assert path and re.findall("[ML]", path.group(1)) == ["M", "M", "L"]


def test_a_long_line_keeps_its_extremes():
    points = [(s, 100.0 if s == 777 else None if s % 7 == 0 else s % 5) for s in range(3000)]
    drawn = list(charts._thinned(points))
    assert len(drawn) <= charts.MAX_POINTS and (777, 100.0) in drawn
    assert drawn == sorted(drawn) and set(drawn) <= set(points)
    assert list(charts._thinned(points[:400])) == points[:400]


def test_any_first_part_of_the_samples_is_spread():
    samples = [
        {"step": s, "domain": ("math", "code")[s % 50 == 0], "score": (0.0, 0.5, 1.0)[s // 7 % 3]}
        for s in range(1, 6001)
    ]
    first = report.spread(samples)[:60]
    assert len(report.spread(samples)) == 6000 and samples[-1] in first
    for domain in ("math", "code"):
        for score in (0.0, 0.5, 1.0):
            steps = [s["step"] for s in first if (s["domain"], s["score"]) == (domain, score)]
            assert 8 <= len(steps) <= 12
            edges = [0, *sorted(steps), 6000]
            assert max(b - a for a, b in zip(edges[:-1], edges[1:], strict=True)) < 1300


def test_long_responses_stay_within_the_budget_of_a_page(workdir):
    sample = {"step": 1, "domain": "math", "prompt": "'" * 9000, "response": "<" * 9000}
    write_rows(workdir / "samples.jsonl", [sample | {"step": s} for s in range(1, 500)])
    html = page(workdir)
    assert report.SAMPLE_BYTES * 0.9 < len(html) < report.SAMPLE_BYTES + 200_000
    assert re.search(r"<p>\d\d of the 499 recorded responses, spread over", html)


def test_several_runs_are_compared(workdir, tmp_path_factory, capsys):
    finish(workdir)
    other = tmp_path_factory.mktemp("other") / workdir.name  # the same name elsewhere
    shutil.copytree(workdir, other)
    config = {"total_steps": 100, "loss": {"kl_coef": 0.25}, "stages": [{"name": "x"}]}
    (other / "config.json").write_text(json.dumps(config))
    out = other / "both.html"
    assert report.main([str(workdir), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and not (workdir / "report.html").exists()
    html = out.read_text()
    for run, style in ((workdir, "c0"), (other, "c1")):
        cells = f'<td class="{style}">{run}</td><td>all levels</td><td>0.250'
        assert cells in html and f'<span class="{style}">{run} 0.3</span>' in html
        assert f'<option value="{run}">' in html
    assert f">{workdir}</td><td>loss.kl_coef</td><td>0.5</td>" in html
    assert f">{other}</td><td>loss.kl_coef</td><td>0.25</td>" in html
    assert "<td>stages.0.name</td><td>x</td>" in html and "<td>total_steps</td>" not in html
    assert html.count('class="reset" data-step="40"') == 2 * html.count("<svg ")
    assert report.main([str(workdir), str(other)]) == 0
    assert (workdir / "report.html").exists()


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "has no metrics.jsonl; give the --workdir of a training run" in capsys.readouterr().err
