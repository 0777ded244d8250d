"""LoKr: the update is a Kronecker product whose factors may be low-rank (Yeh et al., LyCORIS, arXiv 2309.14859,
section 3.3).

    W + (alpha / r) W1 (x) W2,    W1 [m, l], W2 [n, k] = A2 B2,    in = m n, out = l k

    after   peft {"q": {"lokr": Lokr(w1[L, m, l], w2_a[L, n, r], w2_b[L, r, k], scale[L])}}

Sides are split near their square roots (`factor=-1`) with m <= n and l <= k. W2 is low-rank where r < max(n, k) / 2,
else whole; so is W1, with `both`, where r < max(m, l) / 2. W1 (or its B1) starts at 0, so that a fresh LoKr is the base
itself, everything else at U(-1/sqrt(c), 1/sqrt(c)) with c the factor's input side, and r for B: HF PEFT's
initialisation (LyCORIS has W2 = 0).

x (W1 (x) W2) is two products with the factors, x seen as [tokens, m, n]: far fewer than with W, and neither the update
nor a gradient of its size is formed. That is an `output` hook; in a merge the update is folded as one array.

HF's lokr_w1 is w1', lokr_w2_a (k, r) is w2_b', lokr_w2_b (r, n) is w2_a'.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.sites import LinearNode, Site
from research.peft.lora import check_alpha
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    at_least,
    constant,
    divides,
    leaf,
    place,
    select,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2309.14859", kind="reparametrisation", small="rank=2")


class Lokr(LinearNode):
    """w1 [m, l] or w1_a [m, r] and w1_b [r, l]; w2 [n, k] or w2_a [n, r] and w2_b [r, k]; None what is not there."""

    w1: Any
    w1_a: Any
    w1_b: Any
    w2: Any
    w2_a: Any
    w2_b: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """(alpha / r) W1 and W2."""
        w1 = self.w1_a @ self.w1_b if self.w1 is None else self.w1
        w2 = self.w2_a @ self.w2_b if self.w2 is None else self.w2
        return w1 * self.scale, w2

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        return y + kron_dot(x, *self.factors())

    def fold_output(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return w + jnp.kron(*self.factors()), bias


def kron_dot(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """x [..., m n] times w1 [m, l] (x) w2 [n, k] -> [..., l k]; w2 first, whose product needs no transposition."""
    (m, _), (n, k) = w1.shape, w2.shape
    parts = (x.reshape(-1, n) @ w2.astype(x.dtype)).reshape(-1, m, k)
    return jnp.einsum("tmk,ml->tlk", parts, w1.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def split(width: int, factor: int = -1) -> tuple[int, int]:
    """width = small * large near the square root, or = factor * the rest. FlagError where the factor doesn't divide."""
    if factor != -1:
        divides("factor", factor, width)
        return factor, width // factor
    small = next(d for d in range(math.isqrt(width), 0, -1) if width % d == 0)
    return small, width // small


def lokr(
    rank: int = 8, alpha: float = 8.0, factor: int = -1, both: bool = False, targets: str = "attn/(q|v)"
) -> Method:
    """LoKr on chosen projections.

    Args:
        rank: r of the low-rank factors.
        alpha: the update is scaled by alpha / rank.
        factor: sides of W1, which divide both sides of a kernel; -1 splits each near its square root.
        both: whether W1 may be low-rank too.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range, a factor that does not divide, and a pattern without a match.
    """
    at_least("rank", rank, 1)
    check_alpha(alpha)

    def node(site: Site, rng: jax.Array) -> Lokr:
        (m, n), (l, k) = (split(side, factor) for side in site.shape)  # noqa: E741
        keys = iter(jax.random.split(rng, 4))

        def pair(rows: int, columns: int, low: bool, start_zero: bool) -> tuple:
            draw = lambda limit, shape: leaf(site, next(keys), uniform(limit), shape)  # noqa: E731
            first = lambda limit, shape: leaf(site, rng, zeros, shape) if start_zero else draw(limit, shape)  # noqa: E731
            if not low:
                return first(rows**-0.5, (rows, columns)), None, None
            # The zeros go where HF has them: to its (columns, r) matrix.
            return None, draw(rows**-0.5, (rows, rank)), first(rank**-0.5, (rank, columns))

        w1 = pair(m, l, both and rank < max(m, l) / 2, True)
        w2 = pair(n, k, rank < max(n, k) / 2, False)
        return Lokr(*w1, *w2, leaf(site, rng, constant(alpha / rank), ()))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "lokr", rng, node)

    return Method(init)
