"""Attention rollout (arXiv 2005.00928): how much of what the head reads comes from each patch.

    R = prod_l (A_l + I) / 2,    A_l the layer's attention, its heads' mean

The map is the class token's row of R, or the mean of all rows in a model without one; over the patches it sums to 1.
Virtual tokens get no place on it: shares are those among the image's own tokens, and a method's prompts are left out.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from research.models.stack import unstack
from research.models.vit import Vit


def rollout(model: Vit, variables: dict, images: jax.Array) -> jax.Array:
    """images float [B, H, W, C] as the model sees them -> float32 [B, N, N], N patches a side.

    variables: params, and what a method has added, realised. Layers may be scanned or not.
    """
    c = replace(model.config, scan=False, remat="none")  # a scan would not give its layers' own activations
    flat = {name: unstack(variables[name]) for name in ("params", "peft", "shared") if name in variables}
    kept = lambda module, method: module.name in ("q", "k") and method == "__call__"  # noqa: E731
    _, state = Vit(c).apply(flat, images, capture_intermediates=kept, mutable=["intermediates"])
    through: jax.Array | None = None
    for i in range(c.num_layers):
        layer = state["intermediates"][f"layers_{i}"]["attn"]
        # The first call is on the layer's own tokens; prompts of a method come by a second one.
        q, k = (layer[x]["__call__"][0] for x in "qk")
        q, k = (x.reshape(*x.shape[:2], c.num_heads, -1).astype(jnp.float32) for x in (q, k))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        mean = jnp.mean(jax.nn.softmax(scores, axis=-1), axis=1)
        step = (mean + jnp.eye(mean.shape[-1])) / 2
        through = step if through is None else step @ through
    own = through[:, -c.patches :] if c.pooling != "token" else through[:, -c.patches - 1 : -c.patches]
    shares = jnp.mean(own, axis=1)[:, -c.patches :]
    return (shares / jnp.sum(shares, axis=-1, keepdims=True)).reshape(-1, c.grid, c.grid)
