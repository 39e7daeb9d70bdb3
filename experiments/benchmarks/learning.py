"""Reward against samples beside tunix, on the same toy:

python -m experiments.benchmarks.learning --toy=even --tunix_python=VENV/bin/python --out=DIR

Toys: `even`, the share of even ids in a response of random weights to random ids; `logic`, the
embedded base model on the embedded logic tasks, easy and middle, scored by their verifier. Both
programs start from the same files, see the same prompts in the same order, take 8 responses to each
of 8 prompts for a step, and are scored by this process. Curves are the mean score of held-out
prompts, sampled by each program itself at temperature 1 from the full distribution.

Ours has the settings of configs/tiny_prolonged.py (constant learning rate, two updates per step,
groups of equal rewards left out, here without drawing others for them); tunix has those of its own
documentation, see RECIPES, and in further runs those of ours. Learning rates of models of billions
of weights teach these small ones nothing, so both sides choose among the same ones by runs with a
seed and prompts of their own: the recipe at the middle rate, then the rate, by the mean score
over a run. Runs are kept in DIR/TOY.json, and the same command goes on where it was stopped.
"""

import argparse
import json
import random
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from prolong_jax.config import TINY_BASE, RunConfig, build
from prolong_jax.data.mixture import Sources, prompt_at
from prolong_jax.data.procedural import validation_prompts
from prolong_jax.data.prompts import Prompt
from prolong_jax.tokenizer import ChatTokenizer
from prolong_jax.verifiers import VERIFIERS, Verdict

PROMPTS, GROUP, HELD_OUT, SAMPLES = 8, 8, 24, 8
TRIAL = 100  # seed of the runs that choose; they are scored at the start, the middle and the end
Rows = list[tuple[int, float]]  # samples so far, and the mean score of the held-out prompts

# Where tunix documents its settings of GRPO: examples/rl/grpo/gsm8k/configs/qwen3.yaml and
# examples/grpo_gemma.ipynb; examples/deepscaler/configs/deepseek_r1_distill_qwen_1.5b_colocate.yaml.
# Both: AdamW, b1 0.9, b2 0.99, the rate warmed up for a tenth of the steps, then a cosine to 0. With
# one update per step every ratio is 1, so that nothing is clipped. The seed of sampling is one
# setting for a whole run: tunix draws with the same noise in every step.
RECIPES: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "algorithm": {"beta": 0.08, "epsilon": 0.2},
        "rollout": {"temperature": 0.9, "top_p": 1.0, "top_k": 50},
        "optimizer": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
        "max_grad_norm": 0.1,
        "decays": True,
        "updates": 1,  # per step
    },
    "deepscaler": {
        "algorithm": {"beta": 0.0, "epsilon": 0.2, "loss_agg_mode": "token-mean"},
        "rollout": {"temperature": 0.8, "top_p": 0.95, "top_k": None},
        "optimizer": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.01},
        "max_grad_norm": 1.0,
        "decays": True,
        "updates": 1,
    },
}
# Those of ours: what is left is the program.
MATCHED = {
    "algorithm": {"beta": 1e-3, "kl_loss_mode": "low_var_kl", "loss_agg_mode": "token-mean"},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": None},
    "optimizer": {"b1": 0.9, "b2": 0.95, "weight_decay": 0.0},
    "max_grad_norm": 1.0,
    "decays": False,
    "updates": 2,
}


class Ids:
    """Tokens as characters of their own; the stop token is one that no model draws."""

    first, stop_ids = 0x4E00, (2000,)

    def encode_chat(self, messages: Sequence[Any]) -> tuple[list[int], str]:
        return [ord(c) - self.first for c in messages[0]["content"]], ""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(self.first + i) for i in ids)


def share_of_even(response: str, reference: Any) -> Verdict:
    return Verdict(sum((ord(c) - Ids.first) % 2 == 0 for c in response) / max(1, len(response)))


@dataclass
class Judge:
    """Scores in this process, in the place of a pool."""

    score: Callable[[str, Any], Verdict]
    done: list[tuple[Any, Verdict]] = field(default_factory=list)

    def submit(self, item_id: Any, verifier: str, response: str, reference: Any) -> None:
        self.done.append((item_id, self.score(response, reference)))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Any, Verdict]]:
        done, self.done = self.done, []
        return done

    as_completed = poll


@dataclass(frozen=True)
class Toy:
    steps: int
    every: int  # steps between scorings
    max_prompt_len: int
    max_response_len: int
    prompt: Callable[[int, int], Prompt]  # seed and position: of training
    held_out: Callable[[bool], list[Prompt]]  # whether they are to choose by, or to report
    rates: tuple[float, float, float]


