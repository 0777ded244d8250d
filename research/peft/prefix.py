"""Prefix tuning: trained keys and values before every layer's own (Li and Liang, arXiv 2101.00190, section 4).

    P = tanh(E W1 + b1) W2 + b2,    E [P, D], W1 [D, hidden], W2 [hidden, L*2*kv_heads*K]    (section 4.3; not kept)

    in training  peft {"reparam": {"prefix": PrefixMlp(table, w1, b1, w2, b2)},
                       "embed": {"prompt": {"prefix": Shift(P)}}}
    realised     peft {"layers": {"attn": {"kv": {"prefix": Prefix(k[L, P, kv_heads, K], v)}}},
                       "embed": {"prompt": {"prefix": Shift(P)}}}

The text's positions start after the prefix, as they do where a prefix is a cache of P past tokens. `hidden=0` trains
keys and values themselves. E, and with `hidden=0` k and v, start at N(0, 1), W at U(-1/sqrt(in), 1/sqrt(in)), b at 0.
The paper's start for little data, the activations of real words, is not here: `fit` sees the parameters and a loss, but
no model to read activations from.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import LogicallyPartitioned

from research.nn.sites import AttentionNode, EmbedNode, Node, Site, Virtual
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
    leaf,
    normal,
    place,
    select,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2101.00190", kind="additive", memory="yes", inference="extra input")


class Prefix(AttentionNode):
    """k, v [P, kv_heads, K]; rotary embedding is not applied to them."""

    k: Any
    v: Any
    trained: ClassVar[tuple[str, ...]] = ("k", "v")

    def keys_values(self, x: jax.Array, project: Callable) -> Virtual:
        return Virtual(self.k, self.v, jnp.ones(self.k.shape[:1], bool))


class Shift(EmbedNode):
    """Moves the text's positions by `by` [] int32."""

    by: Any
    trained: ClassVar[tuple[str, ...]] = ()

    def shift(self) -> jax.Array:
        return self.by


class PrefixMlp(Node):
    """table [P, D], w1 [D, hidden], b1 [hidden], w2 [hidden, N], b2 [N], where N = layers * 2 * kv_heads * K."""

    table: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ("table", "w1", "b1", "w2", "b2")

    def __call__(self) -> jax.Array:
        """-> [P, N]."""
        return jnp.tanh(self.table @ self.w1 + self.b1) @ self.w2 + self.b2


def shift(sites: Sites, rng: jax.Array, name: str, length: int) -> PyTree:
    """Places the position shift at the embed site."""
    by = lambda rng, shape: jnp.full(shape, length, jnp.int32)  # noqa: E731
    return place(select(sites, "embed", ".*"), name, rng, lambda site, rng: Shift(leaf(site, rng, by, ())))


def prefixes(sites: Sites, rng: jax.Array, name: str, length: int, targets: str) -> PyTree:
    """Places keys and values drawn from N(0, 1) at each attention site, and the shift."""

    def node(site: Site, rng: jax.Array) -> Prefix:
        k, v = jax.random.split(rng)
        shape, axes = (length, *site.shape), (None, *site.axes)
        return Prefix(leaf(site, k, normal(1.0), shape, axes), leaf(site, v, normal(1.0), shape, axes))

    return tree.merge_dicts(
        place(select(sites, "attention", targets), name, rng, node), shift(sites, rng, name, length)
    )


def projected(sites: Sites, rng: jax.Array, name: str, length: int, hidden: int, targets: str) -> PyTree:
    """Places the MLP that gives the keys and values of all attention sites, and the shift."""
    (d,) = next(iter(select(sites, "embed", ".*").values())).shape
    width = sum(_width(site) for site in select(sites, "attention", targets).values())
    table, w1, w2 = jax.random.split(fold(rng, REPARAM), 3)
    plain = lambda x: LogicallyPartitioned(x, (None,) * x.ndim)  # noqa: E731
    mlp = PrefixMlp(
        plain(normal(1.0)(table, (length, d))),
        plain(uniform(d**-0.5)(w1, (d, hidden))),
        plain(zeros(w1, (hidden,))),
        plain(uniform(hidden**-0.5)(w2, (hidden, width))),
        plain(zeros(w2, (width,))),
    )
    return tree.merge_dicts({REPARAM: {name: mlp}}, shift(sites, rng, name, length))


def realised(variables: Variables, sites: Sites, name: str, targets: str) -> Variables:
    """The variables whose MLP `name` is replaced by the keys and values it gives."""
    peft = dict(variables["peft"])
    mlp = peft.pop(REPARAM, {}).get(name)
    if mlp is None:
        return variables
    flat, start, out = mlp(), 0, {}
    for path, site in sorted(select(sites, "attention", targets).items(), key=lambda item: _natural(item[0])):
        part = flat[:, start : start + _width(site)].reshape(-1, *site.stack.shape, 2, *site.shape)
        start += _width(site)
        k, v = jnp.moveaxis(part, part.ndim - 3, 0)
        out[f"{path}/{name}"] = Prefix(*(jnp.moveaxis(x, 0, x.ndim - 3) for x in (k, v)))
    return variables | {"peft": tree.merge_dicts(peft, tree.unflatten(out))}


def prefix(length: int = 10, hidden: int = 512, targets: str = "attn/kv") -> Method:
    """Keys and values before every layer's own.

    Args:
        length: P virtual tokens.
        hidden: width of the reparametrising MLP; 0 trains keys and values themselves.
        targets: pattern of attention sites.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("length", length, 1)
    at_least("hidden", hidden, 0)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        if hidden == 0:
            return prefixes(sites, rng, "prefix", length, targets)
        return projected(sites, rng, "prefix", length, hidden, targets)

    realise = lambda variables, sites: realised(variables, sites, "prefix", targets)  # noqa: E731
    return Method(init, realise=realise, identity=False)


def _width(site: Site) -> int:
    return 2 * int(np.prod((*site.stack.shape, *site.shape)))


def _natural(path: str) -> tuple:
    """Sorts layers_10 behind layers_9."""
    return tuple(int(part) if part.isdigit() else 0 for part in path.replace("/", "_").split("_")), path
