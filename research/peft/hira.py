"""HiRA: the update is the kernel times a low-rank matrix, element by element (Huang et al., ICLR 2025,
openreview.net/forum?id=TwJrTz9cRS, section 3).

    W + s W o (A B),    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0

    after   peft {"q": {"hira": Hira(a[L, in, r], b[L, r, out], scale[L])}}

W o (A B) has a high rank where W has. B = 0 makes a fresh HiRA the base itself. s is 1, as in HF PEFT, whose
initialisation this is. The update is made dense, but A B is not kept for the backward pass: it costs r / tokens of the
layer's own product to make again.

HF's hira_A (r, in) is a', hira_B (out, r) is b'.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.nn.dot import Plus
from research.nn.param import dense
from research.nn.sites import LinearNode, Site
from research.peft.loha import product
from research.peft.lora import check_rank
from research.peft.method import Card, Method, PyTree, Sites, at_least, constant, leaf, place, select, uniform, zeros

CARD = Card(paper="openreview:TwJrTz9cRS", kind="reparametrisation", small="rank=4")


class Hira(LinearNode):
    """a [in, r] and b [r, out] train; scale [] is s."""

    a: Any
    b: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def weight(self, w: Any, rng: jax.Array | None) -> Plus:
        return Plus(w, dense(w, jnp.float32) * product(self.a * self.scale, self.b))


def hira(rank: int = 32, scale: float = 1.0, targets: str = "attn/(q|v)") -> Method:
    """HiRA on chosen projections.

    Args:
        rank: r, at most the smaller side of a kernel.
        scale: s.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    if scale == 0:
        raise FlagError("scale=0.0 would switch the update off: choose another value, such as 1.")

    def node(site: Site, rng: jax.Array) -> Hira:
        check_rank(rank, site)
        d_in, d_out = site.shape
        return Hira(
            leaf(site, rng, uniform(d_in**-0.5), (d_in, rank), (site.axes[0], None)),
            leaf(site, rng, zeros, (rank, d_out), (None, site.axes[1])),
            leaf(site, rng, constant(scale), ()),
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "hira", rng, node)

    return Method(init)
