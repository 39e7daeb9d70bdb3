"""The notebooks: committed without outputs, and executed from top to bottom."""

import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
LIMIT_S = 120  # of CPU, so that a busy machine fails nothing; on two cores a notebook takes less
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {
        "read_a_run",
        "use_your_own_verifier",
        "loss_ablations",
        "entropy_and_clipping",
    }


@EVERY
def test_is_committed_without_outputs(path):
    """As nbformat writes it: a line of source to a line of text, keys in order."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, (
                f"cell {cell.id} has outputs; jupyter nbconvert --clear-output --inplace {path.name}"
            )
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert text == nbformat.writes(notebook) + "\n"


@EVERY
def test_executes(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PROLONG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compilation
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the eight virtual devices of the other tests
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    before = cpu_of_children()
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1200, resources=where).execute()  # raises what a cell raises
    assert cpu_of_children() - before < LIMIT_S
