"""OFT: a block-diagonal rotation of a kernel's input (Qiu et al., arXiv 2306.07280, section 3; on the input's side, as
in OFT v2, arXiv 2506.19847).

    h = x R W,    R = diag(R_1, ..., R_k),    R_i = (I + Q_i) (I - Q_i)^-1,    Q_i = -Q_i'

    after   peft {"q": {"oft": Oft(q[L, in/b, b(b-1)/2])}}

q holds the upper triangles of the Q_i, row by row, and starts at 0: a fresh OFT is the base itself. The columns of W
keep their norms and their angles. `neumann` replaces the inverse by the first terms of its series, which no accelerator
need solve for: I + 2Q + ... + 2Q^(terms-2) + Q^(terms-1), orthogonal only for small Q. HF PEFT does so with 5 terms
where its default is not changed; the exact inverse is the default here. The cone constraint of COFT is left out.

x is rotated and not W: blocks cost tokens * in * b products, the gradient of a rotated W would be a full one of
tokens * in * out, and a quantised W need not be touched. R - I = 2Q (I - Q)^-1 is what is computed, so that in half
precision a small rotation is not rounded away beside 1.

HF's oft_R.weight is q. Without Neumann's series its R is (I - Q)(I + Q)^-1: q changes its sign.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.errors import FlagError
from research.nn.inverse import inverse
from research.nn.sites import LinearNode, Site
from research.peft.method import Card, Method, PyTree, Sites, at_least, divides, leaf, place, select, zeros

CARD = Card(paper="2306.07280", kind="reparametrisation")


class Oft(LinearNode):
    """q [in/b, b(b-1)/2], or [1, b(b-1)/2] where all blocks share one rotation."""

    q: Any
    block_size: int = struct.field(pytree_node=False)
    neumann: int = struct.field(pytree_node=False, default=0)
    trained: ClassVar[tuple[str, ...]] = ("q",)

    def turn(self, width: int) -> jax.Array:
        """R - I of every block, [in/b, b, b]."""
        b = self.block_size
        upper = jnp.zeros((self.q.shape[0], b, b)).at[:, *np.triu_indices(b, 1)].set(self.q)
        skew = upper - jnp.swapaxes(upper, -1, -2)
        if self.neumann:
            turn, power = 2 * skew, skew
            for degree in range(2, self.neumann):
                power = power @ skew
                turn += power if degree == self.neumann - 1 else 2 * power
        else:
            turn = 2 * inverse(jnp.eye(b) - skew) @ skew
        return jnp.broadcast_to(turn, (width // b, b, b))

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        blocks = x.reshape(x.shape[0], -1, self.block_size)
        return x + jnp.einsum("nkb,kbc->nkc", blocks, self.turn(x.shape[-1]).astype(x.dtype)).reshape(x.shape)

    def fold_input(self, w: jax.Array) -> jax.Array:
        blocks = w.reshape(-1, self.block_size, w.shape[-1])
        return w + jnp.einsum("kbc,kco->kbo", self.turn(w.shape[0]), blocks).reshape(w.shape)


def oft(block_size: int = 32, share: bool = False, neumann: int = 0, targets: str = "attn/(q|v)") -> Method:
    """Rotations of the input of chosen projections.

    Args:
        block_size: b; it divides the input's width.
        share: whether all blocks of a kernel have the same rotation.
        neumann: terms of the series for the inverse, from 4 on; 0 is the exact inverse.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range, a block size that does not divide, and a pattern without a match.
    """
    at_least("block_size", block_size, 2)
    if neumann and neumann < 4:
        raise FlagError(f"neumann={neumann} is out of range: valid are 0, the exact inverse, and 4 or more terms.")

    def node(site: Site, rng: jax.Array) -> Oft:
        divides("block_size", block_size, site.shape[0])
        blocks = 1 if share else site.shape[0] // block_size
        return Oft(leaf(site, rng, zeros, (blocks, block_size * (block_size - 1) // 2)), block_size, neumann)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "oft", rng, node)

    return Method(init)
