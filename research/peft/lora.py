"""LoRA: a low-rank update beside each chosen kernel (Hu et al., arXiv 2106.09685, section 4.1).

    h = x W + (alpha / r) x A B,    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0

    before  {"q": {"kernel": W[L, in, out]}}
    after   {"q": {"kernel": W}}  and  peft {"q": {"lora": Lora(a[L, in, r], b[L, r, out], scale[L])}}

The initialisation of A is the authors' code's (Kaiming uniform with a = sqrt 5); the paper says Gaussian. B = 0 makes a
fresh LoRA the base itself. Below it stands what the methods of LoRA's family are made with.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import FlagError, did_you_mean
from research.nn.dot import low_rank
from research.nn.param import dense
from research.nn.sites import LinearNode, Node, Site
from research.peft import tree
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    constant,
    is_node,
    leaf,
    matcher,
    place,
    select,
    split_outside,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2106.09685", kind="reparametrisation", memory="yes", inference="none")


class Lora(LinearNode):
    """a [in, r] and b [r, out] train; scale [] is alpha / r."""

    a: Any
    b: Any
    scale: Any
    dropout: float = struct.field(pytree_node=False, default=0.0)
    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return low_rank(w, self.a * self.scale, self.b, self.dropout, rng)


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "attn/(q|v)",
    dropout: float = 0.0,
    rank_pattern: str = "",
    alpha_pattern: str = "",
) -> Method:
    """LoRA on chosen projections.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
        rank_pattern: other ranks for some of the sites, as in mlp/up:16|attn/(q|v):4; the first match counts.
        alpha_pattern: other alphas, likewise.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    return Method(loras("lora", rank, alpha, targets, dropout, rank_pattern, alpha_pattern))


# --------------------------------------------------------------------------------------------------- for LoRA's family


def loras(
    name: str,
    rank: int,
    alpha: float,
    targets: str,
    dropout: float = 0.0,
    rank_pattern: str = "",
    alpha_pattern: str = "",
    scale: Callable[[float, int], float] = operator.truediv,
    make: Callable[[Site, Any, Any, Any], Node] | None = None,
) -> Callable[[jax.Array, Sites], PyTree]:
    """Checks the options and returns an `init` that puts `make(site, a, b, scale)`, by default a `Lora`, at each site.

    A and B are LoRA's; the scale is `scale(alpha, rank)`.
    """
    at_least("rank", rank, 1)
    check_alpha(alpha)
    if not 0 <= dropout < 1:
        raise FlagError(f"dropout={dropout} is out of range: valid are 0 <= dropout < 1.")
    ranks = by_pattern("rank_pattern", rank_pattern, int, lambda value: at_least("rank_pattern", value, 1))
    alphas = by_pattern("alpha_pattern", alpha_pattern, float, check_alpha)
    make = make or (lambda site, a, b, scale: Lora(a, b, scale, dropout))

    def node(rank: int, alpha: float, site: Site, rng: jax.Array) -> Node:
        d_in, d_out = site.shape
        check_rank(rank, site)
        return make(
            site,
            leaf(site, rng, uniform(d_in**-0.5), (d_in, rank), (site.axes[0], None)),
            leaf(site, rng, zeros, (rank, d_out), (None, site.axes[1])),
            leaf(site, rng, constant(scale(alpha, rank)), ()),
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        sites = select(sites, "linear", targets)
        own_ranks, own_alphas = ranks(sites), alphas(sites)
        one = lambda path: partial(node, own_ranks.get(path, rank), own_alphas.get(path, alpha))  # noqa: E731
        return tree.merge_dicts(*(place({path: site}, name, rng, one(path)) for path, site in sites.items()))

    return init


def check_alpha(alpha: float) -> None:
    """FlagError for 0."""
    if alpha == 0:
        raise FlagError(f"alpha={alpha} would switch the update off: choose another value, such as 16.")


def check_rank(rank: int, site: Site, option: str = "rank") -> None:
    """FlagError where a rank is above the kernel's."""
    if rank > min(site.shape):
        raise FlagError(
            f"{option}={rank} is above the smaller side of a kernel {list(site.shape)}: at most {min(site.shape)}."
        )


def by_pattern(option: str, text: str, kind: type, check: Callable[[Any], None]) -> Callable[[Sites], dict[str, Any]]:
    """Reads mlp/up:16|attn/(q|v):4, where a | inside brackets belongs to a pattern, and checks each value.

    Returns sites -> the value of the first pattern that matches, by path; FlagError where a pattern matches no site.
    """
    found = {}
    for part in split_outside(text, r"\|") if text else []:
        pattern, _, number = part.strip().rpartition(":")
        try:
            value = kind(number)
        except ValueError:
            value = math.nan
        if not pattern or not math.isfinite(value):
            raise FlagError(f"{option}: {part!r} is not of the form pattern:{kind.__name__}, such as mlp/up:16.")
        check(value)
        found[matcher(pattern), part] = value

    def values(sites: Sites) -> dict[str, Any]:
        out = {}
        for (matches, part), value in found.items():
            if not any(map(matches, sites)):
                near = did_you_mean(part.rpartition(":")[0], {path.partition("/")[2] for path in sites})
                raise FlagError(f"{option}={part} matches no targeted site.{near}")
            out = dict.fromkeys(filter(matches, sites), value) | out
        return out

    return values


def from_kernels(variables: Variables, start: Callable[[Any, jax.Array], Node]) -> Variables:
    """Replaces every node by `start(node, w)`, w [in, out] its site's kernel in fp32, one layer at a time."""

    def one(pair: tuple[Node, Any]) -> Node:
        return start(pair[0], dense(pair[1], jnp.float32))

    def at(added: PyTree, params: PyTree) -> PyTree:
        if not is_node(added):
            return {key: at(x, params if is_node(x) else params[key]) for key, x in added.items()}
        w = params["kernel"]
        return jax.lax.map(one, (added, w)) if w.ndim == 3 else one((added, w))

    return variables | {"peft": at(variables["peft"], variables["params"])}
