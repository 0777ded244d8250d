"""Prompt tuning: trained embeddings before the sequence (Lester et al., arXiv 2104.08691, section 2).

    [p_1 ... p_P, x_1 ... x_T],   only p trains

    after   peft {"embed": {"prompt": {"prompt": VirtualTokens(tokens[P, D])}}}

Slots 0..P-1 come before any padding and take positions 0..P-1; the text starts at position P. Starts: `random`, U(-0.5,
0.5); `vocab`, rows of the token table among the first `pool` without replacement (section 3.2; a tokenizer's first
entries are its most common ones).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.nn.param import dense
from research.nn.sites import EmbedNode, Site
from research.peft.method import Method, PyTree, Sites, Variables, at_least, fold, leaf, place, select, uniform


class VirtualTokens(EmbedNode):
    """tokens [P, D]."""

    tokens: Any
    trained: ClassVar[tuple[str, ...]] = ("tokens",)

    def embed(self, x: jax.Array, mask: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, (length, d) = x.shape[0], self.tokens.shape
        tokens = jnp.broadcast_to(self.tokens.astype(x.dtype), (batch, length, d))
        slots = jnp.broadcast_to(jnp.arange(length, dtype=positions.dtype), (batch, length))
        return (
            jnp.concatenate([tokens, x], axis=1),
            jnp.concatenate([jnp.ones_like(slots, mask.dtype), mask], axis=1),
            jnp.concatenate([slots, positions + length], axis=1),
        )


def prompt(length: int = 20, start: str = "random", pool: int = 5000) -> Method:
    """length:

    P virtual tokens; start: "random" or "vocab"; pool: how many of the first vocabulary rows "vocab" draws from.
    """
    at_least("length", length, 1)
    if start not in ("random", "vocab"):
        raise FlagError(f"unknown start {start!r}.{did_you_mean(start, ('random', 'vocab'))}")
    if start == "vocab":
        at_least("pool", pool, length)

    def node(site: Site, rng: jax.Array) -> VirtualTokens:
        return VirtualTokens(leaf(site, rng, uniform(0.5), (length, *site.shape), (None, *site.axes)))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "embed", ".*"), "prompt", rng, node)

    def fit(rng: jax.Array, variables: Variables, *_: Any) -> Variables:
        table = dense(variables["params"]["embed"]["tokens"]["embedding"], jnp.float32)
        rows = jax.random.choice(fold(rng, "vocab"), min(pool, table.shape[0]), (length,), replace=False)
        peft = variables["peft"]
        here = peft["embed"]["prompt"] | {"prompt": VirtualTokens(table[rows])}
        return variables | {"peft": peft | {"embed": peft["embed"] | {"prompt": here}}}

    return Method(init, fit=fit if start == "vocab" else None, identity=False)
