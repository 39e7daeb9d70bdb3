"""What the sampler is asked and answers, and the sizes that it works with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from prolong_jax.config import RolloutSettings
from prolong_jax.mesh import ROW_AXES

CHUNK = 64  # tokens that are decoded between two looks of the host, at most
ALIGNED = 16  # a cache has a multiple of so many columns
PREFILL_TOKENS = 256  # of short prompts that a device reads together
PREFILL_LIMIT = 8192  # tokens of prompts that come in at once, on each device


class Request(NamedTuple):
    """One prompt, to be answered G times."""

    id: Any  # for the caller
    prompt: Sequence[int]  # token ids, at least one
    keys: np.ndarray  # u32 [G, 2] data of a random key per response, as from `sample_keys`
    max_len: int  # tokens of a response, at most


class Sample(NamedTuple):
    """One finished response, on the host."""

    id: Any  # of the request
    index: int  # in the group
    tokens: list[int]  # stop token included
    logp: list[float]  # nats, under the distribution that was sampled
    reason: str  # why it ended: "stop" (a stop token), "string" (a stop string) or "length"


@dataclass(frozen=True)
class Slots:
    """How much is sampled at once, and so what is compiled. Sizes are those of all local devices."""

    rows: int  # responses at once, at most; bounds the memory of the cache
    max_prompt_len: int  # tokens
    max_response_len: int  # tokens
    cache_lens: int = 8  # sizes of the cache, or one more: many compile longer, read less in vain
    chunk: int = CHUNK
    mesh: Mesh | None = None  # of the local devices; None: one device

    @property
    def devices(self) -> int:
        """How many devices share the rows."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[a] for a in ROW_AXES]))

    @property
    def most(self) -> int:
        """Rows of each device."""
        return max(1, self.rows // self.devices)

    @property
    def entry(self) -> int:
        """Free rows of a device with which it lets in a part of a group, if not the whole."""
        return -(-self.most // 4)

    @property
    def row_counts(self) -> list[int]:
        """The rows that a device may have: all, a half, a quarter or an eighth."""
        return sorted({-(-self.most // part) for part in (1, 2, 4, 8)})

    def row_count(self, live: int) -> int:
        return next(count for count in self.row_counts if count >= live)

    @property
    def quantum(self) -> int:
        """The columns of a cache are a multiple of this."""
        total = self.max_prompt_len + self.max_response_len
        return ALIGNED * -(-total // (ALIGNED * self.cache_lens))

    def cache_len(self, columns: int) -> int:
        return self.quantum * -(-columns // self.quantum)

    @property
    def all_cache_lens(self) -> list[int]:
        most = self.cache_len(self.max_prompt_len + self.max_response_len + self.quantum // 2)
        return list(range(self.quantum, most + 1, self.quantum))

    @property
    def prompt_block(self) -> int:
        """Prompts that a device reads together."""
        return max(1, min(self.most, PREFILL_TOKENS // self.max_prompt_len))

    @property
    def prompt_blocks(self) -> int:
        limit = max(1, min(self.most, PREFILL_LIMIT // self.max_prompt_len))
        return -(-limit // self.prompt_block)


def slots_of(settings: RolloutSettings, mesh: Mesh) -> Slots:
    """The sampler's sizes on the local devices."""
    return Slots(
        rows=settings.sample_rows,
        max_prompt_len=settings.max_prompt_len,
        max_response_len=settings.max_response_len,
        cache_lens=settings.cache_lens,
        mesh=mesh,
    )
