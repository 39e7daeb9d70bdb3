import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prolong_jax.config import LossSettings, MeshSettings, OptimizerSettings
from prolong_jax.mesh import fetch, make_mesh, param_shardings, put
from prolong_jax.models import logprobs
from prolong_jax.models.attention import Layout
from prolong_jax.optimizer import make_optimizer
from prolong_jax.packing import Conversation, pack
from prolong_jax.train import initial_state
from prolong_jax.types import TrainState
from prolong_jax.update import make_score, make_update, put_rows, reset_reference
from tests.tiny import MODEL, random_conversations, random_params

CONVERSATIONS = random_conversations(16)
LOSS = LossSettings(kl_coef=0.1)
LEARNING_RATE = 1.0
SGD = optax.sgd(LEARNING_RATE)  # a step is the gradient itself


SHARED = Layout(prompt_slots=6)


def packed(conversations, rows=8, row_len=24, micro_batches=6, layout=SHARED):
    return pack(
        conversations,
        row_len=row_len,
        micro_batch_rows=rows,
        micro_batches=micro_batches,
        layout=layout,
    )


def gradient(
    rows=8,
    row_len=24,
    mesh=None,
    conversations=CONVERSATIONS,
    micro_batches=6,
    model=MODEL,
    layout=SHARED,
    loss=LOSS,
):
    """The gradient that an update applies, read off an SGD step, and the step's metrics."""
    mesh = mesh or make_mesh(MeshSettings())
    layout = Layout() if model.attention == "splash" else layout
    model = replace(model, mesh=mesh, layout=layout)
    before, shardings = jax.device_get(random_params(1)), param_shardings(mesh, MODEL.shapes())
    params, ref_params = put(before, shardings), put(random_params(2), shardings)
    state = TrainState(params, ref_params, SGD.init(params))
    batch, used = packed(conversations, rows, row_len, micro_batches, layout)
    batch = make_score(model, 0.9)(state, put_rows(mesh, batch), used)
    # Pretend that the old policy was another one, so that ratios and clipping matter.
    batch = replace(batch, old_logp=batch.old_logp - 0.3 * batch.advantage)
    state, metrics = make_update(model, SGD, mesh, loss, 0.9)(state, batch, used)
    after = fetch(mesh, state.params)
    delta = jax.tree.map(lambda a, b: (a - b) / LEARNING_RATE, before, after)
    return delta, jax.device_get(metrics)


def assert_same(left, right, rtol=1e-5):
    """Equal gradients: the difference is small against the norm of the whole."""
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, left, right))
    assert difference <= rtol * optax.tree.norm(left), difference / optax.tree.norm(left)


@pytest.fixture(scope="module")
def reference():
    return gradient()


