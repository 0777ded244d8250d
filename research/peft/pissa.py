"""PiSSA: LoRA on the principal singular triplets, while the rest of the kernel stays (Meng et al., arXiv 2404.02948,
section 3).

    W = U S V';   A0 = U_r sqrt(S_r / s), B0 = sqrt(S_r / s) V_r', s = alpha / r
    h = x (W - s A0 B0) + s x A B,    A = A0 and B = B0 at the start
      = x W + s x ((A - A0) B + A0 (B - B0))

    after   peft {"q": {"pissa": Start(a[L, in, r], b[L, r, out], a0, b0, scale[L])}}

The base in `params` is never changed: the residual kernel W - s A0 B0 is kept as W and frozen copies of the start,
which cost an adapter file as much again as what trains. In the second form a fresh one is the base itself, to the bit,
and half precision rounds no small step away. `fit` computes exact singular values where the paper has a fast
approximation.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.dot import low_rank
from research.nn.sites import LinearNode
from research.peft.lora import from_kernels, loras
from research.peft.method import Card, Method, Variables

CARD = Card(paper="2404.02948", kind="reparametrisation")


class Start(LinearNode):
    """W + scale (a b - a0 b0): a [in, r] and b [r, out] train, a0 and b0 are where they started."""

    a: Any
    b: Any
    a0: Any
    b0: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        a = jnp.concatenate([self.a - self.a0, self.a0], axis=-1) * self.scale
        return low_rank(w, a, jnp.concatenate([self.b, self.b - self.b0], axis=-2))

    def at(self, a: jax.Array, b: jax.Array) -> "Start":
        """The node that starts at a, b."""
        return self.replace(a=a, b=b, a0=a, b0=b)


def pissa(rank: int = 8, alpha: float | None = None, targets: str = "attn/(q|v)") -> Method:
    """LoRA that starts from the kernel's largest singular values.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank; None is the rank, as in the paper.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    make = lambda site, a, b, scale: Start(a, b, a, b, scale)  # noqa: E731
    init = loras("pissa", rank, rank if alpha is None else alpha, targets, make=make)

    def start(node: Start, w: jax.Array) -> Start:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[:rank] / jnp.abs(node.scale))
        return node.at(u[:, :rank] * root * jnp.sign(node.scale), root[:, None] * vt[:rank])

    def fit(rng: jax.Array, variables: Variables, loss: Any, batches: Any) -> Variables:
        return from_kernels(variables, start)

    return Method(init, fit=fit)
