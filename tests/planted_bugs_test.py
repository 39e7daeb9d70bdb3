from pathlib import Path

from tests.planted_bugs import BUGS

ROOT = Path(__file__).parents[1]


def test_every_planted_bug_still_has_its_place():
    assert len(BUGS) == 27
    for bug in BUGS:
        assert (ROOT / bug.file).read_text().count(bug.right) == 1, bug.name
        assert all((ROOT / test).is_file() for test in bug.tests.split()), bug.name
