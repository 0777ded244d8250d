"""What needs frozen features or the depth of a leaf alone: nearest neighbours, a ridge probe, layer-wise rates."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.peft import tree

PyTree = Any


def layer_decay(params: PyTree, decay: float, num_layers: int) -> PyTree:
    """Learning-rate factors decay^(L + 1 - depth): embeddings have depth 0, layer i has i + 1 and what follows the
    layers L + 1 (BEiT, arXiv 2106.08254, appendix). A scanned leaf [L, ...] gets factors [L, 1, ...].
    """

    def factor(path: str, leaf: Any) -> Any:
        if path.startswith("layers/"):
            powers = decay ** np.arange(num_layers, 0, -1.0)
            return jnp.asarray(powers.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.float32)
        layer = re.match(r"layers_(\d+)/", path)
        depth = int(layer[1]) + 1 if layer else 0 if path.startswith("embed/") else num_layers + 1
        return decay ** (num_layers + 1 - depth)

    return tree.map_with_path(factor, params)


def nearest(train: jax.Array, labels: jax.Array, test: jax.Array, classes: int, k: int = 20) -> jax.Array:
    """train [N, D], labels int [N], test [M, D] -> classes [M] by the votes of the k nearest by cosine, each with
    weight exp(cosine / 0.07) (arXiv 1805.01978).
    """
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    near, rows = jax.lax.top_k(unit(test) @ unit(train).T, min(k, train.shape[0]))
    votes = jax.nn.one_hot(labels[rows], classes) * jnp.exp((near - near[:, :1]) / 0.07)[..., None]
    return jnp.argmax(votes.sum(axis=1), axis=-1)


def ridge_probe(features: jax.Array, labels: jax.Array, classes: int, penalty: float = 1.0) -> dict[str, jax.Array]:
    """features [N, D], labels int [N] -> a head {kernel [D, C], bias [C]}: least squares on +-1 targets with an L2
    penalty on the kernel alone, in closed form.
    """
    targets = 2 * jax.nn.one_hot(labels, classes) - 1
    mean, centre = features.mean(axis=0), targets.mean(axis=0)
    x = features - mean
    kernel = jnp.linalg.solve(x.T @ x + penalty * jnp.eye(x.shape[1]), x.T @ (targets - centre))
    return {"kernel": kernel, "bias": centre - mean @ kernel}
