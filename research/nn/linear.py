"""The one projection of the project, and the site `linear`."""

import flax.linen as nn
import jax

from research.nn.dot import dot
from research.nn.param import Axes, get_param, training_rng
from research.nn.sites import nodes, record


class Linear(nn.Module):
    """y = x W + b with a 2-D kernel [in, out]; heads are split outside.

    Tokens are flattened to [N, in] first: two-dimensional products are the fast ones.
    """

    features: int
    axes: Axes
    use_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        d_in = x.shape[-1]
        record(self, "linear", (d_in, self.features), self.axes)
        w = get_param(
            self, "kernel", nn.initializers.normal(self.init_std), (d_in, self.features), self.axes, self.param_dtype
        )
        lead, x = x.shape[:-1], x.reshape(-1, d_in).astype(self.dtype)
        here = [(node, training_rng(self)) for node in nodes(self)]
        for node, rng in here:
            x = node.input(x, rng)
        for node, rng in here:
            w = node.weight(w, rng)
        y = dot(x, w)
        if self.use_bias:
            bias = get_param(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:], self.param_dtype)
            y = y + bias.astype(y.dtype)
        for node, rng in here:
            y = node.output(x, y, rng)
        return y.reshape(*lead, self.features)
