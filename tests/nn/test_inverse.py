import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from research.nn.inverse import inverse


def test_is_the_inverse_and_has_its_gradient():
    a = np.random.default_rng(0).normal(size=(3, 8, 8))
    m = jnp.asarray(np.eye(8) - 5 * (a - a.swapaxes(-1, -2)), jnp.float32)
    np.testing.assert_allclose(jax.jit(inverse)(m) @ m, np.broadcast_to(np.eye(8), m.shape), atol=1e-5)
    weight = jnp.asarray(a, jnp.float32)
    found, wanted = (jax.grad(lambda m, f=f: jnp.sum(f(m) * weight))(m) for f in (inverse, jnp.linalg.inv))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


CODE = """
import jax, jax.numpy as jnp
from research.nn.inverse import inverse
m = jnp.eye(32) + jnp.zeros((64, 32, 32))
four = jax.jit(lambda m: [inverse(m * k) for k in (1.0, 2.0, 3.0, 4.0)])
for _ in range(20):
    jax.block_until_ready(four(m))
print("done")
"""


def test_several_at_once_end_on_two_threads():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
