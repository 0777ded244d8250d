"""LoRA: a low-rank update beside each chosen kernel (Hu et al., arXiv 2106.09685, section 4.1).

    h = x W + (alpha / r) x A B,    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0

    before  {"q": {"kernel": W[L, in, out]}}
    after   {"q": {"kernel": W}}  and  peft {"q": {"lora": Lora(a[L, in, r], b[L, r, out], scale[L])}}

The initialisation of A is the authors' code's (Kaiming uniform with a = sqrt 5); the paper says Gaussian. B = 0 makes a
fresh LoRA the base itself.
"""

from typing import Any, ClassVar

import jax
from flax import struct

from research.errors import FlagError
from research.nn.dot import low_rank
from research.nn.sites import LinearNode, Site
from research.peft.method import Method, PyTree, Sites, at_least, constant, leaf, place, select, uniform, zeros


class Lora(LinearNode):
    """a [in, r] and b [r, out] train; scale [] is alpha / r."""

    a: Any
    b: Any
    scale: Any
    dropout: float = struct.field(pytree_node=False, default=0.0)
    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return low_rank(w, self.a * self.scale, self.b, self.dropout, rng)


def lora(rank: int = 8, alpha: float = 16.0, targets: str = "attn/(q|v)", dropout: float = 0.0) -> Method:
    """LoRA on chosen projections.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    if alpha == 0:
        raise FlagError("alpha=0.0 would switch the update off: choose another value, such as 16.")
    if not 0 <= dropout < 1:
        raise FlagError(f"dropout={dropout} is out of range: valid are 0 <= dropout < 1.")

    def node(site: Site, rng: jax.Array) -> Lora:
        d_in, d_out = site.shape
        if rank > min(site.shape):
            raise FlagError(
                f"rank={rank} is above the smaller side of a kernel [{d_in}, {d_out}]: at most {min(site.shape)}."
            )
        return Lora(
            leaf(site, rng, uniform(d_in**-0.5), (d_in, rank), (site.axes[0], None)),
            leaf(site, rng, zeros, (rank, d_out), (None, site.axes[1])),
            leaf(site, rng, constant(alpha / rank), ()),
            dropout,
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "lora", rng, node)

    return Method(init)
