import resource
import shutil
import time
from contextlib import closing, contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax.checkpoint import Checkpointer
from prolong_jax.config import CheckpointSettings
from prolong_jax.types import TrainState

SIZE = 100_000


def state(value: float) -> TrainState:
    """Weights that do not compress, so that a file has to hold them."""
    noise = jax.random.normal(jax.random.key(int(value)), (SIZE,))
    return TrainState({"w": noise}, {"w": noise + 1}, ({"m": noise * 2},))


def opened(directory, **settings) -> closing[Checkpointer]:
    return closing(Checkpointer(directory / "checkpoints", CheckpointSettings(**settings)))


def saved(directory, steps=(2, 4), **settings):
    """Checkpoints of some steps, the step as their content."""
    with opened(directory, **settings) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), {"step": step})


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_newest_comes_back(tmp_path):
    with opened(tmp_path) as checkpointer:
        assert checkpointer.resume(state(0)) is None
    saved(tmp_path)
    with opened(tmp_path) as checkpointer:
        found = checkpointer.resume(state(0))
    assert found is not None and found[1] == {"step": 4}
    assert_equal(found[0], state(4))


def test_what_is_kept(tmp_path):
    """The last two, the best, and every fifth; nothing goes before the newer one is complete."""
    with opened(tmp_path, keep=2, keep_every=5) as checkpointer:
        for step, best in ((1, None), (2, 2), (5, 2), (6, 2), (7, 2), (8, 7), (9, 7), (10, 7)):
            checkpointer.save(step, state(step), {}, best)
        checkpointer.save(11, state(11), {}, 7)
        assert checkpointer.steps == [5, 7, 10, 11]
        checkpointer.save(12, state(12), {}, 12)  # 7 is still what was best at step 11
        checkpointer.save(14, state(14), {}, 12)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps == [5, 10, 12, 14]
    assert sorted(p.stem for p in (tmp_path / "checksums").iterdir()) == ["10", "12", "14", "5"]


def test_weights_of_an_older_one_while_the_run_goes_on(tmp_path):
    """As a reset to the best one reads them, right after a save has begun."""
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.save(2, state(2), {})
        assert_equal(checkpointer.restore_params(state(0).params, 1), state(1).params)
        assert_equal(checkpointer.restore_params(state(0).params), state(2).params)
        with pytest.raises(ValueError, match="no checkpoint of step 3; found: 1, 2"):
            checkpointer.restore_params(state(0).params, 3)


def files_of(directory, step):
    return sorted(f for f in (directory / "checkpoints" / str(step)).rglob("*") if f.is_file())


def test_damage_to_any_file_is_found(tmp_path, capsys):
    saved(tmp_path)
    contents = {file: file.read_bytes() for file in files_of(tmp_path, 4)}
    assert len(contents) > 5
    for file, content in contents.items():
        for damage in (None, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            with opened(tmp_path) as checkpointer:
                name = str(file.relative_to(tmp_path / "checkpoints" / "4"))
                assert checkpointer._fault(4).startswith(name), (file, damage)
            file.write_bytes(content)
    with opened(tmp_path) as checkpointer:
        assert checkpointer._fault(4) == ""


def test_the_one_before_a_damaged_one_is_used(tmp_path, capsys):
    saved(tmp_path)
    files_of(tmp_path, 4)[-1].unlink()
    with opened(tmp_path) as checkpointer:
        found = checkpointer.resume(state(0))
        assert found is not None and found[1] == {"step": 2}
        checkpointer.save(4, state(9), {"step": 9})  # its place is free
    printed = capsys.readouterr().out
    assert "are put aside: step 4 (" in printed and "goes on from step 2" in printed
    with opened(tmp_path) as checkpointer:
        found = checkpointer.resume(state(0))
        assert found is not None and found[1] == {"step": 9}
    assert len(list((tmp_path / "damaged").glob("4-*/*"))) > 1  # nothing is deleted


def test_one_without_readable_checksums_is_not_trusted(tmp_path, capsys):
    saved(tmp_path)
    (tmp_path / "checksums" / "4.json").write_bytes(b'{"state/\xff')
    with opened(tmp_path) as checkpointer:
        found = checkpointer.resume(state(0))
    assert found is not None and found[1] == {"step": 2}
    assert "put aside: step 4 (its checksums cannot be read)" in capsys.readouterr().out


def test_without_a_whole_one_the_run_is_refused(tmp_path):
    saved(tmp_path, steps=(2,))
    max(files_of(tmp_path, 2), key=lambda f: f.stat().st_size).write_bytes(b"")
    with opened(tmp_path) as checkpointer:
        with pytest.raises(
            ValueError, match=r"no checkpoint is whole: step 2 \(state/.* has 0 bytes"
        ):
            checkpointer.resume(state(0))


def test_damage_shows_before_checksums_are_there_too(tmp_path):
    """As after a kill between the end of a save and that of its checksums."""
    saved(tmp_path)
    (tmp_path / "checksums" / "4.json").unlink()
    max(files_of(tmp_path, 4), key=lambda f: f.stat().st_size).write_bytes(b"")
    with opened(tmp_path) as checkpointer:
        found = checkpointer.resume(state(0))
    assert found is not None and found[1] == {"step": 2}


def test_another_model_is_no_damage(tmp_path):
    saved(tmp_path)
    other = TrainState({"v": jnp.zeros(3)}, {"v": jnp.zeros(3)}, ({"m": jnp.zeros(3)},))
    with opened(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="checkpoint of step 4 does not fit this model"):
            checkpointer.resume(other)
        assert checkpointer.steps == [2, 4]


def test_an_unfinished_save_is_removed_by_the_run_alone(tmp_path):
    saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "4", unfinished)
    settings = CheckpointSettings()
    with closing(Checkpointer(tmp_path / "checkpoints", settings, read_only=True)) as reader:
        assert reader.steps == [2, 4] and unfinished.exists()
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps == [2, 4]
        checkpointer.save(8, state(8), {})
    assert sorted(p.name for p in unfinished.parent.iterdir()) == ["4", "8"]


@contextmanager
def small_files(limit: int):
    """No file may grow beyond a limit, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_ones_before(tmp_path):
    saved(tmp_path)
    with small_files(SIZE):
        checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSettings())
        with pytest.raises(OSError):
            checkpointer.save(6, state(6), {"step": 6})
            checkpointer.save(8, state(8), {"step": 8})
        checkpointer.close()
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps == [2, 4]
        found = checkpointer.resume(state(0))
    assert found is not None
    assert_equal(found[0], state(4))


def test_a_failure_of_the_last_save_shows_at_the_end(tmp_path):
    saved(tmp_path)
    with small_files(SIZE), pytest.raises(OSError):
        with opened(tmp_path) as checkpointer:
            checkpointer.save(6, state(6), {"step": 6})


def test_the_size_of_a_save_is_told(tmp_path, capsys):
    begin = time.monotonic()
    saved(tmp_path, steps=(2,))
    (line,) = capsys.readouterr().out.splitlines()
    words = line.split()
    assert line.startswith("saved step 2: ") and 0.9 < float(words[3]) / (3 * SIZE * 4e-6) < 1.2
    assert 0 < float(words[6]) <= time.monotonic() - begin + 0.1
