"""Inputs, and what holds of every denoiser: a PEFT method reaches each leaf it trains."""

import jax
import jax.numpy as jnp
import numpy as np

from research.models.registry import build
from research.peft import method as peft
from research.peft import registry, tree
from tests import tiny

CLASSES, TEXT = 5, 6


def inputs(size: int, channels: int, rows: int = 3) -> tuple[np.ndarray, ...]:
    """x, t, labels (the last one: no class), text."""
    rng = np.random.default_rng(7)
    x, text = rng.normal(size=(rows, size, size, channels)), rng.normal(size=(rows, TEXT))
    t, labels = np.linspace(0.1, 0.9, rows), np.array([*range(rows - 1), CLASSES], np.int32)
    return x.astype(np.float32), t.astype(np.float32), labels, text.astype(np.float32)


def check_method(config, spec: str) -> None:
    """A fresh method that says it is an identity leaves the output as it is to the bit; after a small move its gradient
    reaches every leaf that trains.
    """
    model, method = build(config), registry.parse(spec)
    sites, args = peft.sites(model), inputs(config.image_size, config.channels)
    variables = {"params": tiny.params(config) if hasattr(config, "num_layers") else tiny.fill(peft.base(model)[0])}
    added = peft.init(method, jax.random.key(0), sites)
    base = jax.jit(model.apply)(variables, *args)
    chosen = peft.mask(method, variables | {"peft": added})

    @jax.jit
    def run(added):
        parts = tree.partition(variables | {"peft": added}, chosen)

        def total(trainable):
            y = model.apply(peft.realised(method, tree.combine(trainable, parts[1]), sites), *args)
            return jnp.sum(jnp.sin(3 * y)), y

        return jax.grad(total, has_aux=True)(parts[0])

    if method.identity:
        fresh = jax.jit(model.apply)(peft.realised(method, variables | {"peft": added}, sites), *args)
        np.testing.assert_array_equal(fresh, base)
    gradients, moved = run(tiny.noise(added))
    assert (np.abs(moved - base).max() > 1e-4) == bool(jax.tree.leaves(added))
    reached = tree.paths(gradients)
    assert reached
    for path, gradient in reached.items():
        # A bias of the keys moves all scores of a query alike.
        assert path.endswith("attn/k/bias") or np.abs(gradient).max() > 0, path