def random_ids(seed: int, position: int) -> Prompt:
    draw = random.Random(f"ids/{seed}/{position}").randrange
    text = Ids().decode([draw(6, 768) for _ in range(8)])
    name = f"ids/{seed}/{position}"
    return Prompt(name, "logic", "", "logic", ({"role": "user", "content": text},), {}, "toy")


def logic(seed: int, position: int) -> Prompt:
    return prompt_at(position, seed, {"logic": 1.0}, {"easy": 1.0, "middle": 1.0})


def held_out_logic(chooses: bool) -> list[Prompt]:
    """The choice is by other draws of the training split."""
    if chooses:
        return [logic(12345, i) for i in range(HELD_OUT)]
    return validation_prompts(("logic",), ("easy", "middle"), HELD_OUT // 2, 7)


def held_out_ids(chooses: bool) -> list[Prompt]:
    return [random_ids(-1 - chooses, i) for i in range(HELD_OUT)]


TOYS = {
    "even": Toy(20, 5, 8, 16, random_ids, held_out_ids, (3e-4, 1e-3, 3e-3)),
    "logic": Toy(20, 10, 64, 128, logic, held_out_logic, (1e-4, 3e-4, 1e-3)),
}


# --- ours ----------------------------------------------------------------------------------------


def settings(toy: Toy, directory: str, rate: float, seed: int) -> RunConfig:
    row_len = toy.max_prompt_len + 4 * (toy.max_response_len + 1)
    sizes = {"prompts_per_step": PROMPTS, "group_size": GROUP, "sample_rows": PROMPTS * GROUP}
    lengths = {"max_prompt_len": toy.max_prompt_len, "max_response_len": toy.max_response_len}
    values = {
        "seed": seed,
        "model": {"path": directory, "dtype": "float32", "remat": "none"},
        "rollout": {**sizes, **lengths, "temperature": 1.0, "max_sampling_rounds": 1}
        | {"cache_lens": 4, "compile_ahead": False},
        "loss": {"kl_coef": 1e-3},
        "optimizer": {"learning_rate": rate, "warmup_steps": 8},
        "update": {"micro_batch_rows": 1, "row_len": row_len, "num_minibatches": 2},
        "validation": {"temperature": 1.0, "top_p": 1.0},
        "stages": [{"mixture": {"logic": 1.0}}],
    }
    return build(RunConfig, values)


def ours(toy: Toy, directory: str, means: tuple[Any, Any], rate: float, seed: int) -> Rows:
    """Steps of the training loop itself, with the toy's tokenizer and verifier."""
    import jax.numpy as jnp

    from prolong_jax.evaluate import respond
    from prolong_jax.host import Host
    from prolong_jax.mesh import make_mesh
    from prolong_jax.models.decoder import sampling_copy
    from prolong_jax.models.hf import load_model
    from prolong_jax.processes import Timer
    from prolong_jax.rollout import Collector
    from prolong_jax.train import Setup, initial_state, train_step

    run, (tokenizer, judge) = settings(toy, directory, rate, seed), means
    mesh = make_mesh(run.mesh)
    model, params = load_model(directory, jnp.dtype("float32"), mesh)
    collector = Collector(model, mesh, tokenizer, judge, seed)
    held_out = toy.held_out(seed == TRIAL)
    sources = Sources({"toy": lambda i: toy.prompt(seed, i)}, {"toy": ("logic", 1.0)})
    setup = Setup(run, collector, held_out, (held_out,), sources)
    state, host, timer, rows = initial_state(run, params), Host(), Timer(), []
    for step in range(toy.steps + 1):
        if step % toy.every == 0:
            policy = sampling_copy(model, mesh, state.params)
            groups = respond(collector, policy, held_out, SAMPLES, run, step, timer)
            rows.append((host.samples, statistics.mean(s for g in groups for s in g.scores)))
        if step < toy.steps:
            state, _, _ = train_step(setup, state, host, timer)
            host.progress = replace(host.progress, step=step + 1)
    return rows


# --- tunix ---------------------------------------------------------------------------------------


def tunix(toy: Toy, directory: str, means: tuple[Any, Any], job: dict[str, Any]) -> Rows:
    """A run of learning_tunix.py, which asks here what its responses are worth."""
    tokenizer, judge = means
    held_out = toy.held_out(job["seed"] == TRIAL)
    train = [toy.prompt(job["seed"], i) for i in range(PROMPTS * toy.steps)]
    prompts = train + held_out
    chats = [tokenizer.encode_chat(prompt.messages) for prompt in prompts]
    text_of = Ids().decode if isinstance(tokenizer, Ids) else tokenizer.decode
    known = (RECIPES | {"matched": MATCHED})[job["recipe"]] | {
        "model": directory,
        "ids": isinstance(tokenizer, Ids),
        "texts": [text_of(ids) for ids, _ in chats],
        "tokens": [ids for ids, _ in chats],
        "train": len(train),
        "sizes": [PROMPTS, GROUP, SAMPLES, toy.steps, toy.every],
        "lengths": [toy.max_prompt_len, toy.max_response_len],
        "rate": job["rate"],
        "seed": job["seed"],
    }
    here, there = Pipe()
    with tempfile.TemporaryFile("w+") as log, here:
        command = [job["python"], str(Path(__file__).with_name("learning_tunix.py"))]
        with there:
            process = subprocess.Popen(
                [*command, str(there.fileno())], pass_fds=[there.fileno()], stdout=log, stderr=log
            )
        here.send(known)
        try:
            while isinstance(message := here.recv(), dict):
                asked = zip(message["prompts"], message["responses"], strict=True)
                verdicts = [
                    judge.score(chats[i][1] + text, prompts[i].reference) for i, text in asked
                ]
                here.send([verdict.score for verdict in verdicts])
        except EOFError:
            log.seek(0)
            raise SystemExit(f"tunix failed:\n{log.read()[-3000:]}") from None
        finally:
            process.wait()
    return message


# --- the comparison ------------------------------------------------------------------------------


@cache
def random_weights(seed: int) -> tempfile.TemporaryDirectory:
    """A model directory of the base model's shape, kept until this process ends."""
    import jax
    import jax.numpy as jnp

    from prolong_jax.models.hf import load_model, save_pretrained

    place = tempfile.TemporaryDirectory()
    model, _ = load_model(TINY_BASE, jnp.dtype("float32"))
    save_pretrained(place.name, model, model.init(jax.random.key(seed)), source=TINY_BASE)
    return place


class Runs:
    """The runs of a toy, in a file; what is missing is run."""

    def __init__(self, name: str, python: str, file: Path):
        self.name, self.toy, self.python, self.file = name, TOYS[name], python, file
        self.known: dict[str, Rows] = json.loads(file.read_text()) if file.exists() else {}
        self.judge = Judge(share_of_even if name == "even" else VERIFIERS["logic"])
        self.tokenizer = Ids() if name == "even" else ChatTokenizer(TINY_BASE)

    def get(self, recipe: str, rate: float, seed: int) -> Rows:
        key = f"{recipe} {rate:g} {seed}"
        if key not in self.known:
            directory = random_weights(seed).name if self.name == "even" else TINY_BASE
            means, toy = (self.tokenizer, self.judge), self.toy
            if seed == TRIAL:
                toy = replace(toy, every=toy.steps // 2)
            if recipe == "ours":
                rows = ours(toy, directory, means, rate, seed)
            else:
                job = {"recipe": recipe, "rate": rate, "seed": seed, "python": self.python}
                rows = tunix(toy, directory, means, job)
            self.known[key] = rows
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1) + "\n")
        print(f"{key:24}", " ".join(f"{score:.3f}" for _, score in self.known[key]), flush=True)
        return self.known[key]

    def best(self, recipes: Sequence[str]) -> tuple[str, float]:
        """The recipe that is best at the middle rate, and the best rate for it."""

        def score(recipe: str, rate: float) -> float:
            return statistics.mean(score for _, score in self.get(recipe, rate, TRIAL))

        recipe = max(recipes, key=lambda one: score(one, self.toy.rates[1]))
        return recipe, max(self.toy.rates, key=lambda rate: score(recipe, rate))


def interval(scores: Sequence[float]) -> str:
    """Mean and 95% t-interval over three seeds."""
    half = 4.303 * statistics.stdev(scores) / len(scores) ** 0.5
    return f"{statistics.mean(scores):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--toy", required=True, choices=TOYS)
    parser.add_argument("--tunix_python", required=True, help="of an environment with google-tunix")
    parser.add_argument("--out", required=True, type=Path, help="directory of the runs")
    args = parser.parse_args()
    runs = Runs(args.toy, args.tunix_python, args.out / f"{args.toy}.json")
    chosen = {"ours": runs.best(["ours"]), "tunix": runs.best(list(RECIPES))}
    chosen["tunix, settings of ours"] = "matched", chosen["ours"][1]
    curves = {
        side: [runs.get(*choice, seed) for seed in range(3)] for side, choice in chosen.items()
    }
    for side, (recipe, rate) in chosen.items():
        print(f"{side}: settings {recipe}, learning rate {rate:g}")
    print(f"\n| samples | {' | '.join(chosen)} |\n|---:|{'---:|' * len(chosen)}")
    for point in range(len(curves["ours"][0])):
        cells = [interval([rows[point][1] for rows in of]) for of in curves.values()]
        print(f"| {curves['ours'][0][point][0]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
