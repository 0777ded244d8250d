"""Products with deferred kernels against autodiff of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.dot import Dropped, LowRank, Plus, Scaled, dot, low_rank
from research.nn.param import dense, dropout
from research.quant.int8 import quantise
from tests.tiny import products

D_IN, D_OUT, RANK = 24, 20, 3
TOKENS = pytest.mark.parametrize("tokens", [48, 5])  # folded W + AB; two products


def arrays(tokens: int, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    shapes = (tokens, D_IN), (D_IN, D_OUT), (D_IN, RANK), (RANK, D_OUT), (tokens, D_OUT)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def plain(x, w, a, b):
    return x @ (w + a @ b)


def deferred(x, w, a, b):
    return dot(x, LowRank(w, a, b))


def pulled(fn, dy, *arguments, argnums):
    return jax.jit(jax.grad(lambda *xs: jnp.sum(fn(*xs) * dy), argnums=argnums, allow_int=True))(*arguments)


def test_the_two_sizes_take_the_two_roads():
    def program(tokens):
        x, w, a, b, _ = arrays(tokens)
        return jax.make_jaxpr(deferred)(x, w, a, b).jaxpr

    assert ((D_IN, D_OUT), RANK) in products(program(48))
    assert ((D_IN, D_OUT), RANK) not in products(program(5))


@TOKENS
@pytest.mark.parametrize("argnums", [(0, 2, 3), (0, 1, 2, 3), (1,), (2,), (0,)])
def test_gradients_are_those_of_autodiff(tokens, argnums):
    *arguments, dy = arrays(tokens)
    np.testing.assert_allclose(deferred(*arguments), plain(*arguments), atol=1e-4)
    for ours, theirs in zip(
        pulled(deferred, dy, *arguments, argnums=argnums), pulled(plain, dy, *arguments, argnums=argnums), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@TOKENS
def test_a_frozen_kernel_gets_no_gradient_product(tokens):
    x, w, a, b, dy = arrays(tokens)

    def program(argnums):
        grad = jax.grad(lambda *xs: jnp.sum(deferred(*xs) * dy), argnums=argnums)
        return products(jax.make_jaxpr(grad)(x, w, a, b).jaxpr)

    assert ((D_IN, D_OUT), tokens) not in program((0, 2, 3))
    assert ((D_IN, D_OUT), tokens) in program((0, 1, 2, 3)), "the check would see it"


@TOKENS
def test_int8_kernel(tokens):
    x, w, a, b, dy = arrays(tokens)
    codes = quantise(w)
    whole = codes.dequantise(jnp.float32)
    np.testing.assert_allclose(deferred(x, codes, a, b), plain(x, whole, a, b), atol=1e-4)
    ours = pulled(lambda x, a, b: deferred(x, codes, a, b), dy, x, a, b, argnums=(0, 1, 2))
    theirs = pulled(lambda x, a, b: plain(x, whole, a, b), dy, x, a, b, argnums=(0, 1, 2))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(dot(x, codes), x @ whole, atol=1e-5)


@TOKENS
def test_vmap_over_adapters(tokens):
    x, w, *_ = arrays(tokens)
    pairs = [arrays(tokens, seed)[2:4] for seed in range(3)]
    a, b = (jnp.stack(leaves) for leaves in zip(*pairs, strict=True))

    def loss(x, a, b):
        return jnp.sum(deferred(x, w, a, b) ** 2) / 100

    batched = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), in_axes=(None, 0, 0))(x, a, b)
    for i, pair in enumerate(pairs):
        single = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, *pair)
        jax.tree.map(
            lambda many, one, i=i: np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-4), batched, single
        )


def test_vmap_with_a_kernel_for_each_row():
    x, w, a, b, _ = arrays(48)
    kernels = jnp.stack([w, 2 * w])

    def loss(w):
        return jnp.sum(deferred(x, w, a, b) ** 2) / 100

    for k, g in zip(kernels, jax.vmap(jax.grad(loss))(kernels), strict=True):
        np.testing.assert_allclose(
            g, jax.grad(lambda w: jnp.sum(plain(x, w, a, b) ** 2) / 100)(k), rtol=1e-4, atol=1e-3
        )


def test_an_unused_result_has_zero_gradients():
    *arguments, _ = arrays(48)
    grads = jax.grad(lambda *xs: jnp.sum(xs[0]) + 0 * deferred(*xs).sum(), argnums=(1, 2, 3))(*arguments)
    assert not any(np.any(g) for g in grads)
    _, pull = jax.vjp(deferred, *arguments)
    assert all(g.shape == x.shape for g, x in zip(pull(jnp.zeros((48, D_OUT))), arguments, strict=True))


def test_deferred_sums_concatenate():
    x, w, a, b, _ = arrays(48)
    c, d = arrays(48, 1)[2:4]
    both = low_rank(low_rank(w, a, b), c, d)
    assert isinstance(both, LowRank) and both.a.shape == (D_IN, 2 * RANK)
    np.testing.assert_allclose(dot(x, both), x @ (w + a @ b + c @ d), atol=1e-4)
    np.testing.assert_allclose(both.dequantise(jnp.float32), w + a @ b + c @ d, atol=1e-5)


def test_dropout_is_on_the_low_rank_product_alone():
    x, w, a, b, _ = arrays(48)
    c, d = arrays(48, 1)[2:4]
    rng = jax.random.key(0)
    dropped = low_rank(w, a, b, 0.5, rng)
    assert isinstance(dropped, Dropped)
    assert isinstance(low_rank(w, a, b, 0.5), LowRank) and isinstance(low_rank(w, a, b, 0.0, rng), LowRank)
    expected = x @ w + (dropout(x, 0.5, rng) @ a) @ b
    np.testing.assert_allclose(dot(x, dropped), expected, atol=1e-4)
    for chained in (low_rank(dropped, c, d), low_rank(low_rank(w, c, d), a, b, 0.5, rng)):
        np.testing.assert_allclose(dot(x, chained), expected + x @ c @ d, atol=1e-4)


@TOKENS
def test_bf16_activations_with_fp32_weights(tokens):
    x, w, a, b, dy = arrays(tokens)
    half = x.astype(jnp.bfloat16)
    y = deferred(half, w, a, b)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), plain(x, w, a, b), rtol=0.05, atol=0.5)
    grads = jax.grad(lambda w, a, b: jnp.sum(deferred(half, w, a, b).astype(jnp.float32) * dy), argnums=(0, 1, 2))(
        w, a, b
    )
    assert [g.dtype for g in grads] == [jnp.float32] * 3


@TOKENS
def test_a_small_update_survives_half_precision(tokens):
    """bf16 holds 1 + 1/500 as 1: in W + AB the update would be gone, in its own product it is not."""
    sign = jnp.where(jnp.arange(D_IN) % 2 == 0, 1.0, -1.0)
    x = jnp.tile(sign, (tokens, 1)).astype(jnp.bfloat16)  # x W = 0 for a constant W
    a, b = sign[:, None], jnp.full((1, D_OUT), 0.002)
    w = jnp.ones((D_IN, D_OUT))
    np.testing.assert_allclose(deferred(x, w, a, b).astype(jnp.float32), D_IN * 0.002, rtol=0.01)
    dx = jax.grad(lambda x: deferred(x, w, a, b).astype(jnp.float32).sum())(x).astype(jnp.float32)
    np.testing.assert_allclose(dx, jnp.tile(D_OUT * (1 + 0.002 * sign), (tokens, 1)), rtol=0.01)
    assert deferred(x.astype(jnp.float32), w, a, b).dtype == jnp.float32


@pytest.mark.parametrize("inner", ["array", "int8", "low rank", "dropped"])
def test_scaled_and_plus_are_what_they_stand_for(inner):
    x, w, a, b, dy = arrays(5)
    c, d = jnp.arange(D_OUT, dtype=jnp.float32), 0.1 * jnp.flip(w)
    base = {"array": w, "int8": quantise(w), "low rank": LowRank(w, a, b), "dropped": Dropped(w, a, b, None, 0.0)}[
        inner
    ]
    full = w + a @ b if inner == "dropped" else dense(base, jnp.float32)
    np.testing.assert_allclose(dot(x, Scaled(base, c)), x @ (full * c), atol=1e-4)
    np.testing.assert_allclose(dot(x, Plus(base, d)), x @ (full + d), atol=1e-4)
    assert Scaled(base, c).shape == Plus(base, d).shape == w.shape
    if inner == "array":
        found = pulled(lambda c, d: dot(x, Plus(Scaled(w, c), d)), dy, c, d, argnums=(0, 1))
        tiny_close = [np.sum(w * (x.T @ dy), axis=0), x.T @ dy]
        for one, two in zip(found, tiny_close, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_a_small_dense_update_is_not_rounded_away_in_half_precision():
    x, w = jnp.ones((1, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16)
    d = jnp.full((4, 4), 2.0**-10)
    assert np.all(dot(x, w + d.astype(w.dtype)) == 4)
    moved = jax.grad(lambda d: dot(x, Plus(w, d)).astype(jnp.float32).sum())(d)
    np.testing.assert_array_equal(moved, np.ones((4, 4)))
    np.testing.assert_array_equal(dot(x * 0 + 2.0**-6, Plus(w * 0, d)), np.full((1, 4), 2.0**-14, np.float32))
    assert np.all(Plus(w, d).dequantise(jnp.float32) == 1 + 2.0**-10)
