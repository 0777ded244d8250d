"""SPoT: a prompt that starts from one trained on another task (Vu et al., arXiv 2110.07904, section 2).

    p_0 = the source task's trained prompt,   then prompt tuning as ever

    after   peft {"embed": {"prompt": {"spot": VirtualTokens(table[P, D])}}}

Without a `source` it is the run that trains one: the same prompt, started from rows of the token table. The paper takes
100 tokens; here the default is prompt tuning's 20. Which source suits a target, which the paper predicts from the
prompts' likeness, is left to the caller.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import FlagError, ModelError
from research.peft import adapter
from research.peft.method import Card, Method, Variables, at_least
from research.peft.prompt import POOL, prompts, started, token_table, vocabulary

CARD = Card(paper="2110.07904", kind="additive", memory="yes", inference="extra input")


def spot(length: int = 20, source: str = "") -> Method:
    """Virtual tokens that start from a trained prompt.

    Args:
        length: P, the source's own.
        source: adapter directory of a soft prompt on the same base; only `fit` reads it.
    Raises FlagError for a value out of range and, from `fit`, for a source of another length; ModelError, from `fit`,
    for a directory without a prompt of this base.
    """
    at_least("length", length, 1)

    def fit(rng: jax.Array, variables: Variables, *_: Any) -> Variables:
        def rows(site: str) -> jax.Array:
            table = token_table(variables["params"], site)
            if source:
                return trained(source, length, table.shape[1], re.escape(site))
            return vocabulary(rng, table, length, POOL)

        return started(variables, "spot", rows)

    return Method(lambda rng, sites: prompts(sites, rng, "spot", length), fit=fit, identity=False)


def trained(directory: str, length: int, width: int, site: str = ".+") -> jax.Array:
    """The one prompt [P, D] that an adapter directory holds (for the embed site of a path)."""
    leaves = adapter.load(directory).leaves
    tables = [x for path, x in leaves.items() if re.fullmatch(rf"peft/{site}/\w+/table", path)]
    if len(tables) != 1:
        raise ModelError(f"adapter {directory} holds {len(tables)} prompts, not one: name one of prompt or ptuning.")
    (table,) = tables
    if table.shape[1] != width:
        raise ModelError(f"adapter {directory} is of another base: its prompt is {table.shape[1]} wide, not {width}.")
    if len(table) != length:
        raise FlagError(f"length={length} is not the length of the prompt in {directory}: choose length={len(table)}.")
    return jnp.asarray(table, jnp.float32)
