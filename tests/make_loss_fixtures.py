"""Makes tests/fixtures/losses.json: what public packages compute on random inputs, for published_test.py.

Run by hand, in an environment of its own that has the packages; the tests need none of them.

    python -m venv published && . published/bin/activate
    pip install torch==2.13.0 trl==1.16.0 flax==0.12.8 omegaconf==2.4.0
    pip install --no-deps verl==0.9.1 openrlhf==0.11.2 google-tunix==0.1.7
    python tests/make_loss_fixtures.py tests/fixtures/losses.json

Every value and gradient is that of a package's own function or method. What these modules import
but the functions do not use (ray, deepspeed, ...) may be missing: an empty module stands for it.
Where the loss is a method of a trainer, a plain object with the attributes it reads is the trainer,
and the model is a function that returns the log-probabilities of the inputs.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

SEED = 7
LENGTHS = (12, 9, 5, 1, 12, 7, 4, 10)  # of the responses, which are padded to the longest
GROUPED_LENGTHS = (3, 8, 5, 2, 6, 1, 4, 7, 2, 2, 5, 3)  # of those that `reward` belongs to
REWARD = ((0.0, 1.0, 1.0, 0.25), (1.0, 0.0, 0.0, -0.5), (0.5, 0.5, 0.5, 0.5))
PACKAGES = ("verl", "openrlhf", "trl", "google-tunix")
UNUSED = {"ray", "tensordict", "codetiming", "orjson", "deepspeed", "flash_attn", "peft", "vllm"}
UNUSED |= {"pylatexenc", "aiohttp", "torchdata", "metrax", "perfetto", "sentencepiece", "PIL"}
UNUSED |= {"jaxtyping"}

Results = dict[str, Any]  # by the name of the case


class UnusedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers the import of an unused library that is not installed. Asked last."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        return MagicMock(name=spec.name, __spec__=spec, __path__=[])

    def exec_module(self, module: Any) -> None:
        pass


torch: Any = importlib.import_module("torch")


def make_inputs() -> dict[str, Any]:
    """Random inputs of four decimals, with ratios on both sides of every bound."""
    rng = np.random.default_rng(SEED)
    shape = (len(LENGTHS), max(LENGTHS))
    old_logp_BT = -0.1 - rng.exponential(size=shape)

    def near(scale: float) -> np.ndarray:
        return old_logp_BT + np.clip(scale * rng.normal(size=shape), -2.4 * scale, 2.4 * scale)

    logp_BT = near(0.7)
    d_BT = np.clip(rng.normal(size=shape), -2.2, 2.2)  # within the bounds of all KL estimators
    inputs = {
        "logp": logp_BT,
        "old_logp": old_logp_BT,
        "ref_logp": logp_BT + d_BT,
        "sampler_logp": near(0.5),
        "entropy": rng.exponential(size=shape),
        "token_advantage": rng.normal(size=shape),
        "advantage": np.array([1.3, -0.7, 0.4, -1.1, -0.9, 0.8, 0.0, -0.3]),
    }
    inputs = {name: np.round(x, 4).tolist() for name, x in inputs.items()}
    inputs |= {"lengths": LENGTHS, "grouped_lengths": GROUPED_LENGTHS, "reward": REWARD}
    return inputs | {
        "response_length": (50, 80, 81, 90, 95, 100, 120, 10),
        "finished": (1, 1, 0, 1, 0, 0, 1, 0),
    }


def tensors(inputs: dict[str, Any]) -> SimpleNamespace:
    """The inputs as float32, `advantage` repeated at each token."""
    x = {name: torch.tensor(value, dtype=torch.float32) for name, value in inputs.items()}
    x["mask"] = mask_of(LENGTHS)
    x["advantage"] = x["advantage"][:, None].expand(x["logp"].shape)
    return SimpleNamespace(**x)


def mask_of(lengths: Sequence[int]) -> Any:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()


def differentiated(function: Callable, logp: Any) -> dict[str, Any]:
    """Value of a loss, and its gradient at the tokens that count, in one row."""
    logp = logp.clone().requires_grad_(True)
    value = function(logp)
    value.backward()
    return loss_result(value.item(), logp.grad.numpy())


def loss_result(value: float, gradient_BT: np.ndarray) -> dict[str, Any]:
    real_BT = mask_of(LENGTHS).numpy() > 0
    assert not gradient_BT[~real_BT].any()
    return {"value": short(value), "gradient": [short(g) for g in gradient_BT[real_BT]]}


def short(number: Any) -> float:
    return float(f"{float(number):.8g}")


def listed(array: Any) -> list[float]:
    return [short(number) for number in np.asarray(array).ravel()]


# --- verl ----------------------------------------------------------------------------------------

VERL_AGGREGATIONS = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "token_sum_over_constant": "seq-mean-token-sum-norm",  # over the padded length
}


def verl_losses(x: SimpleNamespace) -> Results:
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    correction = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    configs = importlib.import_module("verl.workers.config")

    def loss(name, advantage=x.token_advantage, aggregation="token-mean", weights=None, **settings):
        settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.4, "clip_ratio_c": 1e6} | settings
        config = configs.ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings
        )
        function = core.get_policy_loss_fn(name)

        def of(logp):
            arrays = (x.old_logp, logp, advantage, x.mask)
            settings = {"loss_agg_mode": aggregation, "config": config}
            return function(*arrays, **settings, rollout_is_weights=weights)[0]

        return differentiated(of, x.logp)

    def weights(new, old, threshold):
        return correction.compute_rollout_correction_weights(
            new - old, x.mask, "token", rollout_is_threshold=threshold
        )[0]

    def reinforce(logp):
        config = configs.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        ratio = weights(logp.detach(), x.old_logp, 1e9)
        arrays = (x.old_logp, logp, x.token_advantage, x.mask, "token-mean")
        return core.compute_policy_loss_reinforce(*arrays, config, ratio)[0]

    def kl(name):
        def of(logp):
            return core.agg_loss(core.kl_penalty(logp, x.ref_logp, name), x.mask, "token-mean")

        return differentiated(of, x.logp)

    by_response = {"advantage": x.advantage, "aggregation": "seq-mean-token-mean"}
    narrow: dict[str, Any] = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
    by_cap = {name: weights(x.old_logp, x.sampler_logp, cap) for name, cap in VERL_CAPS.items()}
    return {
        "dual_clip": loss("vanilla", clip_ratio_c=3.0),
        **{f"ppo_clip_{k}": loss("vanilla", aggregation=v) for k, v in VERL_AGGREGATIONS.items()},
        "gspo": loss("gspo", **by_response, **narrow),
        "gspo_token": loss("gspo", aggregation="seq-mean-token-mean", **narrow),
        "gmpo": loss("geo_mean", **by_response),
        "cispo": loss("cispo"),
        "sapo": loss("sapo", tau_pos=1.0, tau_neg=1.05),
        "reinforce": differentiated(reinforce, x.logp),
        **{name: loss("vanilla", weights=weight) for name, weight in by_cap.items()},
        **{name: kl(name) for name in ("k1", "k2", "k3")},
    }


VERL_CAPS = {"tis": 2.0, "icepop": "0.5_2.0"}


def verl_advantages(x: SimpleNamespace) -> Results:
    """One number per response: all tokens of a response have it."""
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    index = np.arange(x.reward.numel()) // x.reward.shape[1]

    def advantage(name, lengths, **settings):
        mask = mask_of(lengths)
        rewards = torch.zeros(mask.shape)
        rewards[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = x.reward.flatten()
        function = core.get_adv_estimator_fn(name)
        return listed(function(rewards, mask, index=index, **settings)[0][:, 0])

    equal, own = (5,) * x.reward.numel(), GROUPED_LENGTHS
    gamma = {"config": SimpleNamespace(gamma=1.0)}
    return {
        "group": advantage("grpo", own),
        "group_mean": advantage("grpo", own, norm_adv_by_std_in_grpo=False),
        "leave_one_out": advantage("rloo", own),
        "batch": advantage("reinforce_plus_plus", equal, **gamma),
        "batch_by_tokens": advantage("reinforce_plus_plus", own, **gamma),
        "group_mean_batch": advantage("reinforce_plus_plus_baseline", equal),
        "group_mean_batch_by_tokens": advantage("reinforce_plus_plus_baseline", own),
    }


# --- OpenRLHF ------------------------------------------------------------------------------------


def openrlhf_losses(x: SimpleNamespace) -> Results:
    losses = importlib.import_module("openrlhf.models.loss")
    utils = importlib.import_module("openrlhf.models.utils")

    def loss(advantage=x.token_advantage, clip=(0.2, 0.4), **settings):
        module = losses.PolicyLoss(*clip, **settings)

        def of(logp):
            return module(logp, x.old_logp, advantage, x.mask, x.sampler_logp)[0]

        return differentiated(of, x.logp)

    def corrected(level, mode, low, high):
        return loss(
            is_correction_level=level, is_correction_mode=mode, is_correction_threshold=[low, high]
        )

    def kl(name):
        def of(logp):
            kl = utils.compute_approx_kl(logp, x.ref_logp, kl_estimator=name)
            return losses.aggregate_loss(kl, x.mask)

        return differentiated(of, x.logp)

    kl_old = utils.compute_approx_kl(x.old_logp, x.ref_logp, kl_estimator="k1")
    lowered = openrlhf_advantage("rloo", x.reward[:2], x.mask, kl=kl_old, kl_coef=0.1)
    return {
        "dual_clip": loss(dual_clip=3.0),
        "ppo_clip_token_mean": loss(),
        "ppo_clip_seq_mean_token_mean": loss(token_level_loss=False),
        "gspo": loss(x.advantage, clip=(0.1, 0.15), policy_loss_type="gspo"),
        "tis": corrected("token", "clip", 0.0, 2.0),
        "icepop": corrected("token", "mask", 0.5, 2.0),
        "seq_mask_tis": corrected("seq", "mask", 0.85, 1.15),
        "kl_in_reward": loss(lowered),
        **{name: kl(name) for name in ("k1", "k2", "k3")},
    }


def openrlhf_advantage(
    estimator: str, reward: Any, mask: Any, kl: Any = None, kl_coef: float = 0.0
) -> Any:
    """Advantages [B, T], as the maker of experiences computes them for one batch."""
    maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
        rollout=SimpleNamespace(n_samples_per_prompt=reward.shape[1]),
    )
    trainer: Any = object.__new__(maker.RemoteExperienceMaker)
    trainer.strategy = SimpleNamespace(args=args)
    trainer.advantage_estimator = estimator
    trainer.kl_ctl = SimpleNamespace(value=kl_coef)
    batch = SimpleNamespace(
        rewards=reward.flatten(),
        index=list(range(reward.numel())),
        kl=torch.zeros(mask.shape) if kl is None else kl,
        action_mask=mask,
        info={},
    )
    return trainer.compute_advantages_and_returns([batch])[0].advantages


def openrlhf_advantages(x: SimpleNamespace) -> Results:
    def advantage(name, lengths=GROUPED_LENGTHS):
        return listed(openrlhf_advantage(name, x.reward, mask_of(lengths))[:, 0])

    return {
        "group": advantage("group_norm"),
        "group_mean": advantage("dr_grpo"),
        "leave_one_out": advantage("rloo"),
        "group_mean_batch": advantage("reinforce_baseline", (5,) * x.reward.numel()),
        "group_mean_batch_by_tokens": advantage("reinforce_baseline"),
    }


def openrlhf_shaping(x: SimpleNamespace) -> Results:
    """The reward of 0.8 after a penalty."""
    penalties = importlib.import_module("openrlhf.trainer.ppo_utils.length_penalty")

    def penalized(function, *settings):
        batch = SimpleNamespace(
            rewards=torch.full(x.finished.shape, 0.8),
            response_length=x.response_length.long(),
            truncated=x.finished == 0,
        )
        function([batch], *settings)
        return listed(batch.rewards)

    return {
        "soft_overlong": penalized(penalties.apply_overlong_penalty, 100, 20),
        "stop_properly_scaled": penalized(penalties.apply_stop_properly_penalty, 0.3),
        "stop_properly_replaced": penalized(penalties.apply_stop_properly_penalty, -0.5),
    }


# --- TRL -----------------------------------------------------------------------------------------


def trl_loss(x: SimpleNamespace, loss_type: str, advantage: Any = None, **settings: Any) -> Any:
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    args |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {name: settings.pop(name) for name in list(settings) if name in args}
    attributes = {"epsilon_low": 0.2, "epsilon_high": 0.4, "beta": 0.0, "entropy_coef": 0.0}
    attributes |= {"importance_sampling_level": "token", "loss_type": loss_type} | settings
    ids = torch.zeros(x.mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": x.mask,
        "advantages": x.token_advantage if advantage is None else advantage,
        "old_per_token_logps": x.old_logp,
        "ref_per_token_logps": x.ref_logp,
        "num_items_in_batch": x.mask.sum(),
    }

    def of(logp):
        one_process = SimpleNamespace(
            num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t
        )
        self = SimpleNamespace(
            args=SimpleNamespace(**args),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logp, x.entropy, None),
            accelerator=one_process,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=x.mask.shape[1],
            use_adaptive_entropy=False,
            _entropy_bonus_enabled=attributes["entropy_coef"] != 0.0,
            _metrics=defaultdict(lambda: defaultdict(list)),
            **attributes,
        )
        self.accelerator.sync_gradients = False
        return trainer._compute_loss(self, None, inputs)

    return differentiated(of, x.logp)


def trl_losses(x: SimpleNamespace) -> Results:
    narrow = {"epsilon_low": 0.1, "epsilon_high": 0.15}
    return {
        "dual_clip": trl_loss(x, "bnpo", delta=3.0),
        "ppo_clip_token_mean": trl_loss(x, "dapo"),
        "ppo_clip_seq_mean_token_mean": trl_loss(x, "grpo"),
        "ppo_clip_seq_mean_token_sum": trl_loss(x, "luspo"),
        "ppo_clip_token_sum_over_constant": trl_loss(x, "dr_grpo"),
        "gspo": trl_loss(
            x, "grpo", x.advantage[:, 0], importance_sampling_level="sequence", **narrow
        ),
        "cispo_upper_bound_only": trl_loss(x, "cispo", epsilon_high=1.4),
        "sapo": trl_loss(x, "sapo"),
        "kl_in_loss_and_entropy": trl_loss(x, "bnpo", beta=0.1, entropy_coef=0.02),
    }


# --- Tunix ---------------------------------------------------------------------------------------


def tunix_loss(x: SimpleNamespace, aggregation: str = "token-mean", **settings: Any) -> Any:
    core = importlib.import_module("tunix.rl.algo_core")
    jax: Any = importlib.import_module("jax")
    arrays = {name: jax.numpy.asarray(tensor.numpy()) for name, tensor in vars(x).items()}
    config = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.4, "loss_algo": "grpo"}
    config |= {"temperature": 1.0, "kl_loss_mode": "low_var_kl", "kl_clamp_value": None} | settings
    example = SimpleNamespace(
        prompt_ids=None,
        completion_ids=None,
        completion_mask=arrays["mask"],
        advantages=arrays["token_advantage"],
        old_per_token_logps=arrays["old_logp"],
        ref_per_token_logps=arrays["ref_logp"],
    )
    logits = jax.numpy.zeros((*x.mask.shape, 2))  # for the entropy, which the loss does not use

    def of(logp):
        core.common.compute_per_token_logps = lambda *_, **__: (logp, logits)
        algorithm = SimpleNamespace(loss_agg_mode=aggregation, **config)
        return core.grpo_loss_fn(core.nnx.Module(), example, algorithm, 0, 0)[0]

    value, gradient = jax.value_and_grad(of)(arrays["logp"])
    return loss_result(float(value), np.asarray(gradient))


def tunix_losses(x: SimpleNamespace) -> Results:
    narrow = {"epsilon": 0.1, "epsilon_high": 0.15}
    by_response = "sequence-mean-token-mean"
    return {
        "dual_clip": tunix_loss(x, epsilon_c=3.0),
        "ppo_clip_token_mean": tunix_loss(x),
        "ppo_clip_seq_mean_token_mean": tunix_loss(x, by_response),
        "ppo_clip_seq_mean_token_sum": tunix_loss(x, "seq-mean-token-sum"),
        "ppo_clip_token_sum_over_constant": tunix_loss(x, "sequence-mean-token-scale"),
        "gspo_token": tunix_loss(x, by_response, loss_algo="gspo-token", **narrow),
        "kl_in_loss": tunix_loss(x, beta=0.1),
    }


def tunix_advantages(x: SimpleNamespace) -> Results:
    core = importlib.import_module("tunix.rl.algo_core")
    rewards, group_size = x.reward.flatten().numpy(), x.reward.shape[1]
    functions = {"group": core.compute_advantages, "leave_one_out": core.compute_rloo_advantages}
    functions["group_mean"] = core.compute_drgrpo_advantages
    return {name: listed(function(rewards, group_size)) for name, function in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what public packages compute.")
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    inputs = make_inputs()
    x = tensors(inputs)
    trl = trl_losses(x)  # before the next line: TRL asks which libraries there are
    sys.meta_path.append(UnusedModules())
    fixtures = {
        "versions": {name: version(name) for name in (*PACKAGES, "torch", "jax")},
        "inputs": inputs,
        "losses": {
            "verl": verl_losses(x),
            "openrlhf": openrlhf_losses(x),
            "trl": trl,
            "tunix": tunix_losses(x),
        },
        "advantages": {
            "verl": verl_advantages(x),
            "openrlhf": openrlhf_advantages(x),
            "tunix": tunix_advantages(x),
        },
        "shaping": {"openrlhf": openrlhf_shaping(x)},
    }
    path.write_text(json.dumps(fixtures, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
