"""KronA: the update is a Kronecker product (Edalati et al., arXiv 2212.10650, section 3).

    W + s A (x) B,    A [in/f, g], B [f, out/g]

    after   peft {"q": {"krona": Krona(a[L, in/f, g], b[L, f, out/g], scale[L])}}

f and g are the factors of `in` and `out` below their square roots: at 768 that gives the paper's A [32, 24] and
B [24, 32]. A product of ranks is the rank, so that the update can have full rank with few parameters. B starts at 0, so
that a fresh KronA is the base itself, and A at U(-1/sqrt(in/f), 1/sqrt(in/f)). The paper tunes s for each task; here it
is 1. x is multiplied by the factors, as in LoKr, of which this is the form without low rank.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.nn.sites import LinearNode, Site
from research.peft.lokr import kron_dot, split
from research.peft.method import Card, Method, PyTree, Sites, constant, leaf, place, select, uniform, zeros

CARD = Card(paper="2212.10650", kind="reparametrisation", memory="yes", inference="none")


class Krona(LinearNode):
    """a [in/f, g] and b [f, out/g] train; scale [] is s."""

    a: Any
    b: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        return y + kron_dot(x, self.a * self.scale, self.b)

    def fold_output(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return w + self.scale * jnp.kron(self.a, self.b), bias


def factors(site: Site, rng: jax.Array, sides: tuple[int, int], factor: int) -> tuple[Any, Any]:
    """A, and B = 0, of a site whose update has the given sides."""
    (f, rows), (g, columns) = (split(side, factor) for side in sides)
    return leaf(site, rng, uniform(rows**-0.5), (rows, g)), leaf(site, rng, zeros, (f, columns))


def krona(factor: int = -1, scale: float = 1.0, targets: str = "attn/(q|v)") -> Method:
    """KronA on chosen projections.

    Args:
        factor: f and g, which divide both sides of a kernel; -1 splits each near its square root.
        scale: s.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range, a factor that does not divide, and a pattern without a match.
    """
    if scale == 0:
        raise FlagError("scale=0.0 would switch the update off: choose another value, such as 1.")

    def node(site: Site, rng: jax.Array) -> Krona:
        return Krona(*factors(site, rng, site.shape, factor), leaf(site, rng, constant(scale), ()))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "krona", rng, node)

    return Method(init)
