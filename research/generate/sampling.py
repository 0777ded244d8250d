"""From logits to a token: greedy, temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082).

The filters come in that order, each on what the one before left, as in `transformers`. Each row draws with a key of its
own, so that a row's text does not depend on who else is in the batch.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.generate import history


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.

    repetition_penalty (1: none) and no_repeat_ngram (0: none) come before all of them, greedy or not: `history`.
    Raises FlagError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        for name, ok, valid in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above, such as 0.8"),
            ("top_k", self.top_k >= 0, "0 (off) or above, such as 50"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off), such as 0.95"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or above and below 1, such as 0.05"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off), such as 1.1"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (off) or above, such as 3"),
        ):
            if not ok:
                raise FlagError(f"{name}={getattr(self, name)} is out of range: valid are numbers {valid}.")

    def constrained(self, logits: jax.Array, tokens: jax.Array, real: jax.Array, end: jax.Array | int) -> jax.Array:
        """logits [B, V] after what is said: tokens [B, S], real bool [B, S], of which `end` slots are filled."""
        if self.repetition_penalty != 1:
            logits = history.penalised(logits, tokens, real, self.repetition_penalty)
        if self.no_repeat_ngram:
            logits = history.without_repeats(logits, tokens, real, end, self.no_repeat_ngram)
        return logits

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
