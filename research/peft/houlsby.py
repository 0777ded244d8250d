"""Houlsby adapters: a bottleneck after each sublayer (Houlsby et al., arXiv 1902.00751, section 2.1).

    y <- y + gelu(y W_down + b_down) W_up + b_up,   then the residual addition and the layer norm

    after   peft {"attn_residual": {"houlsby": Bottleneck(down[L, D, m], down_bias[L, m], up[L, m, D], up_bias[L, D])},
                  "mlp_residual": ...}

Both sublayers of every layer; all layer norms train too, as in the paper. Weights start at a truncated normal of std
1e-3 (the authors' code; the paper says 1e-2) and biases at 0: near the identity, not on it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import struct

from research.errors import FlagError, did_you_mean
from research.nn.sites import ResidualNode, Site
from research.peft.layernorm import with_norms
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    at_least,
    leaf,
    place,
    select,
    zeros,
)  # fmt: skip

CARD = Card(paper="1902.00751", kind="additive", memory="yes", inference="extra FFN")
ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "swish": jax.nn.swish, "tanh": jax.nn.tanh}
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Bottleneck(ResidualNode):
    """down [D, m], down_bias [m], up [m, D], up_bias [D].

    `after_norm`: what it reads is the layer norm of stream + y (Pfeiffer).
    """

    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    activation: str = struct.field(pytree_node=False, default="gelu")
    after_norm: bool = struct.field(pytree_node=False, default=False)
    trained: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        return y + self.change(self.reads(stream, y, norm))

    def reads(self, stream: jax.Array, y: jax.Array, norm: Callable) -> jax.Array:
        """What the bottleneck reads after a sublayer."""
        return norm(stream + y) if self.after_norm else y

    def change(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> what is added, [..., D]."""
        down, down_bias, up, up_bias = (p.astype(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return ACTIVATIONS[self.activation](h @ down + down_bias) @ up + up_bias


def bottleneck(
    width: int, activation: str, after_norm: bool, draw: Draw, draw_up: Draw | None = None
) -> Callable[[Site, jax.Array], Bottleneck]:
    """Makes the node of a site: weights by `draw` (those of the way up by `draw_up` where given), biases 0."""
    at_least("width", width, 1)
    known(activation)

    def node(site: Site, rng: jax.Array) -> Bottleneck:
        (d,) = site.shape
        down, up = jax.random.split(rng)
        return Bottleneck(
            leaf(site, down, draw, (d, width), (*site.axes, None)),
            leaf(site, down, zeros, (width,)),
            leaf(site, up, draw_up or draw, (width, d), (None, *site.axes)),
            leaf(site, up, zeros, (d,), site.axes),
            activation,
            after_norm,
        )

    return node


def known(activation: str) -> None:
    """FlagError where there is no such activation."""
    if activation not in ACTIVATIONS:
        raise FlagError(f"unknown activation {activation!r}.{did_you_mean(activation, ACTIVATIONS)}")


def truncated_normal(std: float) -> Draw:
    """Draws N(0, std^2) cut at two standard deviations."""
    return lambda rng, shape: std * jax.random.truncated_normal(rng, -2.0, 2.0, shape)


def houlsby(
    width: int = 64,
    activation: str = "gelu",
    targets: str = "(attn|mlp)_residual",
    norms: bool = True,
    std: float = 1e-3,
) -> Method:
    """A bottleneck after each sublayer.

    Args:
        width: m.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        norms: whether the layer norms train too, as the paper has it.
        std: of the initial weights.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    node = bottleneck(width, activation, False, truncated_normal(std))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "houlsby", rng, node)

    return Method(init, trainable=with_norms(norms), identity=False)
