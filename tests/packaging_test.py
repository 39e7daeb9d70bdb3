"""What a user receives: package data in the wheel and sdist, sound configs, a self-contained tree."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from prolong_jax.config import RunConfig, load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.py"))
BASE_MODEL_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
MAX_BASE_MODEL_BYTES = 8 * 2**20

# Places that exist on one machine only, and package indexes. Written in pieces, since this file is
# searched as well.
FORBIDDEN = ["[.][.]/" + "shared\\b", "(?<![\\w.])/" + "work/", "/" + "tmp/w/", "/" + "opt/"]
FORBIDDEN += ["/" + "root/", "pypi" + "[.]org", "python" + "hosted", "npm" + "js[.]"]
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # the builds change sys.argv
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


def repository_files() -> list[Path]:
    """All files of the checkout that git does not ignore, committed or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def assets() -> set[str]:
    """The package data on disk, named relative to the repository."""
    folder = ROOT / "prolong_jax" / "assets"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """File names in a wheel and in an sdist built from a copy of the tree, without a network."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "prolong_jax", tree / "prolong_jax", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=tree, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel_names = set(wheel.namelist())
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        members = [member.name for member in sdist.getmembers() if member.isfile()]
    return wheel_names, {name.split("/", 1)[1] for name in members}


def test_base_model_is_complete_and_small():
    folder = ROOT / "prolong_jax" / "assets" / "tiny_base"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == BASE_MODEL_FILES
    assert sum(sizes.values()) <= MAX_BASE_MODEL_BYTES, sizes


def test_wheel_and_sdist_hold_modules_and_assets(distributions: tuple[set[str], set[str]]):
    sources = (ROOT / "prolong_jax").rglob("*.py")
    expected = {path.relative_to(ROOT).as_posix() for path in sources} | assets()
    for names in distributions:
        assert expected <= names, expected - names


def test_wheel_holds_nothing_else(distributions: tuple[set[str], set[str]]):
    tops = {name.split("/")[0] for name in distributions[0]}
    assert len(tops) == 2 and "prolong_jax" in tops, tops  # and the metadata directory


def test_repository_names_no_foreign_place():
    pattern = re.compile("|".join(FORBIDDEN))
    found = []
    for path in repository_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        hits = [match.group() for match in pattern.finditer(text)]
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    assert not found, found


def test_there_are_configs():
    assert "tiny" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_says_what_it_is(path: Path):
    assert isinstance(load(path, overrides=[]), RunConfig)
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith('"""'), f"{path} must say what it reproduces, and how"
