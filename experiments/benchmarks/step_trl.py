"""The TRL side of step.py; runs in an environment of its own and knows nothing of this package."""

# pyright: reportMissingImports=false

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

WARM_UP = 3
VOCAB, PROMPTS, GROUP, PROMPT_LEN, NEW = 1024, 8, 8, 32, 128


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=VOCAB,
    )
    return Qwen3ForCausalLM(config).float()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word wi. The stop token is one more than the model has: it is never drawn."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB + 1)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": f"w{VOCAB}"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def share_of_even(completion_ids, **_):
    return [float(np.mean(np.array(ids) % 2 == 0)) for ids in completion_ids]


class Measured(GRPOTrainer):
    """The trainer, with the CPU-seconds of its parts in `times`."""

    times: dict[str, float] = {}

    def _add(self, phase: str, start: float) -> None:
        self.times[phase] = self.times.get(phase, 0.0) + cpu_s() - start

    def _generate(self, prompts):
        start = cpu_s()
        out = super()._generate(prompts)
        self._add("rollout", start)
        return out

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        start = cpu_s()
        out = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if model is self.ref_model:
            self._add("reference", start)
        return out

    def _prepare_inputs(self, generation_batch):
        start = cpu_s()
        out = super()._prepare_inputs(generation_batch)
        self._add("inputs", start)
        return out


class Clock(TrainerCallback):
    """A row of figures for each step, from the end of the one before; the update is all but inputs."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self.last = self.begin = cpu_s(), time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = cpu_s(), time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now, times = (cpu_s(), time.monotonic()), Measured.times
        row = {phase: times[phase] for phase in ("rollout", "reference")}
        row["update"] = now[0] - self.begin[0] - times["inputs"]
        row |= {"step": now[0] - self.last[0], "step_wall": now[1] - self.last[1]}
        self.rows.append(row)
        times.clear()
        self.last = now


def settings(directory: str, steps: int, micro_batch: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS * GROUP // micro_batch,
        num_generations=GROUP,
        max_completion_length=NEW,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=1e-3,
        num_iterations=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=WARM_UP + steps,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences per backward pass")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    count = PROMPTS * (WARM_UP + args.steps)
    ids = [[1, *rng.integers(3, VOCAB, PROMPT_LEN - 1)] for _ in range(count)]
    texts = [{"prompt": " ".join(f"w{i}" for i in prompt)} for prompt in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        make_model().save_pretrained(directory)  # the reference is loaded from a path alone
        trainer = Measured(
            model=directory,
            reward_funcs=share_of_even,
            args=settings(directory, args.steps, args.micro_batch),
            train_dataset=Dataset.from_list(texts),
            processing_class=make_tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    found = {k: statistics.median(row[k] for row in clock.rows[WARM_UP:]) for k in clock.rows[-1]}
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    packages = ("trl", "torch", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    main()
