"""What a run checks before any compute."""

import json
import os
from pathlib import Path

from prolong_jax.config import RunConfig, for_stage, refuse_other
from prolong_jax.data.prompts import Prompt
from prolong_jax.models.decoder import Model
from prolong_jax.tokenizer import ChatTokenizer


def refuse_other_workdir(run: RunConfig, workdir: Path) -> None:
    """Raises ValueError where the workdir cannot be made, or holds something else than this run."""
    parent = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"--workdir: {str(parent)!r} is a file; give a directory.")
    if not os.access(parent, os.W_OK):
        raise ValueError(
            f"--workdir: {str(parent)!r} cannot be written to; give another directory."
        )
    saved = workdir / "config.json"
    if saved.exists():
        try:
            refuse_other(run, json.loads(saved.read_text()), workdir)
        except json.JSONDecodeError as error:
            raise ValueError(f"--workdir: {saved} is damaged ({error}); restore it.") from error


def refuse_unfit_model(run: RunConfig, model: Model, tokenizer: ChatTokenizer) -> None:
    """Raises ValueError where the model has too few positions or tokens."""
    for index in range(len(run.stages)):
        rollout = for_stage(run, index).rollout
        lens = {
            "rollout.max_response_len": rollout.max_response_len,
            "validation.max_response_len": run.validation.max_response_len,
        }
        for name, length in lens.items():
            longest = rollout.max_prompt_len + length
            if longest > model.config.max_positions:
                raise ValueError(
                    f"config: rollout.max_prompt_len + {name} = {longest} exceeds the "
                    f"{model.config.max_positions} positions of the model; lower them."
                )
    if tokenizer.largest_id >= model.config.vocab_size:
        raise ValueError(
            f"model.path: the tokenizer has the token id {tokenizer.largest_id}, the model only "
            f"{model.config.vocab_size} tokens; use the tokenizer that belongs to the model."
        )


def prompt_len(prompt: Prompt, tokenizer: ChatTokenizer, run: RunConfig) -> int:
    """Tokens of a prompt as it is sampled from."""
    length = len(tokenizer.encode_chat(prompt.messages)[0])
    limit = run.rollout.max_prompt_len
    return min(length, limit) if run.rollout.long_prompts == "truncate" else length
