"""Layer decay against its formula, and the probes against NumPy."""

import jax.numpy as jnp
import numpy as np

from research.models.stack import unstack
from research.peft import tree
from research.vision import transfer


def test_layer_decay():
    params = {
        "embed": {"patches": {"kernel": jnp.ones((2, 2))}},
        "layers": {"mlp": {"up": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}},
        "norm": {"scale": jnp.ones(2)},
    }
    factors = transfer.layer_decay(params, 0.5, 3)
    assert factors["embed"]["patches"]["kernel"] == 0.5**4 and factors["norm"]["scale"] == 1
    up = factors["layers"]["mlp"]["up"]
    np.testing.assert_allclose(up["kernel"], np.array([0.125, 0.25, 0.5]).reshape(3, 1, 1))
    assert up["bias"].shape == (3, 1)
    flat = tree.paths(transfer.layer_decay(unstack(params), 0.5, 3))
    assert [flat[f"layers_{i}/mlp/up/bias"] for i in range(3)] == [0.125, 0.25, 0.5]


def test_probes_separate_what_can_be_separated():
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(3, 8))
    labels = rng.integers(0, 3, 90)
    x = (centres[labels] + 0.3 * rng.normal(size=(90, 8))).astype(np.float32)
    near = transfer.nearest(x[:60], jnp.asarray(labels[:60]), x[60:], 3, k=5)
    np.testing.assert_array_equal(near, labels[60:])
    head = transfer.ridge_probe(jnp.asarray(x[:60]), jnp.asarray(labels[:60]), 3, penalty=0.5)
    np.testing.assert_array_equal(np.argmax(x[60:] @ head["kernel"] + head["bias"], axis=-1), labels[60:])
    a = np.concatenate([x[:60], np.ones((60, 1))], axis=1).astype(np.float64)
    penalty = np.diag([0.5] * 8 + [0.0])
    expected = np.linalg.solve(a.T @ a + penalty, a.T @ (2 * np.eye(3)[labels[:60]] - 1))
    np.testing.assert_allclose(head["kernel"], expected[:-1], atol=1e-3)
    np.testing.assert_allclose(head["bias"], expected[-1], atol=1e-3)
