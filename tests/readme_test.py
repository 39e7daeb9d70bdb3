import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def lines(path):
    return len(path.read_text().splitlines())


def test_the_afternoon_list_is_true():
    listed = re.findall(r"^\d\. \[(\w+)\.py\]\((\S+)\) \((\d+) lines\)", README, re.MULTILINE)
    core = "types masked losses advantages stages sampler update rollout train".split()
    assert [name for name, _, _ in listed] == core
    for name, path, count in listed:
        assert int(count) == lines(ROOT / path), f"{name}.py has {lines(ROOT / path)} lines"
    total = sum(int(count) for _, _, count in listed)
    package = sum(lines(path) for path in (ROOT / "prolong_jax").rglob("*.py"))
    assert f"{total:,} lines; the whole package has {package:,}." in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target