@pytest.mark.parametrize("rows, micro_batches", [(1, 24), (4, 8)])
def test_micro_batches_do_not_change_the_gradient(reference, rows, micro_batches):
    delta, metrics = gradient(rows=rows, micro_batches=micro_batches)
    assert_same(reference[0], delta)
    for name, value in reference[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


SLOW_SHAPES = [pytest.param(s, marks=pytest.mark.slow) for s in ((1, 8, 1), (2, 4, 1), (1, 4, 2))]


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (1, 2, 4), *SLOW_SHAPES])
def test_meshes_do_not_change_the_gradient(reference, shape):
    delta, metrics = gradient(mesh=make_mesh(MeshSettings(*shape)))
    assert_same(reference[0], delta)
    for name, value in reference[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "settings", [{"remat": "layer"}, {"remat": "dots"}, {"attention": "splash"}], ids=str
)
def test_remat_and_attention_do_not_change_the_gradient(reference, settings):
    """Splash attention wants rows without shared prompts."""
    delta, metrics = gradient(model=replace(MODEL, **settings), row_len=32)
    assert_same(reference[0], delta)
    for name, value in reference[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_blocks_of_the_vocabulary_do_not_change_the_gradient(reference, monkeypatch):
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", 10)
    monkeypatch.setattr(logprobs, "TOKEN_CHUNK", 7)
    assert_same(reference[0], gradient(mesh=make_mesh(MeshSettings(2, 2, 2)))[0])


def test_packing_and_padding_do_not_change_the_gradient(reference):
    one_per_row, _ = gradient(conversations=CONVERSATIONS, row_len=20, rows=8)
    assert_same(reference[0], one_per_row)
    padded, _ = gradient(row_len=64)
    assert_same(reference[0], padded)
    lanes, _ = gradient(row_len=8 + 4 * 16, rows=2, layout=Layout(8, 4))
    assert_same(reference[0], lanes)
    shuffled, _ = gradient(conversations=CONVERSATIONS[::-1])
    assert_same(reference[0], shuffled)


@jax.jit
def logits_alone(params, tokens):
    mask = jnp.tril(jnp.ones((1, *tokens.shape[1:] * 2), bool))
    positions = jnp.arange(tokens.shape[1])[None]
    return MODEL.logits(params, MODEL.hidden(params, tokens, positions, mask)[0])[0]


def all_logp_alone(params, c):
    """Log-probabilities [response tokens, V] of one conversation, unpacked."""
    tokens = np.zeros((1, 20), np.int32)  # one length, one compilation
    tokens[0, : len(c.prompt) + len(c.response)] = np.concatenate([c.prompt, c.response])
    all_logp = jax.nn.log_softmax(logits_alone(params, jnp.array(tokens)) / 0.9)
    return all_logp[len(c.prompt) - 1 :][: len(c.response)]


def logp_alone(params, c):
    return all_logp_alone(params, c)[jnp.arange(len(c.response)), jnp.array(c.response)]


def test_gradient_is_that_of_the_written_formula(reference):
    """Each conversation alone, unpacked, through the plain formula of ProRL Eq. 4 with TIS."""
    policy, anchor = random_params(1), random_params(2)

    def loss(params):
        total, count = 0.0, 0
        for c in CONVERSATIONS:
            new, ref = logp_alone(params, c), logp_alone(anchor, c)
            old = jax.lax.stop_gradient(logp_alone(policy, c)) - 0.3 * c.advantage
            ratio, d = jnp.exp(new - old), ref - new
            surrogate = jnp.minimum(
                ratio * c.advantage,
                jnp.clip(ratio, 1 - LOSS.clip_low, 1 + LOSS.clip_high) * c.advantage,
            )
            tis = jnp.minimum(jnp.exp(old - c.sampler_logp), LOSS.is_high)
            total += (-tis * surrogate + LOSS.kl_coef * (jnp.exp(d) - d - 1)).sum()
            count += len(c.response)
        return total / count

    value, expected = jax.value_and_grad(loss)(policy)
    assert_same(expected, reference[0], rtol=1e-4)
    np.testing.assert_allclose(reference[1]["update/loss"], value, rtol=1e-5)


def test_gradient_of_a_loss_by_responses_with_entropy_and_kl_in_the_reward():
    """GSPO, sequence masks, mean over responses, an entropy bonus: packed in lanes on four devices."""
    settings = LossSettings(
        policy_loss="gspo", aggregation="seq_mean_token_mean", correction="seq_mask_tis"
    )
    settings = replace(
        settings, kl_coef=0.1, kl_in="reward", kl_estimator="k1", is_high=0.5, entropy_coef=0.2
    )
    policy, anchor = random_params(1), random_params(2)

    def response_loss(params, c):
        new, all_logp = logp_alone(params, c), all_logp_alone(params, c)
        old = jax.lax.stop_gradient(logp_alone(policy, c)) - 0.3 * c.advantage
        kl = old - jax.lax.stop_gradient(logp_alone(anchor, c))
        advantage = c.advantage - 0.1 * jnp.cumsum(kl[::-1])[::-1]
        ratio = jnp.exp((new - old).mean())
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.4) * advantage)
        inside = jnp.exp((old - c.sampler_logp).mean()) <= 0.5
        weight = jnp.where(inside, jnp.exp(old - c.sampler_logp), 0.0)
        entropy = -(jnp.exp(all_logp) * all_logp).sum(-1)
        return (-weight * surrogate - 0.2 * entropy).mean()

    def loss(params):
        return sum(response_loss(params, c) for c in CONVERSATIONS) / len(CONVERSATIONS)

    value, expected = jax.value_and_grad(loss)(policy)
    delta, metrics = gradient(
        row_len=8 + 4 * 16,
        rows=4,
        layout=Layout(8, 4),
        mesh=make_mesh(MeshSettings(2, 2, 1)),
        loss=settings,
    )
    assert_same(expected, delta, rtol=1e-4)
    np.testing.assert_allclose(metrics["update/loss"], value, rtol=1e-4)
    assert 0 < metrics["update/is_weight"] and metrics["update/is_clipped"] > 0


