"""The optimizer: AdamW with global-norm clipping and a constant learning rate after warm-up."""

import optax

from prolong_jax.config import OptimizerSettings


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Decoupled weight decay (arXiv 1711.05101) after clipping the gradient's global norm."""
    if settings.warmup_steps:
        schedule = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    else:
        schedule = settings.learning_rate
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )
