"""PHM adapters: bottlenecks whose weights are sums of Kronecker products (Karimi Mahabadi et al., arXiv 2106.04647,
section 3.1; after Zhang et al., arXiv 2102.08597).

    W = sum_i A_i (x) B_i,    i = 1..n,    A_i [n, n], B_i [in/n, out/n]
    y <- y + gelu(y W_down + b_down) W_up + b_up

    after   peft {"attn_residual": {"phm": Phm(down_rule[L, n, n, n], down[L, n, D/n, m/n], down_bias[L, m],
                                               up_rule[L, n, n, n], up[L, n, m/n, D/n], up_bias[L, D])},
                  "mlp_residual": ...}

The n matrices A_i of a layer are its `rule`. Sites as in Houlsby; all layer norms train too, as in the paper. A starts
at N(0, 0.01^2), B at Glorot's uniform distribution, biases at 0 (the authors' code): near the identity, not on it. The
bottleneck's width m is D / reduction, rounded up to a multiple of n. W is formed only where that is the cheaper way.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import FlagError
from research.nn.sites import ResidualNode, Site
from research.peft.houlsby import ACTIVATIONS, known
from research.peft.layernorm import with_norms
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    at_least,
    divides,
    leaf,
    normal,
    place,
    select,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2106.04647", kind="hybrid", memory="yes", inference="extra FFN")


class Phm(ResidualNode):
    """Rules [n, n, n], down [n, D/n, m/n], up [n, m/n, D/n] (or the two factors of each), biases [m] and [D]."""

    down_rule: Any
    down: Any
    down_bias: Any
    up_rule: Any
    up: Any
    up_bias: Any
    activation: str = struct.field(pytree_node=False, default="gelu")
    trained: ClassVar[tuple[str, ...]] = ("down_rule", "down", "down_bias", "up_rule", "up", "up_bias")

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        h = ACTIVATIONS[self.activation](product(y, self.down_rule, self.down) + self.down_bias.astype(y.dtype))
        return y + product(h, self.up_rule, self.up) + self.up_bias.astype(y.dtype)


def product(x: jax.Array, rule: jax.Array, b: Any) -> jax.Array:
    """x [..., in] times sum_i rule[i] (x) b[i] -> [..., out]; rule [n, n, n], b [n, in/n, out/n] or two factors of it.

    einsum orders its products by their cost: for factors of low rank, and for few tokens, that never forms the sum.
    """
    n = rule.shape[0]
    factors = [part.astype(x.dtype) for part in (rule, *(b if isinstance(b, tuple) else (b,)))]
    terms = "...ac,iab,icr,ird->...bd" if isinstance(b, tuple) else "...ac,iab,icd->...bd"
    y = jnp.einsum(terms, x.reshape(*x.shape[:-1], n, -1), *factors, optimize="optimal")
    return y.reshape(*x.shape[:-1], -1)


def glorot(rows: int, columns: int) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Draws U(-l, l), l = sqrt(6 / (rows + columns))."""
    return uniform((6 / (rows + columns)) ** 0.5)


def widths(d: int, reduction: int, division: int) -> tuple[int, int]:
    """(D/n, m/n). FlagError where n does not divide D."""
    divides("division", division, d)
    return d // division, -(-d // (reduction * division))


def in_range(reduction: int, division: int, activation: str, std: float) -> None:
    """FlagError for an option out of range."""
    at_least("reduction", reduction, 1)
    at_least("division", division, 1)
    known(activation)
    if std <= 0:
        raise FlagError(f"std={std} is out of range: an A of zeros has no gradient. Valid: above 0, such as 0.01.")


def phm(
    reduction: int = 32,
    division: int = 4,
    activation: str = "gelu",
    targets: str = "(attn|mlp)_residual",
    norms: bool = True,
    std: float = 0.01,
) -> Method:
    """A bottleneck of Kronecker products after each sublayer.

    Args:
        reduction: D / m.
        division: n, a divisor of D.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        norms: whether the layer norms train too, as the paper has it.
        std: of the initial A.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    in_range(reduction, division, activation, std)

    def node(site: Site, rng: jax.Array) -> Phm:
        (d,), n = site.shape, division
        wide, narrow = widths(d, reduction, n)
        keys = jax.random.split(rng, 4)
        return Phm(
            leaf(site, keys[0], normal(std), (n, n, n)),
            leaf(site, keys[1], glorot(wide, narrow), (n, wide, narrow)),
            leaf(site, rng, zeros, (n * narrow,)),
            leaf(site, keys[2], normal(std), (n, n, n)),
            leaf(site, keys[3], glorot(wide, narrow), (n, narrow, wide)),
            leaf(site, rng, zeros, (d,), site.axes),
            activation,
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "phm", rng, node)

    return Method(init, trainable=with_norms(norms), identity=False)
