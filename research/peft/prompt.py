"""Prompt tuning: trained embeddings before the sequence (Lester et al., arXiv 2104.08691, section 2).

    [p_1 ... p_P, x_1 ... x_T],   only p trains

    after   peft {"embed": {"prompt": {"prompt": VirtualTokens(table[P, D])}}}

Slots 0..P-1 come before any padding and take positions 0..P-1; the text starts at position P. Starts (section 3.2):
`random`, U(-0.5, 0.5); `vocab`, rows of the token table among the first `pool` without replacement (a tokenizer's first
entries are its most common ones); `labels`, for each class the mean of its name's embeddings, and `vocab` rows when the
classes run out. `text`, the embeddings of a text repeated or cut to P, is HF PEFT's. The paper's default is 100 tokens
from class labels; here it is 20 at random, which needs no tokenizer and fits short contexts.
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, did_you_mean
from research.nn.param import dense, is_quantised
from research.nn.sites import EmbedNode, Site
from research.peft import tree
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    fold,
    is_node,
    leaf,
    place,
    select,
    uniform,
)  # fmt: skip

CARD = Card(paper="2104.08691", kind="additive", memory="yes", inference="extra input")
STARTS = ("random", "vocab", "labels", "text")
POOL = 5000


class VirtualTokens(EmbedNode):
    """table [P, D]."""

    table: Any
    trained: ClassVar[tuple[str, ...]] = ("table",)

    def tokens(self) -> jax.Array:
        return self.table


def prompt(
    length: int = 20,
    start: str = "random",
    pool: int = POOL,
    text: str = "",
    labels: str = "",
    *,
    tokenizer: Any = None,
) -> Method:
    """Virtual tokens before the sequence.

    Args:
        length: P.
        start: "random", "vocab", "labels" or "text".
        pool: how many of the first vocabulary rows are drawn from.
        text: what start=text starts from.
        labels: the classes' names for start=labels, as in negative|positive.
        tokenizer: the model's, for names and text; only `fit` needs it.
    Raises FlagError for a value out of range, an unknown start and an option that the start does not use.
    """
    at_least("length", length, 1)
    if start not in STARTS:
        raise FlagError(f"unknown start {start!r}.{did_you_mean(start, STARTS)}")
    for name, value in (("text", text), ("labels", labels)):
        if value and start != name:
            raise FlagError(f"start={start} does not use {name}={value}: leave it out, or choose start={name}.")
    names = [name.strip() for name in labels.split("|")] if start == "labels" else []
    if start == "text" and not text.strip():
        raise FlagError("start=text has no text: name one, such as text=Classify this sentence.")
    if not all(names):
        raise FlagError(f"labels={labels} has an empty name: name each class, as in labels=negative|positive.")
    if len(names) > length:
        raise FlagError(f"length={length} has no token for each of the {len(names)} labels: at least {len(names)}.")
    if pool != POOL and start not in ("vocab", "labels"):
        raise FlagError(f"start={start} does not use pool={pool}: leave it out, or choose start=vocab.")

    def rows(rng: jax.Array, table: jax.Array) -> jax.Array:
        if start == "text":
            return table[np.resize(ids(tokenizer, text, table), length)]
        means = [table[ids(tokenizer, name, table)].mean(axis=0, keepdims=True) for name in names]
        return jnp.concatenate([*means, vocabulary(rng, table, length - len(names), pool)])

    def fit(rng: jax.Array, variables: Variables, *_: Any) -> Variables:
        return started(variables, "prompt", lambda site: rows(rng, token_table(variables["params"], site)))

    init = lambda rng, sites: prompts(sites, rng, "prompt", length)  # noqa: E731
    return Method(init, fit=None if start == "random" else fit, identity=False)


def prompts(sites: Sites, rng: jax.Array, name: str, length: int) -> PyTree:
    """Places virtual tokens drawn from U(-0.5, 0.5)."""

    def node(site: Site, rng: jax.Array) -> VirtualTokens:
        return VirtualTokens(leaf(site, rng, uniform(0.5), (length, *site.shape), (None, *site.axes)))

    return place(select(sites, "embed", ".*"), name, rng, node)


def started(variables: Variables, name: str, rows: Callable[[str], jax.Array]) -> Variables:
    """The variables whose virtual tokens `name` are `rows(path of their site)`."""

    def new(path: str, node: Any) -> Any:
        site, _, key = path.rpartition("/")
        return node.replace(table=rows(site)) if key == name and isinstance(node, VirtualTokens) else node

    return variables | {"peft": tree.map_with_path(new, variables["peft"], is_leaf=is_node)}


def realised(variables: Variables, sites: Sites, name: str) -> Variables:
    """The variables whose node `name` that computes virtual tokens is replaced by what it computes."""
    peft = dict(variables["peft"])
    node = peft.pop(REPARAM, {}).get(name)
    if node is None:
        return variables
    tokens = tree.unflatten({f"{path}/{name}": VirtualTokens(node()) for path in select(sites, "embed", ".*")})
    return variables | {"peft": tree.merge_dicts(peft, tokens)}


def token_table(params: PyTree, site: str) -> jax.Array:
    """The token table [V, D] that is nearest to an embed site."""
    leaves = tree.paths(params, is_leaf=is_quantised)
    tables = {path: table for path, table in leaves.items() if f"/{path}".endswith("/tokens/embedding")}
    if not tables:
        raise FlagError("this model has no token table to start a prompt from. Valid: start=random.")
    return dense(tables[max(tables, key=lambda path: len(os.path.commonprefix([path, site])))], jnp.float32)


def vocabulary(rng: jax.Array, table: jax.Array, count: int, pool: int) -> jax.Array:
    """`count` of the first `pool` rows, each at most once."""
    if count > (most := min(pool, table.shape[0])):
        raise FlagError(f"{count} tokens are more than the {most} vocabulary rows to draw from: at most {most}.")
    return table[jax.random.choice(fold(rng, "vocab"), most, (count,), replace=False)]


def ids(tokenizer: Any, text: str, table: jax.Array) -> np.ndarray:
    """A text's tokens, without the special ones."""
    if tokenizer is None:
        raise FlagError("start=text and start=labels need the model's tokenizer, and it has none. Valid: start=vocab.")
    encoded = tokenizer.encode(text, add_special_tokens=False)
    found = np.asarray(getattr(encoded, "ids", encoded), np.int32)  # of `tokenizers`, or of `transformers`
    if not found.size or found.max() >= table.shape[0]:
        raise FlagError(f"{text!r} gives no tokens of this model: choose another text, or start=vocab.")
    return found