scorer = functools.cache(functools.partial(make_score, MODEL))  # compiled once per temperature


@functools.cache
def updater(optimizer, temperature):
    return make_update(MODEL, optimizer, make_mesh(MeshSettings()), LOSS, temperature)


@functools.cache
def adam(learning_rate):
    return make_optimizer(OptimizerSettings(learning_rate=learning_rate))


def real_setup(learning_rate=1e-2):
    mesh, optimizer = make_mesh(MeshSettings()), adam(learning_rate)
    params = jax.device_put(random_params(1), param_shardings(mesh, MODEL.shapes()))
    state = TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    batch, used = packed(CONVERSATIONS)
    return mesh, optimizer, state, put_rows(mesh, batch), used


def test_ratio_is_one_at_the_first_inner_step():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(0.7)(state, batch, used)
    update = updater(optimizer, 0.7)
    state, first = update(state, batch, used)
    _, second = update(state, batch, used)
    assert first["update/ratio_deviation"] <= 1e-6
    assert first["update/ratio_max"] == pytest.approx(1) == first["update/ratio_min"]
    assert first["update/learning_rate"] == pytest.approx(1e-2)
    assert first["update/kl_ref"] <= 1e-10  # the reference is still the policy
    assert second["update/ratio_deviation"] > 1e-4


def test_extremes_are_those_of_the_tokens():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(0.7)(state, batch, used)
    ratios = np.random.default_rng(0).uniform(0.5, 3.0, batch.mask.shape)
    batch = replace(batch, old_logp=batch.old_logp - jnp.log(ratios))
    _, metrics = updater(optimizer, 0.7)(state, batch, used)
    mask = np.array(batch.mask)
    for name, values in (("ratio", ratios), ("advantage", np.array(batch.advantage))):
        tokens = values[mask]
        assert metrics[f"update/{name}"] == pytest.approx(tokens.mean(), rel=1e-4, abs=1e-6)
        assert metrics[f"update/{name}_max"] == pytest.approx(tokens.max(), rel=1e-4)
        assert metrics[f"update/{name}_min"] == pytest.approx(tokens.min(), rel=1e-4)
    assert metrics["update/advantage_std"] == pytest.approx(tokens.std(), rel=1e-4)


def test_extremes_may_all_be_of_one_sign():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(0.7)(state, batch, used)
    batch = replace(batch, advantage=-1.0 - jnp.abs(batch.advantage))
    _, metrics = updater(optimizer, 0.7)(state, batch, used)
    assert metrics["update/advantage_min"] < metrics["update/advantage_max"] <= -1.0


def test_old_logprobs_at_another_temperature_are_noticed():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(1.0)(state, batch, used)
    _, metrics = updater(optimizer, 0.7)(state, batch, used)
    assert metrics["update/ratio_deviation"] > 0.05


