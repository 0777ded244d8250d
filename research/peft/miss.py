"""MiSS: all shards of a kernel's rows get the same update (Kang and Yin, arXiv 2409.15371, formerly Bone, section 3).

    miss   W + [M; M; ...],  M [r, out]: h = x W + (sum of x's pieces of r) M
    mini   the same, where M itself repeats a matrix [r, c] along its columns
    bat    each block [r, r] of W, at block column j:  W_ij + M_j W_ij + M_j,  M [out/r, r, r]

    after   peft {"q": {"miss": Miss(m[L, r, out])}}

M starts at 0: a fresh MiSS is the base itself. In "miss" and "mini" the update is exactly low-rank, with a matrix of
zeros and ones that sends row i to i mod r; the last piece may be short. "bat" makes the kernel dense.

HF's miss_block is m; in "bat", (out/r, r, r), each block is m_j'.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import FlagError, did_you_mean
from research.nn.dot import Plus, low_rank
from research.nn.param import dense
from research.nn.sites import LinearNode, Site
from research.peft.method import Card, Method, PyTree, Sites, at_least, divides, leaf, place, select, zeros

CARD = Card(paper="2409.15371", kind="reparametrisation", small="rank=6")
FORMS = ("miss", "mini", "bat")


class Miss(LinearNode):
    """m [r, out], or [r, c] repeated; `shape` is the kernel's."""

    m: Any
    shape: tuple[int, int] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    trained: ClassVar[tuple[str, ...]] = ("m",)

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        (d_in, d_out), (r, columns) = self.shape, self.m.shape
        pieces = (jnp.arange(d_in)[:, None] % r == jnp.arange(r)).astype(jnp.float32)
        return low_rank(w, pieces, jnp.tile(self.m, (1, d_out // columns)), self.dropout, rng)


class Bat(LinearNode):
    """m [out/r, r, r]."""

    m: Any
    trained: ClassVar[tuple[str, ...]] = ("m",)

    def weight(self, w: Any, rng: jax.Array | None) -> Plus:
        r = self.m.shape[-1]
        blocks = dense(w, jnp.float32).reshape(-1, r, w.shape[1] // r, r)
        update = jnp.einsum("jab,ibjc->iajc", self.m, blocks) + jnp.swapaxes(self.m, 0, 1)
        return Plus(w, update.reshape(w.shape))


def miss(
    rank: int = 64, form: str = "miss", columns: int = 1, dropout: float = 0.0, targets: str = "attn/(q|v)"
) -> Method:
    """MiSS on chosen projections.

    Args:
        rank: r, at most the input's width; "bat" needs a divisor of both sides of a kernel.
        form: miss, mini or bat.
        columns: c of "mini", a divisor of the output's width.
        dropout: rate on the update's input, in training; not for "bat".
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range, sizes that do not divide, and a pattern without a match.
    """
    at_least("rank", rank, 1)
    if form not in FORMS:
        raise FlagError(f"unknown form {form!r}.{did_you_mean(form, FORMS)}")
    if not 0 <= dropout < 1:
        raise FlagError(f"dropout={dropout} is out of range: valid are 0 <= dropout < 1.")
    if columns != 1 and form != "mini":
        raise FlagError(f"columns={columns} has no effect with form={form}: leave it, or choose form=mini.")
    if dropout and form == "bat":
        raise FlagError(f"dropout={dropout} has no place in form=bat, whose update is not apart from W: leave it at 0.")

    def node(site: Site, rng: jax.Array) -> Miss | Bat:
        d_in, d_out = site.shape
        if rank > d_in:
            raise FlagError(f"rank={rank} is above the width {d_in} of a kernel's input: at most {d_in}.")
        if form == "bat":
            for side in site.shape:
                divides("rank", rank, side)
            return Bat(leaf(site, rng, zeros, (d_out // rank, rank, rank)))
        if form == "mini":
            divides("columns", columns, d_out)
        axes = (None, site.axes[1] if form == "miss" else None)
        return Miss(leaf(site, rng, zeros, (rank, d_out if form == "miss" else columns), axes), site.shape, dropout)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "miss", rng, node)

    return Method(init)
