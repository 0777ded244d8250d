"""BOFT: a rotation of a kernel's input that is a product of sparse butterfly factors (Liu et al., arXiv 2311.06243,
sections 3 and 4).

    h = x R W diag(s),    R = B_m ... B_1,    B_i = P_i diag(R_i1, R_i2, ...) P_i',    R_ij = (I - S) (I + S)^-1

    after   peft {"q": {"boft": Boft(r[L, m, in/b, b, b], scale[L, out])}}

S is the skew part (r - r')/2 of each block. Factor i mixes pairs of half blocks that lie 2^(i-1) half blocks apart: P_i
shuffles them side by side, here as one more axis of an einsum, so that no [in, in] permutation matrix exists, which is
what makes HF PEFT's slow. r starts at 0 and scale at 1: a fresh BOFT is the base itself. The scale of the outputs, not
in the paper's equations, is its code's and HF PEFT's; all entries of r are counted as trained, as there, though only
the skew part acts.

x is rotated and not W, for the reasons given for OFT: tokens * in * b * m products. The scale leaves the bias alone, so
it goes to the kernel.

HF's boft_R is r, its boft_s (out, 1) is scale.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.nn.dot import Scaled
from research.nn.inverse import inverse
from research.nn.sites import LinearNode, Site
from research.peft.method import Card, Method, PyTree, Sites, at_least, constant, divides, leaf, place, select, zeros

CARD = Card(paper="2311.06243", kind="reparametrisation")


class Boft(LinearNode):
    """r [m, in/b, b, b], scale [out]."""

    r: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("r", "scale")

    def turn(self, i: int) -> jax.Array:
        """B_i - I, [segments, 2^i, q, h, q, h]: a block takes q half blocks of h rows, 2^i half blocks apart."""
        skew = (self.r[i] - jnp.swapaxes(self.r[i], -1, -2)) / 2
        b = skew.shape[-1]
        turn = -2 * inverse(jnp.eye(b) + skew) @ skew
        halves = (2, b // 2) if i else (1, b)
        return turn.reshape(-1, 2**i, *halves, *halves)

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        for i in reversed(range(self.r.shape[0])):
            turn = self.turn(i).astype(x.dtype)
            segments, apart, q, h = turn.shape[:4]
            parts = x.reshape(-1, segments, q, apart, h)
            x = x + jnp.einsum("nsqph,spqhQH->nsQpH", parts, turn).reshape(x.shape)
        return x

    def weight(self, w: Any, rng: jax.Array | None) -> Scaled:
        return Scaled(w, self.scale)

    def fold_input(self, w: jax.Array) -> jax.Array:
        for i in range(self.r.shape[0]):
            turn = self.turn(i)
            segments, apart, q, h = turn.shape[:4]
            parts = w.reshape(segments, q, apart, h, -1)
            w = w + jnp.einsum("spqhQH,sQpHo->sqpho", turn, parts).reshape(w.shape)
        return w


def boft(block_size: int = 4, factors: int = 1, targets: str = "attn/(q|v)") -> Method:
    """Butterfly rotations of the input of chosen projections, and scales of their outputs.

    Args:
        block_size: b; it divides the input's width, and is even where there are several factors.
        factors: m; b * 2^(m-1) divides the input's width.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range, sizes that do not divide, and a pattern without a match.
    """
    at_least("block_size", block_size, 2)
    at_least("factors", factors, 1)
    if factors > 1 and block_size % 2:
        raise FlagError(
            f"block_size={block_size} is odd, and {factors} factors exchange half blocks: try {block_size + 1}."
        )

    def node(site: Site, rng: jax.Array) -> Boft:
        d_in, d_out = site.shape
        divides("block_size", block_size, d_in)
        if d_in % (block_size * 2 ** (factors - 1)):
            most = next(m for m in range(factors, 0, -1) if d_in % (block_size * 2 ** (m - 1)) == 0)
            raise FlagError(
                f"factors={factors}: {block_size} * 2^{factors - 1} does not divide {d_in}: at most factors={most}."
            )
        return Boft(
            leaf(site, rng, zeros, (factors, d_in // block_size, block_size, block_size)),
            leaf(site, rng, constant(1.0), (d_out,), site.axes[1:]),
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "boft", rng, node)

    return Method(init)
