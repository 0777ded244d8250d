"""Products with a kernel that is an array, a quantised node, or a deferred low-rank sum.

`LowRank(w, a, b)` stands for W + A B. Multiplying by it is written out by hand because autodiff would either form the
dense gradient of the frozen W or multiply twice: dA = x' (dy B') and dB = (x A)' dy need only thin products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero

from research.nn.param import dense, dropout


class Deferred:
    """Stands for a kernel made of another, `w`, of the same shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape


@struct.dataclass
class LowRank(Deferred):
    """The deferred kernel W + A B: w [in, out] or quantised, a [in, r], b [r, out]; any scale is inside `a`."""

    w: Any
    a: jax.Array
    b: jax.Array

    def plus(self, a: jax.Array, b: jax.Array) -> "LowRank":
        """Adds another pair by concatenation along the rank."""
        return LowRank(self.w, jnp.concatenate([self.a, a], axis=-1), jnp.concatenate([self.b, b], axis=-2))

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """W + A B as one array [in, out]."""
        return dense(self.w, dtype) + (self.a @ self.b).astype(dtype)


@struct.dataclass
class Scaled(Deferred):
    """The deferred kernel w, itself an array, quantised or deferred, with its columns multiplied by c [out]."""

    w: Any
    c: jax.Array

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """One array [in, out]."""
        return dense(self.w, dtype) * self.c.astype(dtype)


@struct.dataclass
class Plus(Deferred):
    """The deferred kernel w + d with a dense d [in, out] in fp32, which half precision must not round away beside w."""

    w: Any
    d: jax.Array

    def dequantise(self, dtype: jnp.dtype) -> jax.Array:
        """One array [in, out]."""
        return (dense(self.w, jnp.float32) + self.d).astype(dtype)


@struct.dataclass
class Dropped(Deferred):
    """The deferred W + A B whose second product sees its input through dropout, which no one kernel can do."""

    w: Any
    a: jax.Array
    b: jax.Array
    rng: jax.Array
    rate: float = struct.field(pytree_node=False)


def low_rank(w: Any, a: jax.Array, b: jax.Array, rate: float = 0.0, rng: jax.Array | None = None) -> LowRank | Dropped:
    """Defers w + a b, with dropout before a where there is an rng; `w` may itself be deferred."""
    if isinstance(w, Scaled):  # b / c would keep the products thin, but c may be 0
        w = dense(w, jnp.float32)
    if rng is not None and rate > 0:
        return Dropped(w, a, b, rng, rate)
    if isinstance(w, Dropped):
        return w.replace(w=low_rank(w.w, a, b))
    return w.plus(a, b) if isinstance(w, LowRank) else LowRank(w, a, b)


def dot(x: jax.Array, w: Any) -> jax.Array:
    """x [N, in] times w [in, out] (array, quantised node or deferred) -> [N, out] in x's dtype."""
    if isinstance(w, Scaled):
        return dot(x, w.w) * w.c.astype(x.dtype)
    if isinstance(w, Plus):
        apart = x.dtype.itemsize < 4 or isinstance(w.w, Dropped)
        return dot(x, w.w) + x @ w.d.astype(x.dtype) if apart else x @ dense(w, x.dtype)
    if isinstance(w, Dropped):
        return dot(x, w.w) + (dropout(x, w.rate, w.rng) @ w.a.astype(x.dtype)) @ w.b.astype(x.dtype)
    if isinstance(w, LowRank):
        return _low_rank_dot(x, w.w, w.a.astype(x.dtype), w.b.astype(x.dtype))
    return x @ dense(w, x.dtype)


def _folds(tokens: int, w: jax.Array) -> bool:
    """Folding W + AB costs one pass over W; it pays where many tokens share it, not in decoding.

    In half precision the sum would round most of a small AB away, so there the products stay apart.
    """
    return w.dtype.itemsize >= 4 and tokens * (w.shape[0] + w.shape[1]) >= w.shape[0] * w.shape[1]


def _forward(x: jax.Array, w: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    w = dense(w, x.dtype)
    return x @ (w + a @ b) if _folds(x.shape[0], w) else x @ w + (x @ a) @ b


@jax.custom_vjp
def _low_rank_dot(x: jax.Array, w: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return _forward(x, w, a, b)


def _low_rank_fwd(x: Any, w: Any, a: Any, b: Any) -> tuple[jax.Array, tuple]:
    # With symbolic zeros every leaf says whether it is differentiated: the frozen kernel is not, a trained one is.
    perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(w, is_leaf=is_primal))
    x, w, a, b = (jax.tree.map(lambda p: p.value, t, is_leaf=is_primal) for t in (x, w, a, b))
    return _forward(x, w, a, b), (x, w, a, b, () if perturbed else None)


def _low_rank_bwd(residuals: tuple, dy: Any) -> tuple:
    x, w, a, b, perturbed = residuals
    dy = jax.lax.optimization_barrier(cotangent(dy))
    kernel = dense(w, x.dtype)
    dy_b = dy @ b.T
    dx = dy @ (kernel + a @ b).T if _folds(x.shape[0], kernel) else dy @ kernel.T + dy_b @ a.T
    dw = None if perturbed is None else (x.T @ dy).astype(w.dtype)
    return dx, dw, x.T @ dy_b, (x @ a).T @ dy


def is_primal(leaf: Any) -> bool:
    """Whether a leaf is an argument of a forward rule with symbolic zeros, which says if it is differentiated."""
    return hasattr(leaf, "perturbed")


def cotangent(dy: Any) -> jax.Array:
    """What a backward rule with symbolic zeros is given, as an array."""
    return jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy


_low_rank_dot.defvjp(_low_rank_fwd, _low_rank_bwd, symbolic_zeros=True)
