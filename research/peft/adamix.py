"""AdaMix: a mixture of adapters, one drawn at random in each pass, all averaged afterwards (Wang et al., arXiv
2205.12410, section 3).

    in training    y <- y + gelu(y W_down^i + b_down^i) W_up^j + b_up^j,    i, j ~ U{1..M} for each layer and pass
    in evaluation  the same with the means over i and over j in place of the matrices (section 3.3)
    loss           (CE(z) + CE(z')) / 2 + c (KL(p' | p) + KL(p | p')) / 2 for two passes' logits z and z' (section 3.2)

    after   peft {"mlp_residual": {"adamix": Mixture(down[L, M, D, m], down_bias[L, M, m], up[L, 1, m, D],
                                                     up_bias[L, 1, D])}}

M = 4, m = 16 after the feed-forward, the way up shared by all experts (section 3.4), and targets p and p' that take no
gradient, as in the authors' code for GLUE. Its cross-entropy is of the first pass alone; the mean of both has the same
expectation. Weights start at N(0, 0.02^2), BERT's own, biases at 0. All experts are stored, and averaged when used.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import FlagError
from research.nn.sites import ResidualNode, Site
from research.peft.houlsby import ACTIVATIONS, known
from research.peft.method import Card, Method, PyTree, Sites, at_least, leaf, normal, place, select, zeros

CARD = Card(paper="2205.12410", kind="additive", memory="no", inference="extra FFN", random=True)


class Mixture(ResidualNode):
    """down [M, D, m], down_bias [M, m], up [M, m, D], up_bias [M, D], with M = 1 for the half that is shared."""

    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    activation: str = struct.field(pytree_node=False, default="gelu")
    trained: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        keys = (None, None) if rng is None else jax.random.split(rng)
        down, down_bias = expert(keys[0], self.down, self.down_bias)
        up, up_bias = expert(keys[1], self.up, self.up_bias)
        down, down_bias, up, up_bias = (p.astype(y.dtype) for p in (down, down_bias, up, up_bias))
        return y + ACTIVATIONS[self.activation](y @ down + down_bias) @ up + up_bias


def expert(rng: jax.Array | None, *stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays of a random expert, the same for all of them; without an rng their means."""
    if rng is None:
        return tuple(jnp.mean(x, axis=0) for x in stacked)
    chosen = jax.random.randint(rng, (), 0, stacked[0].shape[0])
    return tuple(x[chosen] for x in stacked)


def disagreement(one: jax.Array, two: jax.Array) -> jax.Array:
    """(KL(p2 | p1) + KL(p1 | p2)) / 2 for logits [..., C] -> [...]; what stands first in a KL takes no gradient."""
    p, q = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (one, two))
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)  # noqa: E731
    fixed = jax.lax.stop_gradient
    return (kl(fixed(q), p) + kl(fixed(p), q)) / 2


def consistent(loss: Callable, strength: float) -> Callable:
    """The loss of two passes, and of how far they disagree; in evaluation the loss as it is.

    Raises ValueError where the task does not say which logits it is computed from.
    """

    def both(variables: PyTree, batch: PyTree, rng: jax.Array | None) -> Any:
        if rng is None:
            return loss(variables, batch, None)
        one, two = (loss(variables, batch, key) for key in jax.random.split(rng))
        if one.outputs is None:
            raise ValueError("adamix compares the logits of two passes: this task's Loss has no `outputs`")
        (z, weight), (other, _) = one.outputs, two.outputs
        apart = jnp.sum(disagreement(z, other) * weight)
        total, metrics = jax.tree.map(lambda a, b: (a + b) / 2, (one.sum, one.metrics), (two.sum, two.metrics))
        metrics |= {"disagreement": (apart, jnp.sum(weight))}
        return one._replace(sum=total + strength * apart, metrics=metrics)

    return both


def adamix(
    experts: int = 4,
    width: int = 16,
    activation: str = "gelu",
    targets: str = "mlp_residual",
    share_down: bool = False,
    share_up: bool = True,
    consistency: float = 1.0,
    std: float = 0.02,
) -> Method:
    """A mixture of bottlenecks after each feed-forward.

    Args:
        experts: M.
        width: m.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        share_down, share_up: whether the experts have one projection down, or up, in common.
        consistency: c; at 0 there is one pass, as for any other method.
        std: of the initial weights.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("experts", experts, 2)
    at_least("width", width, 1)
    at_least("consistency", consistency, 0)
    known(activation)
    if share_down and share_up:
        raise FlagError("share_down=true with share_up=true leaves nothing to mix: set one of them to false.")

    def node(site: Site, rng: jax.Array) -> Mixture:
        (d,), (down, up) = site.shape, jax.random.split(rng)
        downs, ups = (1 if shared else experts for shared in (share_down, share_up))
        return Mixture(
            leaf(site, down, normal(std), (downs, d, width), (None, *site.axes, None)),
            leaf(site, down, zeros, (downs, width)),
            leaf(site, up, normal(std), (ups, width, d), (None, None, *site.axes)),
            leaf(site, up, zeros, (ups, d), (None, *site.axes)),
            activation,
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "adamix", rng, node)

    task = (lambda loss: consistent(loss, consistency)) if consistency > 0 else None
    return Method(init, task=task, identity=False)
