"""A stack of equal blocks, scanned or unrolled, with rematerialisation by name.

Scanned, one body is compiled and every leaf has a leading axis L; unrolled, each layer has its own subtree.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def apply_layers(layers, config, x: jax.Array, *broadcast: jax.Array, collect: bool = False) -> tuple:
    """Runs the blocks `layer(x, *broadcast) -> x`: one module where config.scan, else a list of config.num_layers.

    Returns (x [B, T, D], every block's output [L, B, T, D] or None where not collected).
    """

    def body(layer: nn.Module, x: jax.Array, *broadcast: jax.Array) -> tuple:
        x = layer(x, *broadcast)
        return x, (x if collect else None)

    if config.remat != "none":
        body = nn.remat(body, policy=REMAT[config.remat], prevent_cse=not config.scan)
    if config.scan:
        body = nn.scan(
            body,
            variable_axes={"params": 0, "peft": 0, "sites": 0, "cache": 0, "kept": 0},
            variable_broadcast="shared",
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return body(layers, x, *broadcast)
    outputs = []
    for layer in layers:
        x, y = body(layer, x, *broadcast)
        outputs.append(y)
    return x, (jnp.stack(outputs) if collect else None)
