"""The tunix side of step.py; runs in an environment of its own and knows nothing of this package."""

# pyright: reportMissingImports=false

import argparse
import functools
import json
import os
import resource
import statistics
import time
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

WARM_UP = 3
FIRST_CHARACTER = 0x4E00  # token i is this character plus i


class Characters:
    """A tokenizer of one character per token."""

    def encode(self, text, **_):
        return [ord(c) - FIRST_CHARACTER for c in text]

    def decode(self, ids, **_):
        return "".join(chr(FIRST_CHARACTER + int(i)) for i in ids)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_model(seed: int):
    config = qwen3.ModelConfig(
        num_layers=4,
        vocab_size=1024,
        embed_dim=256,
        hidden_dim=768,
        num_heads=8,
        head_dim=32,
        num_kv_heads=4,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    for name in ("dtype", "param_dtype"):
        if hasattr(config, name):
            setattr(config, name, jnp.dtype("float32"))
    graph, state = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(0)  # its own start has matrices of zeros

    def drawn(x):
        x = x if x.ndim < 2 else rng.normal(0, 0.02, x.shape)
        return jnp.asarray(x, jnp.float32)

    return nnx.merge(graph, jax.tree.map(drawn, state))


def measured(times: dict, phase: str, function, ready=lambda out: out):
    """The function, with its CPU-seconds added to those of the phase."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        start = cpu_s()
        out = function(*args, **kwargs)
        jax.block_until_ready(ready(out))
        times[phase] = times.get(phase, 0.0) + cpu_s() - start
        return out

    return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    with mesh:
        actor, reference = make_model(0), make_model(0)
    tokenizer, rng = Characters(), np.random.default_rng(0)

    def data():
        while True:
            texts = np.array([tokenizer.decode(rng.integers(3, 1024, 31)) for _ in range(8)])
            yield {"prompts": texts, "answer": texts}

    def share_of_even(prompts, completions, **_):
        ids = [np.array(tokenizer.encode(text)) for text in completions]
        return [float(np.mean(i % 2 == 0)) if len(i) else 0.0 for i in ids]

    role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-3),
                eval_every_n_steps=10**9,
                max_steps=WARM_UP + steps,
                mini_batch_size=8,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=128,
                max_prompt_length=32,
                kv_cache_size=160,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=8, num_iterations=1, beta=1e-3, epsilon=0.2)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster, reward_fns=share_of_even, algo_config=algorithm
    )
    times: dict[str, float] = {}
    rows: list[dict[str, float]] = []

    def weights(_):
        return jax.tree.leaves(nnx.state(cluster.actor_trainer.model))

    cluster.generate = measured(times, "rollout", cluster.generate, lambda out: None)
    cluster.get_ref_per_token_logps = measured(times, "reference", cluster.get_ref_per_token_logps)
    cluster.update_actor = measured(times, "update", cluster.update_actor, weights)
    one_step = learner._run_global_step

    def step(*args, **kwargs):
        times.clear()
        start, wall = cpu_s(), time.monotonic()
        one_step(*args, **kwargs)
        spent = {"step": cpu_s() - start, "step_wall": time.monotonic() - wall}
        rows.append({**times, **spent})

    learner._run_global_step = step
    learner.train(data())
    found = {k: statistics.median(row[k] for row in rows[WARM_UP:]) for k in rows[-1]}
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    packages = ("google-tunix", "jax", "flax")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    main()
