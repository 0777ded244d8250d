"""KronA_B^res: a Kronecker adapter beside the feed-forward sublayer, with a learnt residual (Edalati et al.,
arXiv 2212.10650, section 3).

    y <- FFN(x) + s x (A (x) B) + c x,    A [D/f, f], B [f, D/f]

    after   peft {"mlp_residual": {"krona_res": KronaRes(a[L, D/f, f], b[L, f, D/f], c[L], scale[L])}}

No non-linearity and no bias. B starts at 0 and c, the residual's scale, at 1, so that a fresh one is not the base;
`residual=0` starts on it. x is what the sublayer reads (in a pre-norm model the normed stream). It sits beside a whole
sublayer, so it does not merge. Factors as in KronA.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax

from research.errors import FlagError
from research.nn.sites import ResidualNode, Site
from research.peft.krona import factors
from research.peft.lokr import kron_dot
from research.peft.method import Card, Method, PyTree, Sites, constant, leaf, place, select

CARD = Card(paper="2212.10650", kind="hybrid", memory="yes", inference="extra linear")


class KronaRes(ResidualNode):
    """a [D/f, f], b [f, D/f] and c [] train; scale [] is s."""

    a: Any
    b: Any
    c: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b", "c")

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        x = x.astype(y.dtype)
        return y + kron_dot(x, self.a * self.scale, self.b) + self.c.astype(y.dtype) * x


def krona_res(factor: int = -1, scale: float = 1.0, residual: float = 1.0, targets: str = "mlp_residual") -> Method:
    """A Kronecker adapter and a residual beside sublayers.

    Args:
        factor: f, which divides the model's width; -1 splits it near its square root.
        scale: s.
        residual: start of c.
        targets: pattern of residual sites.
    Raises FlagError for a value out of range, a factor that does not divide, and a pattern without a match.
    """
    if scale == 0:
        raise FlagError("scale=0.0 would switch the update off: choose another value, such as 1.")

    def node(site: Site, rng: jax.Array) -> KronaRes:
        a, b = factors(site, rng, site.shape * 2, factor)
        return KronaRes(a, b, leaf(site, rng, constant(residual), ()), leaf(site, rng, constant(scale), ()))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "krona_res", rng, node)

    return Method(init, identity=residual == 0)
