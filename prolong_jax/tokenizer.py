"""Text to tokens and back, with the chat template and the stop tokens that the model ships."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class ChatTokenizer:
    """A model directory's tokenizer, as the run uses it."""

    def __init__(self, directory: str | Path):
        """Reads the tokenizer files of a model directory.

        Raises:
          ValueError: no usable tokenizer, no chat template, or no stop token.
        """
        # Else its import advises to install PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"model.path: no usable tokenizer in {str(directory)!r} "
                f"({str(error).splitlines()[0]}); add its tokenizer files."
            ) from error
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"model.path: the tokenizer in {str(directory)!r} has no chat template; "
                "add one to its tokenizer_config.json."
            )
        if not self._tokenizer.encode("1 + 2", add_special_tokens=False):
            raise ValueError(
                f"model.path: the tokenizer in {str(directory)!r} has an empty vocabulary; add its "
                "tokenizer.json or tokenizer.model."
            )
        self.stop_ids = self._read_stop_ids(Path(directory))
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[0] if pad is None else pad

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

        The second value is "<think>" where the template ends by opening the reasoning, else "".
        It goes in front of the response before a verifier reads it.
        """
        text = self._tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids, "<think>" if text.rstrip().endswith("<think>") else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without its stop token."""
        kept = [i for i in ids if i not in self.stop_ids]
        return self._tokenizer.decode(kept, skip_special_tokens=False)
