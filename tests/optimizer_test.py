import jax.numpy as jnp
import numpy as np

from prolong_jax.config import OptimizerSettings
from prolong_jax.optimizer import make_optimizer


def steps(settings, gradients):
    """The size of each update of one weight."""
    optimizer, weight, sizes = make_optimizer(settings), jnp.ones(()), []
    state = optimizer.init(weight)
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, weight)
        sizes.append(np.asarray(update).item())
    return sizes


def test_warm_up_reaches_the_rate_and_starts_above_zero():
    settings = OptimizerSettings(learning_rate=0.1, warmup_steps=4, eps=0.0)
    expected = -0.1 * np.array([0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(steps(settings, [0.5] * 5), expected, rtol=1e-5)
    np.testing.assert_allclose(
        steps(OptimizerSettings(learning_rate=0.1, eps=0.0), [0.5] * 2), [-0.1, -0.1], rtol=1e-5
    )


def test_the_gradient_is_clipped_before_the_moments():
    settings = OptimizerSettings(learning_rate=0.1, max_grad_norm=1.0, b1=0.0, eps=1.0)
    np.testing.assert_allclose(steps(settings, [100.0]), [-0.05], rtol=1e-5)  # 1 / (1 + eps)


def test_weight_decay_is_decoupled():
    settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.5)
    np.testing.assert_allclose(steps(settings, [0.0]), [-0.05], rtol=1e-5)
