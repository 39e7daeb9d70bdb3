"""What a run checks before any compute."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prolong_jax.config import RunConfig, changes, for_stage, listed, refuse_other, to_dict
from prolong_jax.data.prompts import Prompt
from prolong_jax.models.decoder import Model
from prolong_jax.processes import exchange, is_first, write_json
from prolong_jax.stages import Progress
from prolong_jax.tokenizer import ChatTokenizer


def refuse_other_workdir(run: RunConfig, workdir: Path, allow: bool = False) -> None:
    """Raises ValueError where the workdir cannot be made, or holds something else than this run.

    `allow`: other settings than those of the run will do, where a run can go on with them.
    """
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
            refuse_other(run, json.loads(saved.read_text()), workdir, allow)
        except json.JSONDecodeError as error:
            raise ValueError(f"--workdir: {saved} is damaged ({error}); restore it.") from error


@contextmanager
def sole_user(workdir: Path) -> Iterator[None]:
    """Makes the workdir and holds its lock; the system frees it however the process ends.

    Raises:
      ValueError: another run holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "a+") as file:
        holder = exchange(lock(file) if is_first() else "")[0]
        if holder:
            raise ValueError(
                f"--workdir: {str(workdir)!r} is in use by {holder}; stop that run or give another "
                "workdir."
            )
        yield


def lock(file: IO[str]) -> str:
    """Locks a file for as long as it is open. Returns who holds it already, "" where nobody did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            print(f"this file system has no locks ({error}): nothing keeps a second run away")
            return ""
        file.seek(0)
        return file.read().strip() or "another run"
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""


def record_settings(run: RunConfig, workdir: Path, progress: Progress) -> None:
    """Writes config.json; what changed since the last start is said and kept in changes.jsonl.

    Raises:
      ValueError: the run is in a stage that there is no longer.
    """
    if progress.stage >= len(run.stages):
        raise ValueError(
            f"--workdir: {str(workdir)!r} is in stage {progress.stage + 1}, but there are only "
            f"{len(run.stages)}; add 'stages' at the end and leave the others."
        )
    path = workdir / "config.json"
    differing = changes(json.loads(path.read_text()), run) if path.exists() else {}
    if differing and is_first():
        print(f"settings changed after step {progress.step}: {listed(differing)}")
        with open(workdir / "changes.jsonl", "a") as file:
            file.write(json.dumps({"step": progress.step, "changes": differing}) + "\n")
    exchange(None)  # all have read it
    write_json(path, to_dict(run))


def refuse_unfit_model(run: RunConfig, model: Model, tokenizer: ChatTokenizer) -> None:
    """Raises ValueError where the model has too few positions or tokens."""
    for index in range(len(run.stages)):
        rollout, validation = for_stage(run, index).rollout, for_stage(run, index).validation
        lens = {
            "rollout.max_response_len": rollout.max_response_len,
            "validation.max_response_len": validation.max_response_len,
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
