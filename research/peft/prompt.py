"""Prompt tuning: trained embeddings before the sequence (Lester et al., arXiv 2104.08691, section 2).

    [p_1 ... p_P, x_1 ... x_T],   only p trains

    after   peft {"embed": {"prompt": {"prompt": VirtualTokens(table[P, D])}}}

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
    """table [P, D]."""

    table: Any
    trained: ClassVar[tuple[str, ...]] = ("table",)

    def tokens(self) -> jax.Array:
        return self.table


def prompt(length: int = 20, start: str = "random", pool: int = 5000) -> Method:
    """Virtual tokens before the sequence.

    Args:
        length: P.
        start: "random" or "vocab".
        pool: how many of the first vocabulary rows "vocab" draws from.
    Raises FlagError for a value out of range and an unknown start.
    """
    at_least("length", length, 1)
    if start not in ("random", "vocab"):
        raise FlagError(f"unknown start {start!r}.{did_you_mean(start, ('random', 'vocab'))}")

    def node(site: Site, rng: jax.Array) -> VirtualTokens:
        return VirtualTokens(leaf(site, rng, uniform(0.5), (length, *site.shape), (None, *site.axes)))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "embed", ".*"), "prompt", rng, node)

    def fit(rng: jax.Array, variables: Variables, *_: Any) -> Variables:
        table = dense(variables["params"]["embed"]["tokens"]["embedding"], jnp.float32)
        if length > (most := min(pool, table.shape[0])):
            raise FlagError(f"length={length} is more than the {most} vocabulary rows to draw from: at most {most}.")
        rows = jax.random.choice(fold(rng, "vocab"), most, (length,), replace=False)
        peft = variables["peft"]
        here = peft["embed"]["prompt"] | {"prompt": VirtualTokens(table[rows])}
        return variables | {"peft": peft | {"embed": peft["embed"] | {"prompt": here}}}

    return Method(init, fit=fit if start == "vocab" else None, identity=False)
