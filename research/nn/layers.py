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


def apply_layers(
    layers,
    config,
    x: jax.Array,
    *broadcast: jax.Array | None,
    collect: bool = False,
    depth: int | None = None,
    each: jax.Array | None = None,
) -> tuple:
    """Runs the blocks `layer(x, *broadcast) -> x`: one module where config.scan, else a list of them.

    depth: how many; None for config.num_layers. each [L, ...]: a layer's own argument, which comes after x.
    Returns (x [B, T, D], every block's output [L, B, T, D] or None where not collected).
    """

    def body(layer: nn.Module, x: jax.Array, own: jax.Array | None, *broadcast: jax.Array | None) -> tuple:
        x = layer(x, *(() if own is None else (own,)), *broadcast)
        return x, (x if collect else None)

    if config.remat != "none":
        body = nn.remat(body, policy=REMAT[config.remat], prevent_cse=not config.scan)
    if config.scan:
        body = nn.scan(
            body,
            variable_axes={"params": 0, "peft": 0, "sites": 0, "cache": 0, "kept": 0},
            variable_broadcast="shared",
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast if each is None else 0, *(nn.broadcast for _ in broadcast)),
            length=config.num_layers if depth is None else depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return body(layers, x, each, *broadcast)
    outputs = []
    for place, layer in enumerate(layers):
        x, y = body(layer, x, None if each is None else each[place], *broadcast)
        outputs.append(y)
    return x, (jnp.stack(outputs) if collect else None)
