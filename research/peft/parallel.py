"""Parallel adapters: a bottleneck beside the feed-forward, not behind it (He et al., arXiv 2110.04366, sections 3.3
and 4.2-4.5).

    y <- y + s (relu(x W_down + b_down) W_up + b_up),    x: what the feed-forward itself reads

    after   peft {"mlp_residual": {"parallel": Parallel(adapter=Bottleneck(down[L, D, m], down_bias[L, m],
                                                                           up[L, m, D], up_bias[L, D]), scale[L])}}

s = 4 is the paper's scaled parallel adapter, s = 1 its plain one; a learnt s starts at the same value. W_down starts as
LoRA's A does, U(-1/sqrt(D), 1/sqrt(D)), and W_up at 0 (the authors' `lora` initialisation), so that a fresh one is the
base itself. The paper's tables have m = 512 and 102; the width here is that of the other bottlenecks, so that they
compare at the same cost.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax

from research.errors import FlagError
from research.nn.sites import ResidualNode, Site
from research.peft.houlsby import bottleneck
from research.peft.method import Card, Method, PyTree, Sites, constant, leaf, place, select, uniform, zeros

CARD = Card(paper="2110.04366", kind="additive", memory="yes", inference="extra FFN")


class Parallel(ResidualNode):
    """adapter: a Bottleneck; scale []."""

    adapter: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("adapter",)

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        return y + self.scale.astype(y.dtype) * self.adapter.change(x)


class LearntParallel(Parallel):
    """The same, where the scale trains too."""

    trained: ClassVar[tuple[str, ...]] = ("adapter", "scale")


def parallel(
    width: int = 64,
    scale: float = 4.0,
    learn_scale: bool = False,
    activation: str = "relu",
    targets: str = "mlp_residual",
) -> Method:
    """A bottleneck beside each feed-forward.

    Args:
        width: m.
        scale: s.
        learn_scale: whether s trains, one for each layer.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites; "(attn|mlp)_residual" has one beside the attention too.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    kind = LearntParallel if learn_scale else Parallel
    return beside(kind, "parallel", width, scale, 4.0, activation, targets)


def beside(
    kind: type[Parallel], name: str, width: int, scale: float, usual: float, activation: str, targets: str
) -> Method:
    """Nodes of a `kind` at residual sites; `usual` is the scale that the error for 0 suggests."""
    if scale == 0:
        raise FlagError(f"scale=0.0 would switch the adapter off: choose another value, such as {usual:g}.")
    kaiming = lambda rng, shape: uniform(shape[-2] ** -0.5)(rng, shape)  # noqa: E731
    inner = bottleneck(width, activation, False, kaiming, zeros)

    def node(site: Site, rng: jax.Array) -> Parallel:
        return kind(inner(site, rng), leaf(site, rng, constant(scale), ()))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), name, rng, node)

    return Method(init)
