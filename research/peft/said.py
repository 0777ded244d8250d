"""Intrinsic SAID: one short vector moves all kernels through fixed random projections (Aghajanyan et al.,
arXiv 2012.13255, section 3).

    W_i + lambda_i P_i theta,    P_i = H G Pi H B / norm    (Fastfood: H Walsh-Hadamard, Pi a permutation, and the
                                                             diagonals G normal, B signs)

    in training  peft {"reparam": {"said": Theta(theta[d - m])}, "q": {"said": Said(scale[L], stream[L])}, ...}
    realised     the same, and shared {"q": {"said": Theta}, ...}

d counts theta and the m scales lambda, one a kernel, as the authors' code has them (the paper says one a layer). theta
starts at 0 and lambda at 1: a fresh SAID is the base itself. Kernels only; the paper moves every parameter.

P_i is made of blocks of n, the power of two from d - m on, with their own G and B: O(in * out * log n). The authors pad
theta to in * out instead, O(in * out * log(in * out)). Pi is one for all blocks of a kernel, since sorting random
numbers would be most of the cost. Rows have norm 1, then P is scaled so that columns have: |P theta| is about |theta|.
B, Pi and G follow from `seed`, the kernel and the layer: they are made where they are used, in the forward pass and
again in the backward one, one layer at a time, and neither they nor any update is ever stored.
"""

import math
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen import LogicallyPartitioned

from research.errors import FlagError
from research.nn.dot import Plus
from research.nn.sites import LinearNode, Node, Site
from research.peft import tree
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    constant,
    leaf,
    select,
)  # fmt: skip

CARD = Card("2012.13255", "reparametrisation", memory="no", inference="none", small="dim=40,targets=attn/(q|v)")


class Theta(Node):
    """theta [d - m], of all kernels."""

    theta: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ("theta",)


class Said(LinearNode):
    """scale [] trains; stream [] uint32 tells the kernel's random numbers from the others'."""

    scale: Any
    stream: Any
    theta: Any = None
    seed: int = struct.field(pytree_node=False, default=0)
    trained: ClassVar[tuple[str, ...]] = ("scale",)

    def bind(self, shared: Theta) -> "Said":
        return self.replace(theta=shared.theta)

    def weight(self, w: Any, rng: jax.Array | None) -> Plus:
        words = jnp.stack([jnp.uint32(self.seed), self.stream])
        update = jax.checkpoint(fastfood, static_argnums=2)(words, self.theta, math.prod(w.shape))
        return Plus(w, self.scale * update.reshape(w.shape))


def fastfood(words: jax.Array, theta: jax.Array, size: int) -> jax.Array:
    """P theta [size], with P by the two words of a key; theta is padded to a power of two."""
    n = 1 << (theta.shape[0] - 1).bit_length()
    shape = (-(-size // n), n)
    signs, permutation, normals = jax.random.split(jax.random.wrap_key_data(words, impl="threefry2x32"), 3)
    b = 1 - 2 * (jax.random.bits(signs, shape, jnp.uint8) & 1).astype(jnp.float32)
    g = jax.random.normal(normals, shape)
    x = hadamard(b * jnp.pad(theta, (0, n - theta.shape[0])))
    x = hadamard(g * x[:, jax.random.permutation(permutation, n)])
    x = x / jnp.sqrt(size * jnp.sum(g**2, axis=-1, keepdims=True))  # rows sqrt(n |g|^2), columns sqrt(size / n)
    return x.reshape(-1)[:size]


def hadamard(x: jax.Array) -> jax.Array:
    """x [..., n] times the Walsh-Hadamard matrix of ones and minus ones, n a power of two."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        x = x.reshape(*shape[:-1], -1, 2, half)
        a, b = x[..., 0, :], x[..., 1, :]
        x, half = jnp.stack([a + b, a - b], axis=-2), 2 * half
    return x.reshape(shape)


def said(dim: int = 1000, seed: int = 0, targets: str = "all") -> Method:
    """One vector for all chosen projections.

    Args:
        dim: d, all that trains; above the number of kernels.
        seed: of the projections, below 2^32.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    if not 0 <= seed < 2**32:
        raise FlagError(f"seed={seed} is out of range: valid are 0 to {2**32 - 1}.")

    def node(path: str, site: Site, rng: jax.Array) -> Said:
        words = np.array([zlib.crc32(name.encode()) for name in tree.layer_paths(path, site.stack)], np.uint32)
        stream = lambda rng, shape: jnp.asarray(words.reshape(shape))  # noqa: E731
        return Said(leaf(site, rng, constant(1.0), ()), leaf(site, rng, stream, ()), seed=seed)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        chosen = select(sites, "linear", targets)
        kernels = sum(len(tree.layer_paths(path, site.stack)) for path, site in chosen.items())
        at_least("dim", dim, kernels + 1)
        theta = Theta(LogicallyPartitioned(jnp.zeros(dim - kernels), (None,)))
        nodes = {f"{path}/said": node(path, site, rng) for path, site in chosen.items()}
        return tree.unflatten(nodes | {f"{REPARAM}/said": theta})

    def realise(variables: Variables, sites: Sites) -> Variables:
        theta = variables["peft"].get(REPARAM, {}).get("said")
        if theta is None:
            return variables
        chosen = select(sites, "linear", targets)
        return variables | {"shared": tree.unflatten({f"{path}/said": theta for path in chosen})}

    return Method(init, realise=realise)