def test_a_non_finite_gradient_is_skipped_and_counted():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(1.0)(state, batch, used)
    batch = replace(batch, advantage=batch.advantage.at[0, 0].set(jnp.nan))
    before = jax.device_get(state)
    state, metrics = updater(optimizer, 1.0)(state, batch, used)
    assert metrics["update/skipped_nonfinite"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_unused_micro_batches_have_no_influence():
    _, optimizer, state, batch, used = real_setup()
    batch = scorer(1.0)(state, batch, used)
    assert used < batch.tokens.shape[0]
    rubbish = replace(
        batch,
        advantage=batch.advantage.at[used:].set(jnp.nan),
        mask=batch.mask.at[used:].set(True),
    )
    update = updater(optimizer, 1.0)
    left, _ = update(jax.tree.map(jnp.copy, state), batch, used)
    right, _ = update(jax.tree.map(jnp.copy, state), rubbish, used)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_float32_master_weights_move_by_small_steps():
    _, optimizer, state, batch, used = real_setup(learning_rate=1e-6)
    batch = scorer(1.0)(state, batch, used)
    scale = np.asarray(state.params["norm"]["scale"])
    assert (scale == 1).all()
    state, _ = updater(optimizer, 1.0)(state, batch, used)
    assert (np.asarray(state.params["norm"]["scale"]) != 1).all()


def test_the_stop_token_is_trained():
    """Rewarded responses that end in the stop token make the stop token more likely."""
    mesh, optimizer, state, _, _ = real_setup()
    stopping = [
        replace(c, response=np.append(c.response, 3).astype(np.int32), advantage=1.0)
        for c in CONVERSATIONS
    ]
    stopping = [replace(c, sampler_logp=np.full(len(c.response), -4.0)) for c in stopping]
    batch, used = packed(stopping)
    is_stop = batch.mask & (batch.tokens == 3)
    assert is_stop.sum() >= len(stopping)
    batch = put_rows(mesh, batch)
    score, update = scorer(1.0), updater(optimizer, 1.0)
    before = score(state, batch, used)
    state, _ = update(state, before, used)
    after = score(state, batch, used)
    assert np.asarray(after.old_logp)[is_stop].mean() > np.asarray(before.old_logp)[is_stop].mean()


def test_pack_keeps_every_token_once():
    batch, used = packed(CONVERSATIONS)
    batch = jax.tree.map(np.asarray, batch)
    found = []
    for row in range(used * 8):
        tokens, positions, segments, prompts, mask, logp = (
            getattr(batch, name)[divmod(row, 8)]
            for name in ("tokens", "positions", "segments", "prompts", "mask", "sampler_logp")
        )
        for segment in np.unique(segments[mask]):
            prompt, own = segments == prompts[segments == segment][0], segments == segment
            assert (
                not mask[prompt].any() and (mask[own] == ([False] + [True] * (own.sum() - 1))).all()
            )
            assert (
                np.append(positions[prompt], positions[own]) == np.arange((prompt | own).sum())
            ).all()
            sequence = np.append(tokens[prompt], tokens[own])
            found.append((tuple(sequence), tuple(tokens[own & mask]), tuple(logp[own & mask])))
    expected = [
        (tuple(np.concatenate([c.prompt, c.response])), tuple(c.response), tuple(c.sampler_logp))
        for c in CONVERSATIONS
    ]
    assert sorted(found) == sorted(expected)
    with pytest.raises(ValueError, match="update.row_len: 10 tokens cannot hold"):
        packed(CONVERSATIONS, row_len=10)


def group_of_four():
    prompt, sampler_logp = np.arange(10, dtype=np.int32), np.zeros(3, np.float32)
    return [Conversation(prompt, np.full(3, i, np.int32), sampler_logp, 0.0) for i in range(4)]


def test_prompts_that_are_not_shared_are_in_the_segment_of_their_response():
    batch, used = packed(group_of_four(), rows=1, row_len=2 * 13, layout=Layout())
    assert used == 2
    for row in range(2):
        np.testing.assert_array_equal(batch.segments[row, 0], [1] * 13 + [2] * 13)
        np.testing.assert_array_equal(batch.prompts[row, 0], batch.segments[row, 0])
        np.testing.assert_array_equal(batch.positions[row, 0], [*range(13), *range(13)])
        np.testing.assert_array_equal(batch.tokens[row, 0, :10], range(10))
        np.testing.assert_array_equal(
            batch.mask[row, 0], [False] * 10 + [True] * 3 + [False] * 10 + [True] * 3
        )


def test_a_prompt_stands_once_in_a_row():
    group = group_of_four()
    batch, used = packed(group, rows=1, row_len=9 + 4 * 4, layout=Layout(9))
    assert used == 1
    np.testing.assert_array_equal(
        batch.tokens[0, 0], [*range(9), 9, 0, 0, 0, 9, 1, 1, 1, 9, 2, 2, 2, 9, 3, 3, 3]
    )


def test_responses_lie_in_lanes_beside_the_prompts_of_their_row():
    group = group_of_four()
    other = [replace(c, prompt=c.prompt[:3]) for c in group]
    batch, used = packed(group + other, rows=1, row_len=12 + 3 * 8, layout=Layout(12, 3))
    assert used == 2
    np.testing.assert_array_equal(batch.tokens[0, 0, :11], [*range(9), 0, 1])
    for lane in range(3):
        at = slice(12 + 8 * lane, 20 + 8 * lane)
        np.testing.assert_array_equal(batch.mask[0, 0, at], [False, True, True, True] * 2)
        np.testing.assert_array_equal(batch.segments[0, 0, at][3:5], [2 * lane + 3, 2 * lane + 4])


def test_prompts_get_rows_of_their_own_where_sharing_rows_takes_too_many():
    """Two short responses to different prompts take the slots that a third prompt needs."""
    prompts = [np.full(5, n, np.int32) for n in range(3)]

    def item(prompt, length):
        return Conversation(
            prompts[prompt], np.full(length, 9, np.int32), np.zeros(length, np.float32), 0.0
        )

    items = [item(0, 7), item(1, 6), item(2, 5), item(0, 4), item(1, 3), item(2, 2)]
    sizes = {"row_len": 8 + 16, "micro_batch_rows": 1, "layout": Layout(8, 2)}
    batch, used = pack(items, micro_batches=3, **sizes)
    assert used == 3 and batch.mask.sum() == 27
    with pytest.raises(ValueError, match="3 rows do not fit in 2 micro-batches"):
        pack(items, micro_batches=2, **sizes)


def test_a_single_update_takes_the_old_logprobs_from_its_own_forward_pass():
    mesh, params = make_mesh(MeshSettings()), random_params(1)
    model = replace(MODEL, layout=SHARED)
    batch, used = packed(CONVERSATIONS)
    state = TrainState(params, random_params(2), SGD.init(params))
    full = make_score(model, 0.9)(state, batch, used)
    part = make_score(model, 0.9, policy=False)(state, batch, used)
    np.testing.assert_array_equal(part.ref_logp, full.ref_logp)
    assert not np.asarray(part.old_logp).any() and np.asarray(full.old_logp).any()
    after = []
    for scored, on_policy in ((full, False), (part, True)):
        fresh = TrainState(random_params(1), random_params(2), SGD.init(params))
        update = make_update(model, SGD, mesh, LOSS, 0.9, on_policy=on_policy)
        after.append(update(fresh, scored, used)[0].params)
    assert_same(*after, rtol=1e-6)


@pytest.mark.parametrize("clear_optimizer", [True, False])
def test_reset(clear_optimizer):
    _, optimizer, state, batch, used = real_setup()
    score, update = scorer(1.0), updater(optimizer, 1.0)
    for _ in range(2):
        state, _ = update(state, score(state, batch, used), used)
    moments = jax.device_get(state.opt_state)
    params = jax.device_get(state.params)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, state.params, state.ref_params)) > 0
    state = reset_reference(state, optimizer, state.params, clear_optimizer=clear_optimizer)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.ref_params))
    expected = jax.device_get(optimizer.init(params)) if clear_optimizer else moments
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(state.opt_state))
    state, metrics = update(state, score(state, batch, used), used)  # buffers are not shared
    assert metrics["update/kl_ref"] <= 1e-10


