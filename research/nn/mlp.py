"""The feed-forward sublayers, plain and gated."""

from collections.abc import Callable

import flax.linen as nn
import jax

from research.nn.linear import Linear
from research.nn.param import dropout, training_rng

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """down(dropout(activation(up(x))))."""

    hidden: int
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_std: float = 0.02
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        t = {"dtype": self.dtype, "param_dtype": self.param_dtype, "init_std": self.init_std, "use_bias": self.use_bias}
        h = ACTIVATIONS[self.activation](Linear(self.hidden, ("embed", "mlp"), name="up", **t)(x))
        return Linear(x.shape[-1], ("mlp", "embed"), name="down", **t)(dropout(h, self.dropout, training_rng(self)))


class GatedMlp(nn.Module):
    """down(dropout(activation(gate(x)) * up(x))) (arXiv 2002.05202), without biases."""

    hidden: int
    activation: str = "silu"
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        t = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Linear(self.hidden, ("embed", "mlp"), name="gate", **t)(x)
        up = Linear(self.hidden, ("embed", "mlp"), name="up", **t)(x)
        h = dropout(ACTIVATIONS[self.activation](gate) * up, self.dropout, training_rng(self))
        return Linear(x.shape[-1], ("mlp", "embed"), name="down", **t)(h)
