"""Values passed between the stages of one training step.

Dimension key, used as suffix of array names everywhere in the package:
B responses (in a `Batch`: packed rows, each of several), M micro-batches, R rows of one, G group,
P prompts, T tokens, S cache slots of a row, D width, H query heads, K kv heads, C channels per
head, F feed-forward, V vocabulary, N layers.
"""

from dataclasses import dataclass
from typing import Any

import jax

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean that is not divided yet, so that it adds up over micro-batches and devices."""

    total: Array  # f32 [] weighted sum
    weight: Array  # f32 [] sum of the weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Prompts and responses packed into rows of T tokens, with all that the update needs.

    A row holds segments one after the other and ends in padding. A segment is a prompt without its
    last token, or that last token and one response; all responses to a prompt see its segment.
    Or, where prompts are not shared, a segment is a prompt and one response.
    The values at slot t are about token t, as predicted from the tokens that it sees.
    """

    tokens: Array  # i32 [B, T] token ids
    positions: Array  # i32 [B, T] position in prompt and response, from 0
    segments: Array  # i32 [B, T] number of the segment in its row, from 1; 0 is padding
    prompts: Array  # i32 [B, T] number of the segment with the prompt
    mask: Array  # bool [B, T] true at response tokens, the stop token included
    sampler_logp: Array  # f32 [B, T] nats, under the distribution that was sampled
    old_logp: Array  # f32 [B, T] nats, under the policy before this step's updates
    ref_logp: Array  # f32 [B, T] nats, under the reference policy
    advantage: Array  # f32 [B, T] the response's advantage, at each of its tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All device state that outlives a step."""

    params: PyTree  # f32 master weights
    ref_params: PyTree  # f32 weights of the reference policy
    opt_state: PyTree  # optax state, f32 moments
