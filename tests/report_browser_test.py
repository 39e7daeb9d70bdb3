"""The report in a real browser: python -m pip install playwright, and a chromium on the PATH.

Skips where either is missing; playwright weighs 165 MB, so that it is in no extra.
"""

import json
import math
import random
import shutil

import pytest

from prolong_jax import report
from prolong_jax.config import DOMAINS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on the PATH")

STEPS, SAMPLES_PER_STEP, STAGE_LEN = 1500, 4, 375
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"\' onmouseover="window.hacked = 1',
    "NUL \0 lone \ud800 </pre></details><b>bold</b> &amp; &#60;",
    "</style></title><iframe srcdoc='<script>parent.hacked = 1</script>'>",
)


def metrics_row(step, random_source):
    stage = (step - 1) // STAGE_LEN
    wave, noise = math.sin(step / 40), random_source.random()
    row = {
        "step": step, "stage": ("warm up", *HOSTILE[:3])[stage], "stage_index": stage,
        "reset": None, "reward/mean": 0.3 + step / 3000 + noise / 20,
        "response/len_mean": 300 + 50 * wave, "response/len_max": 900 + 80 * noise,
        "response/terminated": 0.95, "tokens/generated": 50_000, "tokens/per_s": 3000 + 200 * noise,
        "time_s": 20.0 * step, "time/step_s": 20.0, "memory/rss_mb": 1500 + 10 * noise,
        "verify/timeouts": int(noise > 0.97), "verify/errors": 0, "verify/math/count": 64,
        "verify/math/timeouts": 0, "verify/math/errors": 0, "time/verify_math_p50_s": 0.002,
        "time/verify_math_p99_s": 0.5 * noise, "time/verdict_mean_s": 0.01 + 0.01 * noise,
        "time/verdict_p95_s": 0.2, "time/verdict_max_s": 1 + noise, "groups/kept": 16,
        "groups/all_zero": 5, "groups/all_one": 9 * noise, "groups/surplus": 2,
    }  # fmt: skip
    row |= {f"reward/{d}": 0.2 + step / 3000 + random_source.random() / 5 for d in DOMAINS}
    for name in ("entropy", "kl_ref", "kl_old", "grad_norm", "clip_fraction_low", "learning_rate",
                 "clip_fraction_high", "ratio_min", "ratio_max", "advantage_std"):  # fmt: skip
        row[f"update/{name}"] = 0.3 + 0.1 * wave + 0.05 * random_source.random()
    row |= {f"time/{phase}_s": 3.0 + noise for phase in report.PHASES}
    if step in (300, 376, 751, 1000, 1126):
        row |= {"reset": HOSTILE[step % 5], "reset/values": {"kl": 0.12, "limit": 0.1}}
        row["reset/what"] = ["reference", "optimizer"]
    return row | (validation_row(step) if step % 20 == 0 else {})


def validation_row(step):
    scores = {"avg": 0.2 + step / 3000, "lo": 0.15 + step / 3000, "hi": 0.25 + step / 3000}
    scores |= {"pass": 0.5 + step / 4000, "k": 4}
    return {
        f"validation/{name}/{part}": value
        for name in report.VALIDATION_SETS
        for part, value in scores.items()
    }


def sample_rows(random_source):
    for step in range(1, STEPS + 1):
        for number in range(SAMPLES_PER_STEP):
            score = random_source.choice((0.0, 0.0, 0.25, 1.0))
            text = HOSTILE[number] if step % 50 == 0 else "some words of an answer. "
            yield {
                "step": step, "domain": random_source.choice(DOMAINS), "level": "easy",
                "prompt": text, "response": text * random_source.randrange(1, 200), "score": score,
                "status": "ok", "detail": text, "advantage": score - 0.5, "stopped": True,
            }  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of 1,500 steps in 4 stages with 6,000 responses, some of them hostile."""
    workdir, random_source = tmp_path_factory.mktemp("long"), random.Random(0)
    rows = [{"step": 0, "time_s": 9.0, **validation_row(0)}]
    rows += [metrics_row(step, random_source) for step in range(1, STEPS + 1)]
    for name, values in (("metrics", rows), ("samples", sample_rows(random_source))):
        lines = "".join(json.dumps(row) + "\n" for row in values)
        (workdir / f"{name}.jsonl").write_text(lines)
    (workdir / "config.json").write_text(json.dumps({"total_steps": STEPS, "model": {"path": "x"}}))
    return workdir


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page, and at the end of the test refuses errors and requests that it made."""
    complaints, pages = [], []

    def open_page(path, **settings):
        page = browser.new_page(**settings)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url == path.as_uri() or complaints.append(r.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, iframe, pre b").count() == 0
        assert page.locator("script").count() == 1
        page.close()
    assert not complaints


def shown(page):
    """The facts of the responses that can be seen."""
    script = "all => all.map(e => [e.dataset.domain, +e.dataset.step, +e.dataset.score])"
    return [tuple(x) for x in page.locator("#samples > details:visible").evaluate_all(script)]


def test_a_long_run_is_small_and_shown_at_any_width(workdir, opened):
    path = report.write_report(workdir)
    assert path.stat().st_size < 5_000_000
    for width in (1280, 390, 320):
        page = opened(path, viewport={"width": width, "height": 844})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        assert page.locator("svg").count() > 20
        assert page.locator(".band").count() == 4 * page.locator("svg:has(.band)").count()
    marks = page.locator("svg").first.locator(".reset")
    assert [int(m.get_attribute("data-step")) for m in marks.all()] == [299, 375, 750, 999, 1125]


def test_filters_show_what_they_say(workdir, opened):
    page = opened(report.write_report(workdir))
    everything = shown(page)
    assert 300 < len(everything) <= report.MAX_SAMPLES and "of the 6000" in page.content()
    assert {domain for domain, _, _ in everything} == set(DOMAINS)
    assert min(s for _, s, _ in everything) < 50 and max(s for _, s, _ in everything) > 1450
    bound = everything[len(everything) // 2][1]
    for choices, keep in (
        ({"domain": "math"}, lambda d, s, p: d == "math"),
        ({"domain": "code", "score": "full"}, lambda d, s, p: d == "code" and p == 1),
        ({"score": "part"}, lambda d, s, p: 0 < p < 1),
        ({"first": str(bound)}, lambda d, s, p: s >= bound),
        ({"first": "300", "last": str(bound)}, lambda d, s, p: 300 <= s <= bound),
        ({"domain": "logic", "last": "900"}, lambda d, s, p: d == "logic" and s <= 900),
    ):
        page.click("button[type=reset]")
        sync_api.expect(page.locator("#shown")).to_contain_text(f"{len(everything)} of")
        for name, value in choices.items():
            control = page.locator(f"#filters [name={name}]")
            control.select_option(value) if name in ("domain", "score") else control.fill(value)
        expected = [facts for facts in everything if keep(*facts)]
        assert 0 < len(expected) < len(everything)
        assert shown(page) == expected
        assert page.locator("#shown").inner_text() == f"{len(expected)} of {len(everything)} shown"
    page.locator("#filters [name=last]").press("Enter")  # sends nothing, and stays
    page.locator("#samples summary:visible").first.click()
    assert page.locator("#samples pre:visible").count() >= 2


def test_hostile_texts_stay_text(workdir, opened):
    page = opened(report.write_report(workdir))
    page.fill("[name=first]", "1500")
    texts = [
        page.locator("#samples details:visible pre").nth(i).text_content()
        for i in range(page.locator("#samples details:visible pre").count())
    ]
    shown_as = [t.replace("\0", "\ufffd").replace("\ud800", "?") for t in HOSTILE]
    assert texts and all(any(t.startswith(h) for h in shown_as) for t in texts)
    reasons = page.locator("h2:text-is('Resets') + .card td:nth-child(3)").all_text_contents()
    assert reasons == [shown_as[step % 5] for step in (300, 376, 751, 1000, 1126)]
    assert (
        page.locator("h2:text-is('Resets') + .card").inner_text().count("kl 0.12, limit 0.1") == 5
    )


def test_dark_mode_is_dark(workdir, opened):
    for scheme, is_dark in (("light", False), ("dark", True)):
        page = opened(report.write_report(workdir), color_scheme=scheme)
        for selector in ("body", ".card", "#filters select"):
            style = f"getComputedStyle(document.querySelector('{selector}'))"
            back, ink = (
                sum(map(float, page.evaluate(f"{style}.{part}.match(/[0-9.]+/g)")[:3]))
                for part in ("backgroundColor", "color")
            )
            assert (back < 150) == is_dark and abs(back - ink) > 400, (scheme, selector)


def test_without_scripts_the_responses_are_there(workdir, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(report.write_report(workdir).as_uri())
    assert page.locator("#samples > details:visible").count() > 300
    assert not page.locator("#filters").is_visible()


def test_runs_are_compared_in_one_page(workdir, opened, tmp_path):
    other = tmp_path / "<b>other"
    other.mkdir()
    for name in ("metrics", "samples"):
        rows = (workdir / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (other / f"{name}.jsonl").write_text("".join(rows[: len(rows) // 2]))
    path = report.write_report(workdir, other, out=tmp_path / "both.html")
    assert path.stat().st_size < 5_000_000
    page = opened(path, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first = page.locator("svg").first
    assert first.locator(".curve").count() == 2
    assert page.locator(".keys").first.locator("span").count() == 2
    page.select_option("[name=run]", other.name)
    steps = [step for _, step, _ in shown(page)]
    assert steps and max(steps) <= STEPS / 2 + 1
