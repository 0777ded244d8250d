"""DoRA: LoRA on a kernel's directions beside a trained magnitude (Liu et al., arXiv 2402.09353, sections 4.1 and 4.3).

    W' = m (W + s A B) / ||W + s A B||,    s = alpha / r, norms [out] over the inputs, m = ||W|| at the start
    ||V + AB||^2 = sum V^2 + 2 sum (V'A)' * B + sum B * (A'A B), summed over the rows

    after   peft {"q": {"dora": Dora(a[L, in, r], b[L, r, out], m[L, out], scale[L])}}

As section 4.3 has it, the norm is a constant to the gradient; the second line finds it without forming A B. A and B
start as LoRA's; `fit` measures m, so that a fresh one is the base up to rounding. W is what the nodes before it in a
chain made of the kernel, though a LoRA with dropout there is no kernel in training.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.nn.dot import Dropped, Scaled, low_rank
from research.nn.param import dense
from research.nn.sites import LinearNode, Site
from research.peft.lora import from_kernels, loras
from research.peft.method import Card, Method, Variables, constant, leaf

CARD = Card(paper="2402.09353", kind="reparametrisation")


class Dora(LinearNode):
    """a [in, r], b [r, out] and the magnitudes m [out] train; scale [] is alpha / r."""

    a: Any
    b: Any
    m: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b", "m")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        if isinstance(w, Dropped):
            raise FlagError(
                "dora can't follow a node with dropout at one site: use dropout=0 there, or put dora first."
            )
        a = self.a * self.scale
        norm = jax.lax.stop_gradient(norms(dense(w, jnp.float32), a, self.b))
        return Scaled(low_rank(w, a, self.b), self.m / norm)


def norms(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The norms [out] of the columns of w + a b; at least a tiny number, since a column of zeros stays one."""
    square = jnp.sum(w * w, axis=0) + jnp.sum((2 * (w.T @ a).T + (a.T @ a) @ b) * b, axis=0)
    return jnp.sqrt(jnp.maximum(square, 1e-30))


def dora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "attn/(q|v)",
    rank_pattern: str = "",
    alpha_pattern: str = "",
) -> Method:
    """LoRA on directions, and magnitudes.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        rank_pattern: other ranks for some of the sites, as in mlp/up:16|attn/(q|v):4; the first match counts.
        alpha_pattern: other alphas, likewise.
    Raises FlagError for a value out of range and a pattern without a match.
    """

    def node(site: Site, a: Any, b: Any, scale: Any) -> Dora:
        return Dora(a, b, leaf(site, None, constant(1.0), site.shape[1:], site.axes[1:]), scale)

    init = loras("dora", rank, alpha, targets, 0.0, rank_pattern, alpha_pattern, make=node)

    def start(node: Dora, w: jax.Array) -> Dora:
        return node.replace(m=norms(w, node.a * node.scale, node.b))

    def fit(rng: jax.Array, variables: Variables, loss: Any, batches: Any) -> Variables:
        return from_kernels(variables, start)

    return Method(init, fit=fit, identity=False)
