"""HRA: a chain of Householder reflections of a kernel's input (Yuan et al., arXiv 2405.17484, section 3).

    h = x H_r ... H_1 W,    H_i = I - 2 u_i u_i' / |u_i|^2

    after   peft {"q": {"hra": Hra(u[L, in, r])}}

Columns start in equal pairs of U(-1/sqrt(r/2), 1/sqrt(r/2)), so that the reflections cancel: a fresh HRA is the base to
rounding, not to the bit. A product of reflections is I - U T U' with one triangular T (the compact form of Bischof and
Van Loan), T^-1 = I/2 + the strict upper triangle of U'U: two thin products and one r x r solve, where HF PEFT loops
over r products of [in, in] matrices. x is reflected and not W: tokens * in * 2r products, and no gradient of W's size.

`orthogonal` is the paper's strict form, HF PEFT's `apply_GS`: the u_i are made orthonormal first, which leaves
I - 2 U U'. No start of it is the identity; it starts at independent columns. `penalty` is the paper's lambda.

HF's hra_u is u.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.linalg import solve_triangular

from research.errors import FlagError
from research.nn.sites import LinearNode, Site
from research.peft import tree
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    is_node,
    leaf,
    place,
    select,
    uniform,
)  # fmt: skip

CARD = Card(paper="2405.17484", kind="reparametrisation")


class Hra(LinearNode):
    """u [in, r]."""

    u: Any
    orthogonal: bool = struct.field(pytree_node=False, default=False)
    trained: ClassVar[tuple[str, ...]] = ("u",)

    def thin(self) -> tuple[jax.Array, jax.Array]:
        """a [in, r], b [r, in] so that x H_r ... H_1 = x - x a b."""
        if self.orthogonal:
            q, _ = jnp.linalg.qr(self.u)
            return q, 2 * q.T
        u = unit(self.u)
        inverse_t = jnp.triu(u.T @ u, 1) + jnp.eye(u.shape[1]) / 2
        return u, solve_triangular(inverse_t, u.T, trans="T")

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        a, b = (p.astype(x.dtype) for p in self.thin())
        return x - (x @ a) @ b

    def fold_input(self, w: jax.Array) -> jax.Array:
        a, b = self.thin()
        return w - a @ (b @ w)


def unit(u: jax.Array) -> jax.Array:
    """Columns of norm 1."""
    return u / jnp.linalg.norm(u, axis=-2, keepdims=True)


def hra(rank: int = 8, orthogonal: bool = False, penalty: float = 0.0, targets: str = "attn/(q|v)") -> Method:
    """Reflections of the input of chosen projections.

    Args:
        rank: r reflections, an even number unless they are orthogonal; at most the input's width.
        orthogonal: whether the reflections are made orthogonal to each other.
        penalty: lambda of lambda * sum |U'U - I|^2 over all kernels, for unit columns; not with `orthogonal`.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    at_least("penalty", penalty, 0)
    if rank % 2 and not orthogonal:
        raise FlagError(f"rank={rank} is odd, so that the reflections can't cancel at the start: try {rank + 1}.")
    if penalty and orthogonal:
        raise FlagError(f"penalty={penalty} has no effect on orthogonal reflections: leave it at 0.")

    def node(site: Site, rng: jax.Array) -> Hra:
        d_in, _ = site.shape
        if rank > d_in:
            raise FlagError(f"rank={rank} is above the width {d_in} of a kernel's input: at most {d_in}.")
        different = rank if orthogonal else rank // 2

        def draw(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            u = uniform(different**-0.5)(rng, (*shape[:-1], different))
            return jnp.repeat(u, rank // different, axis=-1)

        return Hra(leaf(site, rng, draw, (d_in, rank), (site.axes[0], None)), orthogonal)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "hra", rng, node)

    def likeness(variables: Variables, rng: jax.Array) -> jax.Array:
        nodes = [n for n in tree.paths(variables["peft"], is_leaf=is_node).values() if isinstance(n, Hra)]
        units = [unit(node.u) for node in nodes]
        return penalty * sum(jnp.sum((jnp.swapaxes(u, -1, -2) @ u - jnp.eye(rank)) ** 2) for u in units)

    return Method(init, penalty=likeness if penalty else None, identity=False)
