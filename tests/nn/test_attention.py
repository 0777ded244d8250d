"""Attention against loops over rows, heads and queries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.decoder import causal
from research.nn.attention import Attention, attend, slopes
from research.nn.sites import Site


def reference(q, k, v, mask, scale=None, softcap=None, bias=0.0):
    """softmax over the allowed keys, one query at a time, in fp64."""
    bias = np.broadcast_to(bias, (len(q), q.shape[2], q.shape[1], k.shape[1]))
    batch, t, heads, size = q.shape
    out = np.zeros((batch, t, heads, size))
    mask = np.broadcast_to(mask, (batch, t, k.shape[1]))
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // k.shape[2])
            for i in range(t):
                allowed = np.flatnonzero(mask[b, i])
                if not len(allowed):
                    out[b, i, h] = v[b, :, shared].mean(0)
                    continue
                scores = k[b, allowed, shared] @ q[b, i, h] * (size**-0.5 if scale is None else scale)
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                scores = scores + bias[b, h, i, allowed]
                p = np.exp(scores - scores.max())
                out[b, i, h] = (p / p.sum()) @ v[b, allowed, shared]
    return out.reshape(batch, t, heads * size)


def arrays(heads, kv_heads, t=6, s=9, size=4, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        rng.normal(size=shape).astype(np.float32)
        for shape in ((batch, t, heads, size), (batch, s, kv_heads, size), (batch, s, kv_heads, size))
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 6])
def test_grouped_heads_and_masks(heads, kv_heads, rows):
    q, k, v = arrays(heads, kv_heads)
    mask = np.random.default_rng(1).random((2, rows, 9)) < 0.6
    mask[:, :, 0] = True
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask)), reference(q, k, v, mask), atol=1e-5)


def test_a_row_without_a_key_is_a_mean_and_its_gradient_is_finite():
    q, k, v = arrays(4, 2)
    mask = np.ones((2, 6, 9), bool)
    mask[0, 2], mask[1] = False, False
    out = attend(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)
    grads = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, jnp.asarray(mask)) ** 2), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_masked_keys_get_exactly_nothing():
    q, k, v = arrays(4, 2)
    mask = np.arange(9)[None, None] < np.array([5, 9])[:, None, None]
    loud = attend(q, k, np.where(np.arange(9)[:, None, None] < 5, v, 1e9), jnp.asarray(mask))
    np.testing.assert_array_equal(loud[0], attend(q, k, v, jnp.asarray(mask))[0])


def test_large_scores_do_not_overflow():
    q, k, v = arrays(4, 4)
    out = attend(1e4 * q, 1e4 * k, v, jnp.ones((2, 1, 9), bool))
    assert np.isfinite(out).all()


def test_dropout_keeps_the_mean_of_the_probabilities():
    q, k, v = arrays(2, 2, t=3, s=5)
    mask = jnp.ones((2, 1, 5), bool)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: attend(q, k, v, mask, 0.3, key)))(keys)
    np.testing.assert_allclose(drawn.mean(0), attend(q, k, v, mask), atol=0.1)
    assert drawn.std(0).min() > 0.05
    np.testing.assert_array_equal(attend(q, k, v, mask, 0.3, None), attend(q, k, v, mask))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_masks(window):
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    ours = np.asarray(causal(jnp.asarray(mask), jnp.asarray(positions), window))
    for b in range(2):
        for i in range(7):
            for j in range(7):
                seen = j <= i and mask[b, j] and (window is None or positions[b, i] - positions[b, j] < window)
                assert ours[b, i, j] == bool(seen), (b, i, j)


def test_the_module_projects_and_records_its_sites():
    module = Attention(4, 2, 8, qkv_bias=True, out_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 6, 12))
    mask = jnp.tril(jnp.ones((6, 6), bool))[None].repeat(2, 0)
    variables = nn.unbox(module.init(jax.random.key(1), x, mask))
    p = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(2), w.shape), variables["params"])
    assert {name: set(p[name]) for name in p} == {
        "q": {"kernel", "bias"}, "k": {"kernel", "bias"}, "v": {"kernel", "bias"}, "o": {"kernel"},
    }  # fmt: skip
    project = lambda name, h: (x @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 6, h, 8)  # noqa: E731
    expected = reference(project("q", 4), project("k", 2), project("v", 2), mask) @ p["o"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": p}, x, mask), expected, atol=1e-5)
    sites = variables["sites"]
    kinds = {name: (sites[name]["site"].kind, sites[name]["site"].shape) for name in sites}
    assert kinds["kv"] == ("attention", (2, 8)) and kinds["q"] == ("linear", (12, 32)) and kinds["k"][1] == (12, 16)
    assert all(isinstance(sites[name]["site"], Site) for name in sites)


@pytest.mark.parametrize("rows", [1, 2])
def test_scale_soft_cap_and_bias(rows):
    q, k, v = arrays(4, 2)
    mask = np.random.default_rng(1).random((2, 6, 9)) < 0.6
    mask[:, :, 0] = True
    options = {"scale": 1.0, "softcap": 0.7, "bias": np.random.default_rng(2).normal(size=(rows, 4, 6, 9))}
    found = attend(q, k, v, jnp.asarray(mask), **options | {"bias": jnp.asarray(options["bias"], jnp.float32)})
    np.testing.assert_allclose(found, reference(q, k, v, mask, **options), atol=1e-5)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(slopes(12), [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)])


def test_alibi_adds_the_keys_position():
    module, x = Attention(4, 4, 4, alibi=True), jax.random.normal(jax.random.key(0), (2, 5, 8))
    mask, positions = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, 0), jnp.arange(5) + jnp.array([[0], [3]])
    p = nn.unbox(module.init(jax.random.key(1), x, mask, positions=positions))["params"]
    q, k, v = ((x @ (p[name]["kernel"] + 0.1)).reshape(2, 5, 4, 4) for name in "qkv")
    p = jax.tree.map(lambda w: w + 0.1, p)
    bias = np.asarray(slopes(4))[None, :, None, None] * np.asarray(positions)[:, None, None]
    expected = reference(q, k, v, mask, bias=bias) @ p["o"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": p}, x, mask, positions=positions), expected, atol=1e-5)


def test_cross_attention_reads_the_other_sequence_and_then_its_cache():
    module, rng = Attention(4, 2, 4, cross=True), np.random.default_rng(0)
    x, other = (jnp.asarray(rng.normal(size=(2, t, 8)), jnp.float32) for t in (3, 5))
    mask = jnp.asarray([[[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]], bool)
    p = nn.unbox(module.init(jax.random.key(1), x, mask, context=other))["params"]
    p = jax.tree.map(lambda w: w + 0.1, p)
    q, k, v = (
        (h @ p[name]["kernel"]).reshape(2, h.shape[1], -1, 4) for name, h in zip("qkv", (x, other, other), strict=True)
    )
    expected = reference(q, k, v, mask) @ p["o"]["kernel"]
    found, state = module.apply({"params": p}, x, mask, context=other, mutable=["kept"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again = module.apply({"params": p, "cache": state["kept"]}, x[:, 1:2], mask)
    np.testing.assert_allclose(again, expected[:, 1:2], atol=1e-5)
