import re

import pytest

from prolong_jax import sample
from prolong_jax.sample import Chat, main


def printed(capsys):
    """Without what a run in the same process says about compilations."""
    return re.sub(r"compiled .* in [\d.]+ s\n", "", capsys.readouterr().out)


def test_text_streams_and_ends_at_stop_strings(capsys, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 2)
    chat, pieces = Chat(), []
    prompt = "Compute 12 + 7."
    whole = chat(prompt, max_tokens=24, on_text=pieces.append)
    assert "".join(pieces) == whole and len([p for p in pieces if p]) > 2
    assert chat(prompt, max_tokens=24) == whole == printed(capsys)
    assert len({chat(prompt, max_tokens=24, seed=n, on_text=len) for n in range(4)}) > 1
    end = whole[3:5]
    cut = chat(prompt, max_tokens=24, stop=[end], on_text=len)
    assert end in cut and whole.startswith(cut) and cut != whole
    assert chat(prompt, max_tokens=24, stop=end, on_text=len) == cut
    flags = [f"--prompt={prompt}", "--max_tokens=24", f"--stop={end}"]
    capsys.readouterr()
    assert main(flags) == 0 and printed(capsys) == cut + "\n"


def test_an_answer_ends_where_the_positions_do():
    long = "7 " * 230
    whole = Chat()(long, temperature=1.0, top_p=1.0, max_tokens=10_000, stop="\x00", on_text=len)
    assert whole
    with pytest.raises(ValueError, match="leaves none of the model's 512 positions"):
        Chat()("7 " * 600)


def test_bad_settings_are_refused(capsys):
    for flags, message in (
        (["--temperature=0"], "expected temperature above 0"),
        (["--temperature=nan"], "expected temperature above 0"),
        (["--max_tokens=0"], "expected max_tokens of 1 or more, got 0"),
        (["--stop="], "expected texts, got an empty one"),
        (["--model=/nowhere"], "/nowhere"),
    ):
        assert main(["--prompt=hi", *flags]) == 2
        assert message in capsys.readouterr().err
