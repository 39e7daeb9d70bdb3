"""Text to tokens and back, with the chat template and the stop tokens that the model ships."""

import bisect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prolong_jax.model_files import local_directory


class ChatTokenizer:
    """A model directory's tokenizer, as the run uses it."""

    def __init__(self, directory: str | Path):
        """Reads the tokenizer files of a model directory, wherever `local_directory` finds it.

        Raises:
          ValueError: no usable tokenizer, no chat template, or no stop token.
        """
        directory = local_directory(directory, weights=False)
        # Else its import advises to install PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # A tokenizer.json is read as it stands. AutoTokenizer may choose a class that splits text by
        # rules of its own (Qwen2's for every model of type qwen2), and so other tokens.
        shipped = (directory / "tokenizer.json").exists()
        reader = PreTrainedTokenizerFast if shipped else AutoTokenizer
        try:
            self._tokenizer = reader.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"model.path: no usable tokenizer in {str(directory)!r} "
                f"({str(error).splitlines()[0]}); add its tokenizer files."
            ) from error
        if not self._tokenizer.encode("1 + 2", add_special_tokens=False):
            raise ValueError(
                f"model.path: the tokenizer in {str(directory)!r} has an empty vocabulary; add its "
                "tokenizer.json or tokenizer.model."
            )
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"model.path: the tokenizer in {str(directory)!r} has no chat template; "
                "add one to its tokenizer_config.json."
            )
        self.stop_ids = self._read_stop_ids(directory)

    def _read_stop_ids(self, directory: Path) -> tuple[int, ...]:
        """What the files declare; the default of a tokenizer class may be no token of the model."""
        names = ("generation_config.json", "config.json", "tokenizer_config.json")
        files = [directory / name for name in names]
        declared = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        stops = declared[0].get("eos_token_id")
        stops = declared[1].get("eos_token_id") if stops is None else stops
        if stops is None and declared[2].get("eos_token") is not None:
            stops = self._tokenizer.eos_token_id
        if stops is None or stops == []:
            raise ValueError(
                f"model.path: the tokenizer in {str(directory)!r} has no stop token; set "
                "eos_token in its tokenizer_config.json or eos_token_id in generation_config.json."
            )
        return (stops,) if isinstance(stops, int) else tuple(stops)

    @property
    def largest_id(self) -> int:
        return max(*self._tokenizer.get_vocab().values(), *self.stop_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], str]:
        """Token ids of the rendered chat, and the part of the answer that the template opened.

        The second value is "<think>" with the space after it where the template ends by opening
        the reasoning, as that of R1 does with "<think>\\n", else "".
        It goes in front of the response before a verifier reads it.
        """
        text = self._tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        opens = text.rstrip().endswith("<think>")
        return ids, text[text.rindex("<think>") :] if opens else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without its stop token."""
        kept = [i for i in ids if i not in self.stop_ids]
        # The clean-up that some files ask for removes spaces before punctuation, in programs too.
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def stop_finder(
    decode: Callable[[list[int]], str], strings: Sequence[str]
) -> Callable[[list[int]], int | None]:
    """A function: tokens of a response -> how many, at least, have one of the strings in their text.

    None where the text has none of them.

    Raises:
      ValueError: an empty string, which every text has.
    """
    if "" in strings:
        raise ValueError("stop strings: expected texts, got an empty one; leave it out.")

    def has_string(tokens: list[int]) -> bool:
        text = decode(tokens)
        return any(string in text for string in strings)

    def find(tokens: list[int]) -> int | None:
        if not strings or not has_string(tokens):
            return None
        return bisect.bisect_left(range(len(tokens)), True, key=lambda n: has_string(tokens[:n]))

    return find


class TextStream:
    """Pieces of text for tokens that come one by one; together they are `decode` of all tokens.

    A piece ends at a whole character: bytes of an unfinished one wait for the tokens that follow.
    Tokens are decoded together with the piece before them, since what a token adds may depend on
    its neighbours (the space in front of a sentencepiece word).
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []  # tokens of the last piece, then those that came after it
        self._shown = 0  # of these, the tokens whose text is out

    def push(self, token: int) -> str:
        """The piece that a token completes, "" where there is none."""
        self._window.append(token)
        piece = self.rest()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return piece

    def rest(self) -> str:
        """What is not out yet, where the tokens end inside of a character."""
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


def stream_text(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """The pieces of a `TextStream` for all tokens."""
    stream = TextStream(decode)
    yield from filter(None, map(stream.push, ids))
    yield from filter(None, [stream.rest()])