def test_resets_with_the_same_settings_share_their_program():
    """A run of thousands of steps has many resets: their programs must not add up."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(kwargs.get("fun_name")))

    state, settings = real_setup()[2], {"learning_rate": 0.123, "warmup_steps": 7}
    jax.monitoring.register_event_duration_secs_listener(note)
    for _ in range(3):
        optimizer = make_optimizer(OptimizerSettings(**settings))
        reset_reference(state, optimizer, state.params, clear_optimizer=True)
    assert compiled.count("jit(init_fn)") == 1, compiled


def test_initial_state_is_sharded_like_the_weights(tmp_path):
    from prolong_jax.config import RunConfig

    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))
    params = jax.device_put(random_params(), param_shardings(mesh, MODEL.shapes()))
    state = initial_state(RunConfig(), params)
    (moments,) = (value for _, value in optax.tree.get_all_with_path(state.opt_state, "mu"))
    for tree in (state.ref_params, moments):
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), params, tree
        )
        assert all(jax.tree.leaves(same))
    assert not state.params["layers"][0]["up"]["kernel"].sharding.is_fully_replicated


def test_weights_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshSettings(tensor=5))
    with pytest.raises(ValueError, match="mesh: tensor = 5 does not divide the dimension 96"):
        param_shardings(mesh, MODEL.shapes())
