"""The tunix side of learning.py; runs in an environment of its own and knows nothing of this package.

What it is to do, and what responses are worth, comes over the pipe that its argument names.
"""

# pyright: reportMissingImports=false

import dataclasses
import json
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as weights
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout


class Text:
    """A tokenizer as tunix wants it: of a model directory, or of one character per token."""

    first = 0x4E00

    def __init__(self, directory: str, ids: bool):
        self.words = None if ids else Tokenizer.from_file(f"{directory}/tokenizer.json")

    def encode(self, text, **_):
        if self.words is None:
            return [ord(c) - self.first for c in text]
        return self.words.encode(text, add_special_tokens=False).ids

    def decode(self, ids, **_):
        if self.words is None:
            return "".join(chr(self.first + int(i)) for i in ids)
        return self.words.decode([int(i) for i in ids], skip_special_tokens=False)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 0  # none is put in front

    def eos_id(self):
        return 2000 if self.words is None else 1


def load(directory: str, mesh):
    raw = json.loads(Path(directory, "config.json").read_text())
    config = qwen2.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=True,
    )
    return weights.create_model_from_safe_tensors(directory, config, mesh, dtype=jnp.float32)


def optimizer(job: dict, updates: int):
    """AdamW; the rate is warmed up for a tenth of the updates and falls to 0, or stays."""
    if job["decays"]:
        warm_up = max(1, updates // 10)
        rate = optax.warmup_cosine_decay_schedule(0.0, job["rate"], warm_up, updates, 0.0)
    else:
        rate = optax.linear_schedule(job["rate"] / 8, job["rate"], 7)
    clip = optax.clip_by_global_norm(job["max_grad_norm"])
    return optax.chain(clip, optax.adamw(rate, **job["optimizer"]))


def make_cluster(job: dict, tokenizer: Text):
    prompts, _, _, steps, _ = job["sizes"]
    max_prompt_len, max_response_len = job["lengths"]
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    with mesh:
        actor, reference = load(job["model"], mesh), load(job["model"], mesh)
    role = rl_cluster.Role
    return rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(job, steps * job["updates"]),
                eval_every_n_steps=10**9,
                max_steps=steps * job["updates"],
                mini_batch_size=prompts // job["updates"],
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=max_response_len,
                max_prompt_length=max_prompt_len,
                kv_cache_size=max_prompt_len + max_response_len,
                seed=job["seed"],  # an array would be gone after its first use
                **job["rollout"],
            ),
        ),
    )


def main() -> None:
    with Connection(int(sys.argv[1])) as asker:
        job = asker.recv()
        count, group, samples, steps, every = job["sizes"]
        tokenizer, texts = Text(job["model"], job["ids"]), job["texts"]
        held_out, rows = range(job["train"], len(texts)), []
        if [list(tokenizer.encode(text)) for text in texts] != job["tokens"]:
            raise SystemExit("the prompts have other tokens here")
        cluster = make_cluster(job, tokenizer)

        def worth(prompts, responses) -> list[float]:
            asker.send({"prompts": [int(i) for i in prompts], "responses": list(responses)})
            return asker.recv()

        def score(step: int) -> None:
            asked, scores = [i for i in held_out for _ in range(samples)], []
            config = cluster.cluster_config.rollout_config
            for start in range(0, len(asked), count * group):
                part = asked[start : start + count * group]
                free = {"temperature": 1.0, "top_p": 1.0, "top_k": None}
                free["seed"] = 1000 * step + start
                rule = dataclasses.replace(config, **free)
                out = cluster.rollout.generate([texts[i] for i in part], rule)
                scores += worth(part, out.text)
            rows.append((step * count * group, float(np.mean(scores))))

        def data():
            for step in range(steps):
                numbers = np.arange(step * count, (step + 1) * count)
                yield {"prompts": np.array([texts[i] for i in numbers]), "number": numbers}

        learner = grpo_learner.GRPOLearner(
            rl_cluster=cluster,
            reward_fns=lambda prompts, completions, number, **_: worth(number, completions),
            algo_config=grpo_learner.GRPOConfig(
                num_generations=group, num_iterations=1, **job["algorithm"]
            ),
        )
        one_step, done = learner._run_global_step, iter(range(steps))

        def step(*args, **kwargs):
            number = next(done)
            if number % every == 0:
                score(number)
            one_step(*args, **kwargs)

        learner._run_global_step = step
        learner.train(data())
        score(steps)
        asker.send(rows)


if __name__ == "__main__":
    main()
