"""Visual prompts and AdaptFormer against what their papers write, on a small vision transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.models.registry import build
from research.models.vit import Block, VitConfig
from research.nn.norm import LayerNorm
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import classify
from tests import tiny

CONFIG = VitConfig(8, 4, 3, 32, 2, 4, 56)


@functools.cache
def images(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 8, 8, 3)).astype(np.float32)


@functools.cache
def model():
    return build(CONFIG)


@functools.cache
def sites() -> dict:
    return peft.sites(model())


@functools.cache
def base() -> dict:
    return tiny.fill(peft.base(model())[0])


forward = jax.jit(lambda variables, x: build(CONFIG).apply(variables, x))


def fresh(spec: str) -> dict:
    return {"params": base(), "peft": peft.init(registry.parse(spec), jax.random.key(1), sites())}


@functools.cache
def replacing(variables_table: bytes) -> np.ndarray:
    """Layer by layer as the paper has it: prompts go in with the tokens, and what comes out at them is thrown away."""
    table, p = np.frombuffer(variables_table, np.float32).reshape(2, 3, 32), base()
    x = images()
    patches = x.reshape(4, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, 4, 48)
    h = patches @ p["embed"]["patches"]["kernel"] + p["embed"]["patches"]["bias"]
    h = jnp.concatenate([jnp.broadcast_to(p["embed"]["class_token"], (4, 1, 32)), h], axis=1)
    h += p["embed"]["positions"]["embedding"]
    block = jax.jit(lambda p, h: Block(CONFIG).apply({"params": p}, h, jnp.ones((4, 1, h.shape[1]), bool)))
    for i in range(2):
        h = jnp.concatenate([jnp.broadcast_to(table[i], (4, 3, 32)), h], axis=1)
        h = block(jax.tree.map(lambda x, i=i: x[i], p["layers"]), h)[:, 3:]
    return np.asarray(LayerNorm(CONFIG.norm_eps).apply({"params": p["norm"]}, h))


def test_deep_prompts_are_replaced_in_every_layer():
    variables = fresh("vpt:length=3")
    node = variables["peft"]["layers"]["attn"]["kv"]["vpt"]
    assert node.table.shape == (2, 3, 32)
    limit = (6 / (48 + 32)) ** 0.5
    assert 0.8 * limit < np.abs(node.table).max() <= limit
    strong = node.replace(table=4 * node.table + 0.5)  # not centred: a norm left out would show
    variables = variables | {"peft": {"layers": {"attn": {"kv": {"vpt": strong}}}}}
    expected = replacing(np.asarray(strong.table).tobytes())
    np.testing.assert_allclose(forward(variables, images()), expected, atol=2e-4)
    assert np.abs(forward({"params": base()}, images()) - expected).max() > 1e-2


def test_shallow_prompts_have_no_position_and_are_cut_off():
    variables = fresh("vpt:length=3,deep=False")
    table = variables["peft"]["embed"]["prompt"]["vpt"].table
    out = forward(variables, images())
    assert table.shape == (3, 32) and out.shape == (4, 5, 32)
    order = variables["peft"]["embed"]["prompt"]["vpt"].replace(table=table[::-1])
    turned = forward(variables | {"peft": {"embed": {"prompt": {"vpt": order}}}}, images())
    np.testing.assert_allclose(turned, out, atol=1e-5)


def test_adaptformer_reads_the_stream_beside_the_feed_forward():
    added = tiny.noise(fresh("adaptformer:width=4")["peft"]["layers"]["mlp_residual"]["adaptformer"], std=0.5)
    node = jax.tree.map(lambda x: np.asarray(x[0], np.float64), added)
    stream, x, y = np.random.default_rng(3).normal(size=(3, 2, 5, 32)).astype(np.float32)
    a = node.adapter
    expected = y + node.scale * (np.maximum(stream @ a.down + a.down_bias, 0) @ a.up + a.up_bias)
    got = jax.tree.map(lambda x: x[0], added).residual(stream, x, y, lambda x: x, None)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_training_moves_every_added_leaf_and_nothing_of_the_base():
    method = registry.parse("vpt:length=3+adaptformer:width=4")
    data = {"images": images(), "labels": np.arange(4) % 3}
    added = peft.init(method, jax.random.key(1), sites())
    variables = {"params": base(), "peft": added, "head": classify.init_head(jax.random.key(2), 32, 3)}
    mask = peft.mask(method, variables)
    trained, frozen = tree.partition(variables, mask)
    loss = classify.loss(model())

    @jax.jit
    def gradients(trained: dict) -> dict:
        total = lambda t: loss(tree.combine(t, frozen), data, None).sum  # noqa: E731
        return jax.grad(total)(trained)

    tx = optax.adam(1e-2)
    opt_state = tx.init(trained)
    now = trained
    for _ in range(2):
        updates, opt_state = tx.update(gradients(now), opt_state)
        now = optax.apply_updates(now, updates)
    for path, leaf in tree.paths(now).items():
        assert np.abs(leaf - tree.paths(trained)[path]).max() > 1e-3, path
    assert not any(path.startswith("params") for path, leaf in tree.paths(now).items() if leaf is not None)


def test_mixed_labels_are_the_mean_of_two_losses():
    variables = {"params": base(), "head": classify.init_head(jax.random.key(2), 32, 3)}
    loss = jax.jit(lambda labels: classify.loss(model())(variables, {"images": images(), "labels": labels}, None))
    a, b = np.array([0, 1, 2, 0]), np.array([1, 1, 0, 2])
    mixed = loss(0.3 * np.eye(3, dtype=np.float32)[a] + 0.7 * np.eye(3, dtype=np.float32)[b])
    np.testing.assert_allclose(mixed.sum, 0.3 * loss(a).sum + 0.7 * loss(b).sum, rtol=1e-5)
    assert mixed.weight == 4
