"""Makes the embedded base model: python experiments/pretrain_tiny.py [--out DIR] [--seed 0]

A tokenizer (byte-level BPE) and a small Qwen2 decoder are trained on worked responses to the
procedural tasks, first careful ones, then ones with slips. That leaves a model that knows the
methods and often gets a step wrong, which is what RL starts from.
About 20 minutes on 2 cores. Only questions of the train split are used.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prolong_jax.data import procedural
from prolong_jax.models.attention import packed_mask
from prolong_jax.models.decoder import Model, ModelConfig
from prolong_jax.models.hf import save_pretrained
from prolong_jax.types import PyTree

PAD, STOP, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = [PAD, STOP, USER, ASSISTANT, "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
SHAPE = ModelConfig(
    vocab_size=768,
    width=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ff_dim=512,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tied_head=True,
    max_positions=512,
)
ROW = 192  # tokens of a packed row
ROWS = 16  # rows of an optimizer step
SHARE = {"easy": 0.35, "middle": 0.45, "hard": 0.2}  # of the levels


class Phase(NamedTuple):
    name: str
    steps: int  # optimizer steps
    share: dict[str, float]  # of the levels
    right: dict[
        str, float
    ]  # chance that all steps of a response are right, by level or domain/level


COURSE = (
    Phase("careful", 2000, SHARE, {"easy": 1.0, "middle": 1.0, "hard": 1.0}),
    Phase("slips", 500, SHARE, {"easy": 0.45, "middle": 0.28, "hard": 0.015}),
)
# Evens out what the first two phases leave: domains that are too good or too bad at a level.
EVENING = (
    Phase(
        "evening",
        400,
        {"easy": 0.3, "middle": 0.3, "hard": 0.4},
        {
            **{"math/easy": 0.5, "math/middle": 0.4, "math/hard": 0.03},
            **{"code/easy": 0.45, "code/middle": 0.35, "code/hard": 0.003},
            **{"stem/easy": 0.6, "stem/middle": 0.4, "stem/hard": 0.0002},
            **{"logic/easy": 0.5, "logic/middle": 0.3, "logic/hard": 0.00001},
            **{"instruct/easy": 0.4, "instruct/middle": 0.2, "instruct/hard": 0.01},
        },
    ),
)


def draw(rng: random.Random, phase: Phase) -> tuple[str, str]:
    """A question and a response to it."""
    domain = rng.choice(procedural.DOMAINS)
    level = rng.choices(list(phase.share), list(phase.share.values()))[0]
    problem = procedural.make_problem(domain, level, "train", 1, rng.randrange(10**9))
    chances = procedural.CountedSlips(rng)
    problem.work(chances)
    right = phase.right[level if level in phase.right else f"{domain}/{level}"]
    rate = 1 - right ** (1 / max(1, chances.count))
    return problem.question, problem.work(procedural.Slips(rng, rate))


def train_tokenizer(rng: random.Random) -> Tokenizer:
    texts = [text for _ in range(8000) for text in draw(rng, COURSE[1])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed_batches(
    tokenizer: Tokenizer, rng: random.Random, phase: Phase
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of rows, each row several conversations one after the other."""
    waiting: list[tuple[list[int], list[int]]] = []  # prompt ids, answer ids

    def encode() -> tuple[list[int], list[int]]:
        question, response = draw(rng, phase)
        prompt = tokenizer.encode(f"{USER}{question}{ASSISTANT}<think>").ids
        return prompt, tokenizer.encode(f"{response}{STOP}").ids

    def fill_row() -> np.ndarray:
        row: list[tuple[int, bool, int, int]] = []  # token, is response, position, segment
        segment = 1
        while True:
            waiting.extend(encode() for _ in range(20 - len(waiting)))
            fitting = (w for w in waiting if len(w[0]) + len(w[1]) <= ROW - len(row))
            chosen = next(fitting, None)
            if chosen is None:
                return np.array(row + [(0, False, 0, 0)] * (ROW - len(row)))
            waiting.remove(chosen)
            ids = chosen[0] + chosen[1]
            row += [(t, i >= len(chosen[0]), i, segment) for i, t in enumerate(ids)]
            segment += 1

    names = ("tokens", "is_response", "positions", "segments")
    while True:
        stacked = np.stack([fill_row() for _ in range(ROWS)]).transpose(2, 0, 1)
        yield dict(zip(names, stacked.astype(np.int32), strict=True))


def nll(model: Model, params, rows) -> jax.Array:
    """Mean negative log-likelihood of the response tokens of one micro-batch."""
    mask = packed_mask(rows["segments"], rows["segments"])
    hidden, _ = model.hidden(params, rows["tokens"], rows["positions"], mask)
    logits = model.logits(params, hidden[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows["tokens"][:, 1:])
    weight = rows["is_response"][:, 1:]
    return (loss * weight).sum() / weight.sum()


def train(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    rng: random.Random,
    phases: Sequence[Phase],
    schedule: optax.Schedule,
) -> PyTree:
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, rows):
        micro = jax.tree.map(lambda x: x.reshape(2, ROWS // 2, *x.shape[1:]), rows)

        def add(carry, rows):
            loss, grads = jax.value_and_grad(lambda p: nll(model, p, rows))(params)
            return jax.tree.map(jnp.add, carry, (loss / 2, jax.tree.map(lambda g: g / 2, grads))), 0

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(add, zero, micro)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    start = time.monotonic()
    for phase in phases:
        batches = packed_batches(tokenizer, rng, phase)
        for done in range(1, phase.steps + 1):
            params, opt_state, loss = step(params, opt_state, next(batches))
            if done % 50 == 0:
                seconds = time.monotonic() - start
                print(f"{seconds:5.0f} s  {phase.name} {done}/{phase.steps}  nll {loss:.4f}")
    return params


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHAPE.max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    stop, pad = tokenizer.token_to_id(STOP), tokenizer.token_to_id(PAD)
    generation = {"eos_token_id": stop, "pad_token_id": pad, "do_sample": True, "temperature": 1.0}
    for name, content in (("tokenizer_config", config), ("generation_config", generation)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prolong_jax/assets/tiny_base"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(random.Random(args.seed))
    model = Model(SHAPE)
    course = sum(phase.steps for phase in COURSE)
    warm = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, course, 5e-4)
    params = model.init(jax.random.key(args.seed))
    params = train(model, params, tokenizer, random.Random(args.seed), COURSE, warm)
    rng = random.Random(args.seed + 1)
    params = train(model, params, tokenizer, rng, EVENING, optax.constant_schedule(5e-4))
    save_pretrained(args.out, model, params)
    save_tokenizer(tokenizer, args.out)


if __name__ == "__main__":
    main()
