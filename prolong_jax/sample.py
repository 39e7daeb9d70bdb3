"""Answers a prompt: python -m prolong_jax.sample --model DIR --prompt "..." [--temperature=0.6 ...]

The text appears as it is sampled. In a notebook:

    from prolong_jax.sample import Chat
    chat = Chat("DIR")
    chat("What is 2 + 3?")
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prolong_jax.config import TINY_BASE, MeshSettings
from prolong_jax.mesh import make_mesh
from prolong_jax.models.decoder import sampling_copy
from prolong_jax.models.hf import load_model
from prolong_jax.next_token import SamplingRule, sample_keys
from prolong_jax.sampler import generate
from prolong_jax.slots import Request, Slots
from prolong_jax.tokenizer import ChatTokenizer, TextStream, stop_finder

CHUNK = 8  # tokens between two pieces of text
PROMPT_UNIT, ANSWER_UNIT = 64, 1024  # sizes of nearly equal length share their compilation


def show(piece: str) -> None:
    print(piece, end="", flush=True)


class Chat:
    """A model with its tokenizer, on the first device."""

    def __init__(self, model: str = TINY_BASE, dtype: str | None = None):
        """Loads a directory, hub name or address; bfloat16 unless the device is a CPU.

        Raises:
          ValueError: no model, or one that is not supported.
        """
        on_cpu = jax.default_backend() == "cpu"
        mesh = make_mesh(MeshSettings())
        kind = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))
        self.model, params = load_model(model, kind, mesh)
        self.params = sampling_copy(self.model, mesh, params)
        self.tokenizer = ChatTokenizer(model)

    def __call__(
        self,
        prompt: str,
        *,
        max_tokens: int = 1024,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        on_text: Callable[[str], object] = show,
        **sampling: Any,
    ) -> str:
        """Samples an answer.

        Args:
          prompt: the user's message.
          max_tokens: of the answer; fewer where the model has no positions for them.
          stop: a string, or several, that ends the answer.
          seed: another one gives another answer.
          on_text: gets each new piece of text.
          **sampling: temperature (0.6), top_k (0: all), top_p (0.95), min_p (0); see `SamplingRule`.

        Returns:
          The whole text, a stop string included.

        Raises:
          ValueError: settings out of range, or a prompt that leaves no room for an answer.
        """
        tokenizer, config = self.tokenizer, self.model.config
        rule = _rule(tokenizer.stop_ids, **sampling)
        tokens, opening = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        room = config.max_positions - len(tokens)
        if max_tokens < 1:
            raise ValueError(f"sampling: expected max_tokens of 1 or more, got {max_tokens}.")
        if room < 1:
            raise ValueError(
                f"sampling: a prompt of {len(tokens)} tokens leaves none of the model's "
                f"{config.max_positions} positions for an answer; shorten it."
            )
        budget = min(max_tokens, room)
        find = stop_finder(tokenizer.decode, [stop] if type(stop) is str else stop)
        stream, seen = TextStream(tokenizer.decode), [0]

        def watch(tokens: list[int]) -> int | None:
            kept = find(tokens)
            on_text("".join(map(stream.push, tokens[seen[0] : kept])))
            seen[0] = len(tokens)
            return kept

        sizes = (
            -(-n // unit) * unit for n, unit in ((len(tokens), PROMPT_UNIT), (budget, ANSWER_UNIT))
        )
        slots = Slots(1, *sizes, cache_lens=2, chunk=CHUNK)
        keys = sample_keys(seed, 0, [zlib.crc32(prompt.encode())], 1)[0]
        asked = iter([[Request(0, tokens, keys, budget)]])
        on_text(opening)
        (sample,) = generate(
            self.model, self.params, lambda free: next(asked, []), rule, slots, watch
        )
        on_text(stream.rest())
        return opening + tokenizer.decode(sample.tokens)


def _rule(
    stop_ids: Sequence[int],
    temperature: float = 0.6,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
) -> SamplingRule:
    if not temperature > 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            "sampling: expected temperature above 0, top_k of 0 or more, top_p in (0, 1] and "
            f"min_p in [0, 1), got {temperature}, {top_k}, {top_p} and {min_p}."
        )
    return SamplingRule(tuple(stop_ids), temperature, top_k, top_p, min_p)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prolong_jax.sample", allow_abbrev=False)
    parser.add_argument("--model", default=TINY_BASE, help="directory, hub name or address")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--temperature", type=float, default=0.6, help="above 0")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--max_tokens", type=int, default=1024)
    parser.add_argument("--stop", action="append", default=[], help="a string; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    try:
        Chat(args.pop("model"))(args.pop("prompt"), **args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
