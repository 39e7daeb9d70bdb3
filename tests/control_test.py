import os
import signal

from prolong_jax.control import Control


def test_a_request_is_taken_once_and_again_at_its_step(tmp_path):
    (tmp_path / "control.json").write_text('{"reset": true, "save": true, "advance": false}')
    with Control(tmp_path) as control:
        assert control.take(3) == {"reset", "save"}
        assert control.take(4) == frozenset()
    with Control(tmp_path) as control:  # a run that goes on from step 2
        assert [control.take(step) for step in (2, 3, 4)] == [set(), {"reset"}, set()]


def test_a_request_to_stop_is_not_repeated(tmp_path):
    (tmp_path / "control.json").write_text('{"stop": true}')
    with Control(tmp_path) as control:
        assert control.take(3) == {"stop"}
    with Control(tmp_path) as control:
        assert control.take(3) == frozenset()


def test_two_requests_at_one_step_are_both_kept(tmp_path):
    with Control(tmp_path) as control:
        for name in ("reset", "evaluate"):
            (tmp_path / "control.json").write_text(f'{{"{name}": true}}')
            control.take(3)
        assert control.take(3) == {"reset", "evaluate"}


def test_the_signal_asks_for_a_reset(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with Control(tmp_path) as control:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [control.take(7), control.take(8)] == [{"reset"}, set()]
    assert signal.getsignal(signal.SIGUSR1) == before
    with Control(tmp_path) as control:
        assert control.take(7) == {"reset"}


def test_a_kept_request_that_cannot_be_read_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "3.json").write_text("")
    (tmp_path / "control.json").write_text('{"evaluate": true}')
    with Control(tmp_path) as control:
        assert control.take(3) == {"evaluate"}
    assert "it is left as 3.json" in capsys.readouterr().out


def test_what_cannot_be_read_is_told_and_put_aside(tmp_path, capsys):
    for text, why in (
        ("{", "control.json: "),
        ('{"rest": true}', "expected an object of reset, advance, evaluate, save, stop"),
        ("[]", "got []"),
    ):
        (tmp_path / "control.json").write_text(text)
        with Control(tmp_path) as control:
            assert control.take(1) == frozenset()
        printed = capsys.readouterr().out
        assert why in printed and "it is left as control.taken" in printed
        assert (tmp_path / "control.taken").read_text() == text
        assert not (tmp_path / "control.json").exists()
