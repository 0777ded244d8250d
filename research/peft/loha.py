"""LoHa: the update is the elementwise product of two low-rank ones (Hyeon-Woo et al., FedPara, arXiv 2108.06098,
section 2.2; as an adapter in LyCORIS, arXiv 2309.14859).

    W + (alpha / r) (A1 B1) o (A2 B2),    of rank up to r^2

    after   peft {"q": {"loha": Loha(a1[L, in, r], b1[L, r, out], a2, b2, scale[L])}}

A2 starts at 0, so that a fresh LoHa is the base itself; A1 ~ U(-1/sqrt(in), 1/sqrt(in)), B1 and B2 ~ U(-1/sqrt(r),
1/sqrt(r)): HF PEFT's initialisation, after the paper's (LyCORIS draws normal numbers).

Columns k, l of the products make one of rank r^2 exactly, with A[:, kl] = A1[:, k] A2[:, l] and B likewise. Where
r^2 (in + out) < in * out that is the cheaper form: it stays deferred as LoRA's does, and no gradient of W's size is
formed. Else the update is made dense.

HF's hada_w1_a (out, r) is b1', hada_w1_b (r, in) is a1', and so on.
"""

from typing import Any, ClassVar

import jax

from research.nn.dot import Plus, low_rank
from research.nn.sites import LinearNode, Site
from research.peft.lora import check_alpha, check_rank
from research.peft.method import Card, Method, PyTree, Sites, at_least, constant, leaf, place, select, uniform, zeros

CARD = Card(paper="2108.06098", kind="reparametrisation")


class Loha(LinearNode):
    """a1, a2 [in, r] and b1, b2 [r, out] train; scale [] is alpha / r."""

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a1", "b1", "a2", "b2")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        (d_in, r), d_out = self.a1.shape, self.b1.shape[1]
        if r * r * (d_in + d_out) < d_in * d_out:
            a = (self.a1[:, :, None] * self.a2[:, None, :]).reshape(d_in, r * r)
            b = (self.b1[:, None, :] * self.b2[None, :, :]).reshape(r * r, d_out)
            return low_rank(w, a * self.scale, b)
        return Plus(w, self.scale * product(self.a1, self.b1) * product(self.a2, self.b2))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b of a kernel's size, with an axis that keeps it from being stored for the backward pass (remat "dots" stores
    products without batch axes): a thin product is cheap to make again.
    """
    return jax.lax.dot_general(a[None], b[None], (((2,), (1,)), ((0,), (0,))))[0]


def loha(rank: int = 8, alpha: float = 8.0, targets: str = "attn/(q|v)") -> Method:
    """LoHa on chosen projections.

    Args:
        rank: r of each of the two products, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    check_alpha(alpha)

    def node(site: Site, rng: jax.Array) -> Loha:
        check_rank(rank, site)
        d_in, d_out = site.shape
        keys = jax.random.split(rng, 3)
        a = lambda draw: leaf(site, keys[0], draw, (d_in, rank), (site.axes[0], None))  # noqa: E731
        b = lambda key: leaf(site, key, uniform(rank**-0.5), (rank, d_out), (None, site.axes[1]))  # noqa: E731
        scale = leaf(site, rng, constant(alpha / rank), ())
        return Loha(a(uniform(d_in**-0.5)), b(keys[1]), a(zeros), b(keys[2]), scale)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "loha", rng, node)

    return Method(init)
