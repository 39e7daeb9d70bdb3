"""Plants known bugs one at a time and lists the tests that catch each: python -m tests.planted_bugs

A bug that no test catches makes the command fail. Works on a copy of the repository.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: str  # where to look: test files, space-separated


BUGS = (
    Bug(
        "sign of the loss",
        "prolong_jax/losses.py",
        "return -jnp.minimum(",
        "return jnp.minimum(",
        "tests/objectives_test.py tests/update_test.py",
    ),
    Bug(
        "clip bounds swapped",
        "prolong_jax/losses.py",
        "jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)",
        "jnp.clip(ratio_BT, 1.0 - clip_high, 1.0 + clip_low)",
        "tests/objectives_test.py tests/update_test.py",
    ),
    Bug(
        "mask ignored",
        "prolong_jax/masked.py",
        "return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)",
        "return x_BT.astype(jnp.float32)",
        "tests/masked_test.py tests/objectives_test.py tests/update_test.py",
    ),
    Bug(
        "dual clip holds good tokens back",
        "prolong_jax/objectives.py",
        "jnp.where(advantage_BT < 0, jnp.minimum(loss_BT, -dual_clip * advantage_BT), loss_BT)",
        "jnp.minimum(loss_BT, jnp.abs(dual_clip * advantage_BT)) * 0.999",
        "tests/objectives_test.py",
    ),
    Bug(
        "ratio of a row in place of its responses",
        "prolong_jax/objectives.py",
        "sequences.response_mean(logp_BT - old_logp_BT, mask_BT, segments_BT)",
        "sequences.response_mean(logp_BT - old_logp_BT, mask_BT, 0 * segments_BT)",
        "tests/objectives_test.py",
    ),
    Bug(
        "KL in the reward of the tokens before",
        "prolong_jax/sequences.py",
        "_at_slots(whole_BP + opening_BP, segments_BT) - before_BT",
        "before_BT - _at_slots(opening_BP, segments_BT)",
        "tests/objectives_test.py",
    ),
    Bug(
        "importance weights carry gradient",
        "prolong_jax/objectives.py",
        "jax.lax.stop_gradient(jnp.clip(ratio_BT, is_low, is_high))",
        "jnp.clip(ratio_BT, is_low, is_high)",
        "tests/objectives_test.py",
    ),
    Bug(
        "baseline of REINFORCE++ left out",
        "prolong_jax/advantages.py",
        "batch_advantage(_centred(reward, scored), scored)",
        "batch_advantage(reward, scored)",
        "tests/advantages_test.py",
    ),
    Bug(
        "length reward never off",
        "prolong_jax/shaping.py",
        "(step - 1) % (on + off) < on",
        "(step - 1) % (on + off) >= 0",
        "tests/shaping_test.py",
    ),
    Bug(
        "stop token dropped",
        "prolong_jax/sampler.py",
        "rule.stop_ids))[:1] + 1",
        "rule.stop_ids))[:1]",
        "tests/sampler_test.py",
    ),
    Bug(
        "old logprobs at the wrong temperature",
        "prolong_jax/train.py",
        "return make_score(model, temperature, policy",
        "return make_score(model, 0.8 * temperature, policy",
        "tests/train_test.py",
    ),
    Bug(
        "reference not reset",
        "prolong_jax/update.py",
        "state = replace(state, ref_params=jax.tree.map(jnp.copy, params))",
        "state = replace(state, ref_params=state.ref_params)",
        "tests/update_test.py",
    ),
    Bug(
        "optimizer not reset",
        "prolong_jax/update.py",
        "return replace(state, opt_state=fresh)",
        "return state",
        "tests/update_test.py",
    ),
    Bug(
        "gradient multiplied by the number of devices",
        "prolong_jax/update.py",
        "lambda g: g / weight, grads",
        "lambda g: g / (weight / mesh.size), grads",
        "tests/update_test.py",
    ),
    Bug(
        "gradient multiplied by the number of micro-batches",
        "prolong_jax/update.py",
        "lambda g: g / weight, grads",
        "lambda g: g * num_micro_batches / weight, grads",
        "tests/update_test.py",
    ),
    Bug(
        "gradient of the head added twice",
        "prolong_jax/update.py",
        "grads = grads | {model.head_name: _zeros(grads[model.head_name])}",
        "pass",
        "tests/update_test.py",
    ),
    Bug(
        "responses of a row see each other",
        "prolong_jax/models/attention.py",
        "(visible & (same | prompt))",
        "visible",
        "tests/models/attention_test.py",
    ),
    Bug(
        "lanes see the prompts of other rows",
        "prolong_jax/models/attention.py",
        "jnp.repeat(prompts(x), lanes, axis=0)",
        "jnp.tile(prompts(x), (lanes, *[1] * (x.ndim - 1)))",
        "tests/models/attention_test.py tests/update_test.py",
    ),
    Bug(
        "a refilled slot sees the tokens of the one before",
        "prolong_jax/sampler.py",
        "start_B1 = (clock - rows.position)[:, None]",
        "start_B1 = (clock - rows.position)[:, None] - 1",
        "tests/sampler_test.py",
    ),
    Bug(
        "random numbers by step of the batch",
        "prolong_jax/sampler.py",
        "index_BT = rows.length[:, None] + jnp.arange(chunk)",
        "index_BT = 0 * rows.length[:, None] + jnp.arange(chunk)",
        "tests/sampler_test.py",
    ),
    Bug(
        "blocks of the vocabulary overlap",
        "prolong_jax/models/logprobs.py",
        "return jnp.where(new_X, out_BTSX, LOWEST)",
        "return out_BTSX",
        "tests/models/logprobs_test.py",
    ),
    Bug(
        "data cursor not saved",
        "prolong_jax/host.py",
        'Cursor(Position(**cursor["position"]), surplus)',
        "Cursor(Position(), surplus)",
        "tests/host_test.py tests/train_test.py",
    ),
    Bug(
        "what the reset rules have seen not saved",
        "prolong_jax/host.py",
        '"history": History(**known),',
        '"history": History(),',
        "tests/host_test.py",
    ),
    Bug(
        "reference not restored",
        "prolong_jax/train.py",
        "state, host = restored[0], Host.from_dict(restored[1])",
        "state, host = restored[0], Host.from_dict(restored[1])\n"
        "        state = TrainState(state.params, state.params, state.opt_state)",
        "tests/train_test.py",
    ),
    Bug(
        "optimizer not restored",
        "prolong_jax/train.py",
        "state, host = restored[0], Host.from_dict(restored[1])",
        "state, host = restored[0], Host.from_dict(restored[1])\n"
        "        state = TrainState(state.params, state.ref_params, initial_state(run, "
        "state.params).opt_state)",
        "tests/train_test.py",
    ),
    Bug(
        "a flipped bit in a checkpoint is taken",
        "prolong_jax/checkpoint.py",
        "if found[name] != [size, digest]:",
        "if found[name][0] != size:",
        "tests/checkpoint_test.py",
    ),
    Bug(
        "cool-down ignored",
        "prolong_jax/stages.py",
        "since < rule.cooldown:",
        "since < 0:",
        "tests/stages_test.py",
    ),
)


def failing_tests(bug: Bug, root: Path) -> list[str]:
    """Names of the tests that fail with the bug in place."""
    path = root / bug.file
    source = path.read_text()
    if source.count(bug.right) != 1:
        raise ValueError(f"{bug.file}: expected {bug.right!r} once; update tests/planted_bugs.py.")
    path.write_text(source.replace(bug.right, bug.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-x", *bug.tests.split()]
    try:
        output = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    finally:
        path.write_text(source)
    return re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a bug's name")
    only, missed = parser.parse_args().only, 0
    repository = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "copy"
        ignored = shutil.ignore_patterns(".git", "runs", "*.egg-info", "__pycache__")
        shutil.copytree(repository, root, ignore=ignored)
        for bug in BUGS:
            if only in bug.name:
                caught_by = failing_tests(bug, root)
                missed += not caught_by
                print(f"{bug.name}: {caught_by[0] if caught_by else 'NOT CAUGHT'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
