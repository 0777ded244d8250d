"""From logits to a token: greedy, temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082).

The filters come in that order, each on what the one before left, as in `transformers`. Each row draws with a key of its
own, so that a row's text does not depend on who else is in the batch.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.errors import FlagError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.

    Raises FlagError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, ok, valid in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above, such as 0.8"),
            ("top_k", self.top_k >= 0, "0 (off) or above, such as 50"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off), such as 0.95"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or above and below 1, such as 0.05"),
        ):
            if not ok:
                raise FlagError(f"{name}={getattr(self, name)} is out of range: valid are numbers {valid}.")

    def filtered(self, logits: jax.Array) -> jax.Array:
        """logits [..., V] -> the same over temperature, with -inf where a token may not be drawn."""
        logits = logits.astype(jnp.float32) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
            kept = jnp.where(before < self.top_p, ranked, jnp.inf)  # the most likely one always stays
            logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
        if self.min_p > 0:
            floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < floor, -jnp.inf, logits)
        return logits

    def draw(self, rngs: jax.Array, logits: jax.Array) -> jax.Array:
        """rngs [B] keys, logits [B, V] -> tokens int32 [B]."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(rngs, self.filtered(logits)).astype(jnp.int32)


GREEDY = Sampling(temperature=0.0)
