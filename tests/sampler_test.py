from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prolong_jax import sampler
from prolong_jax.types import TrainState
from prolong_jax.update import Conversation, make_score, pack
from tests.tiny import MODEL, random_params

RULE = sampler.SamplingRule(max_len=12, stop_ids=(3, 4), pad_id=0)


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(5, 96, n).tolist() for n in (3, 8, 5, 1)]


def sample(params, prompts, rule=RULE, group=6, length=8, numbers=None):
    tokens, valid = sampler.left_pad(prompts, length, rule.pad_id)
    keys = sampler.sample_keys(0, 1, numbers or list(range(len(prompts))), group)
    return sampler.generate(MODEL, params, tokens, valid, keys, rule)


def score(params, conversations, temperature):
    batch, used = pack(conversations, row_len=24, micro_batch_rows=4, micro_batches=12)
    filled = make_score(MODEL, temperature)(TrainState(params, params, ()), batch, used)
    return np.asarray(filled.old_logp), batch


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.2])
def test_logprobs_are_those_of_the_scorer(params, prompts, temperature):
    samples = sample(params, prompts, replace(RULE, temperature=temperature))
    conversations = [
        Conversation(
            prompt=np.array(prompts[row // 6], np.int32),
            response=samples.tokens[row, :length],
            sampler_logp=samples.logp[row, :length],
            advantage=1.0,
        )
        for row, length in enumerate(samples.lengths)
    ]
    scored, batch = score(params, conversations, temperature)
    assert batch.mask.sum() == samples.lengths.sum()
    np.testing.assert_allclose(scored[batch.mask], batch.sampler_logp[batch.mask], atol=1e-4)


def test_a_sample_depends_on_its_prompt_and_key_alone(params, prompts):
    together = sample(params, prompts)
    alone = sample(params, [prompts[2]], numbers=[2])
    np.testing.assert_array_equal(together.tokens[12:18], alone.tokens)
    wider = sample(params, prompts, length=11)  # more padding in front
    np.testing.assert_array_equal(together.tokens, wider.tokens)
    reordered = sample(params, prompts[::-1], numbers=[3, 2, 1, 0])
    np.testing.assert_array_equal(together.tokens[:6], reordered.tokens[18:])


def test_samples_of_a_group_and_of_two_steps_differ(params, prompts):
    samples = sample(params, prompts)
    assert len({tuple(row) for row in samples.tokens[:6]}) > 1
    tokens, valid = sampler.left_pad(prompts, 8, 0)
    keys = sampler.sample_keys(0, 2, range(4), 6)
    later = sampler.generate(MODEL, params, tokens, valid, keys, RULE)
    assert (later.tokens != samples.tokens).any()


def test_finish_reason_and_length(params, prompts):
    samples = sample(params, prompts, group=40)
    assert samples.stopped.any() and not samples.stopped.all()
    for tokens, length, stopped, logp in zip(
        samples.tokens, samples.lengths, samples.stopped, samples.logp, strict=True
    ):
        assert not np.isin(tokens[: length - 1], RULE.stop_ids).any()
        assert np.isin(tokens[length - 1], RULE.stop_ids) == stopped
        assert stopped or length == RULE.max_len
        assert (logp[length:] == 0).all() and (logp[:length] < 0).all()


def test_draw_follows_the_distribution():
    """Chi-square over 20,000 draws, with temperature and top-p."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 50)).astype(np.float32) * 2
    rule = replace(RULE, temperature=0.7, top_p=0.9)
    shaped = sampler.sampled_logits(jnp.asarray(logits), rule)
    n = 20_000
    uniform = jax.random.uniform(jax.random.key(0), (n,))
    drawn = np.asarray(sampler.draw(jnp.repeat(shaped, n, 0), uniform))

    p = np.exp(logits[0].astype(np.float64) / 0.7)  # by a slow loop, from the definition
    p /= p.sum()
    kept, reached = np.zeros(50, bool), 0.0
    for token in np.argsort(-p):
        if reached < 0.9:
            kept[token] = True
            reached += p[token]
    p = np.where(kept, p, 0) / p[kept].sum()
    counts = np.bincount(drawn, minlength=50)
    assert counts[~kept].sum() == 0
    chi2 = (((counts - n * p)[kept]) ** 2 / (n * p[kept])).sum()
    degrees = kept.sum() - 1
    assert chi2 < degrees + 4 * np.sqrt(2 * degrees), (chi2, degrees)


def test_draw_never_picks_an_impossible_token():
    logits = jnp.full((1000, 10), -jnp.inf).at[:, 7].set(0.0)
    uniform = jnp.concatenate([jnp.linspace(0, 1, 999), jnp.array([1 - 1e-7])])
    assert (sampler.draw(logits, uniform) == 7).all()


def test_draw_at_the_borders_of_blocks():
    """Targets within rounding of a cumulative sum, with tokens of probability 0 all around."""
    rng = np.random.default_rng(0)
    p = np.zeros((2000, 30), np.float32)
    for row in p:
        row[rng.choice(30, 4, replace=False)] = rng.random(4) + 1e-3
    ends = np.cumsum(p, axis=1, dtype=np.float32)
    border = ends[np.arange(2000), rng.integers(0, 30, 2000)] / ends[:, -1]
    for near in (border, np.nextafter(border, 0), np.nextafter(border, 1)):
        uniform = np.clip(near, 0, np.nextafter(np.float32(1), np.float32(0)))
        drawn = np.asarray(sampler.draw(jnp.log(jnp.asarray(p)), jnp.asarray(uniform)))
        assert (p[np.arange(2000), drawn] > 0).all()


def test_top_p_logprobs_are_renormalised(params, prompts):
    rule = replace(RULE, top_p=0.5, max_len=1)
    samples = sample(params, prompts[:1], rule, group=64)
    by_token = dict(zip(samples.tokens[:, 0].tolist(), samples.logp[:, 0].tolist(), strict=True))
    assert np.exp(list(by_token.values())).sum() <= 1 + 1e-5
    assert len(by_token) > 1 and np.exp(list(by_token.values())).sum() > 0.8


def test_too_long_prompt_is_refused():
    with pytest.raises(ValueError, match="rollout.max_prompt_len: a prompt has 9 tokens"):
        sampler.left_pad([[1] * 9], 8, 0)
