"""Leaves on their way between devices and the host, whatever the mesh and the number of processes.

A key counts as the numbers it is made of.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.train.distributed import is_main


def is_key(x: Any) -> bool:
    """Whether an array, or its shape, is one of typed keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def copies(leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Whole copies on the host of process 0; empty in other processes. All processes call it with the same leaves.

    Copies and not views: a CPU's buffer that is seen through a view can't be given to the next step.
    """
    plain = {path: jax.random.key_data(x) if is_key(x) else jnp.asarray(x) for path, x in leaves.items()}
    for x in plain.values():
        if x.is_fully_addressable:
            x.copy_to_host_async()
    found = {}
    for path, x in plain.items():
        if not x.is_fully_addressable:
            from jax.experimental import multihost_utils

            x = multihost_utils.process_allgather(x, tiled=True)
        if is_main():
            found[path] = np.array(x)
    return found


def place(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts a leaf, which every process has whole, where it belongs."""
    # Copied, since the copies of a replicated leaf may all be views of `x`, and the step writes into each.
    return jnp.copy(jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]))


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, or of something with a shape and perhaps a sharding."""
    plain = jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
    # Where it is not known, the first device. A key's own sharding, always replicated, is that of its data too.
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def part(x: Any) -> np.ndarray:
    """What this process has of a leaf, as one of numpy's own types: bfloat16 becomes float32."""
    if isinstance(x, jax.Array):
        x = jax.random.key_data(x) if is_key(x) else x
        x = x if x.is_fully_addressable else x.addressable_data(0)
    found = np.asarray(x)
    return found.astype(np.float32) if found.dtype.kind == "V" else found
