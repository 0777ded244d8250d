"""The inverse of many small matrices at once, in plain arithmetic.

jaxlib's batched LU can wait for itself for ever: on a CPU each call hands its matrices to XLA's threads and waits, so
that as many calls at once as there are threads leave none to do the work.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def inverse(m: jax.Array) -> jax.Array:
    """m [..., b, b] -> its inverse, by Gauss and Jordan without pivots: none is small where the symmetric part of m is
    positive definite, as that of I - Q with Q = -Q'.
    """
    b = m.shape[-1]

    def eliminate(i: jax.Array, both: jax.Array) -> jax.Array:
        row = both[..., i, :] / both[..., i, i][..., None]
        return (both - both[..., :, i][..., None] * row[..., None, :]).at[..., i, :].set(row)

    eye = jnp.broadcast_to(jnp.eye(b, dtype=m.dtype), m.shape)
    return jax.lax.fori_loop(0, b, eliminate, jnp.concatenate([m, eye], axis=-1))[..., b:]


@inverse.defjvp
def _jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    found = inverse(*primals)
    return found, -found @ tangents[0] @ found
