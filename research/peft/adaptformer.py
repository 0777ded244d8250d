"""AdaptFormer: a small bottleneck beside the feed-forward, scaled down (Chen et al., arXiv 2205.13535, section 3.2).

    x <- x + mlp(norm(x)) + s (relu(x W_down + b_down) W_up + b_up),    x: the stream, without the norm

    after   peft {"mlp_residual": {"adaptformer": Beside(adapter=Bottleneck(down[L, D, m], down_bias[L, m],
                                                                            up[L, m, D], up_bias[L, D]), scale[L])}}

Equation 4 reads the stream itself, as the authors' code does by default; `parallel` reads what the feed-forward reads.
W_down starts at U(-1/sqrt(D), 1/sqrt(D)) (Kaiming's uniform with a = sqrt 5), W_up and the biases at 0, so that a fresh
one is the base itself. The authors' dropout of 0.1 inside the bottleneck is not here.
"""

from collections.abc import Callable

import jax

from research.peft.method import Card, Method
from research.peft.parallel import Parallel, beside

CARD = Card(paper="2205.13535", kind="additive")


class Beside(Parallel):
    """adapter: a Bottleneck; scale []."""

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        return y + self.scale.astype(y.dtype) * self.adapter.change(stream)


def adaptformer(width: int = 64, scale: float = 0.1, activation: str = "relu", targets: str = "mlp_residual") -> Method:
    """A scaled bottleneck beside each feed-forward.

    Args:
        width: m.
        scale: s.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    return beside(Beside, "adaptformer", width, scale, 0.1, activation, targets)
