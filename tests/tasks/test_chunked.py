"""Chunked log-probabilities against the plain ones, on a real decoder: values, gradients, shapes and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.dot import LowRank
from research.quant.int8 import quantise
from research.tasks.chunked import chunked_logprobs, chunked_nats, kernel_unembed, model_head, model_unembed
from research.tasks.loss import cross_entropy, model_variables
from tests import tiny

N, D, V, CHUNK = 23, 8, 40, 6  # the last chunk is padded


@functools.cache
def data():
    rng = np.random.default_rng(0)
    f = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return f(N, D), f(D, V), f(D, 3), f(3, V), jnp.asarray(rng.integers(0, V, N)), jnp.abs(f(N))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_and_gradients_have_their_closed_form(softcap):
    """Frozen kernel (the gradient comes out of the forward pass), trained kernel, and low-rank on a frozen one."""
    x, w, a, b, labels, weight = data()

    def plain(x, w, a, b):
        z = x @ (w + a @ b)
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        return jnp.sum(cross_entropy(z, labels) * weight), z

    def ours(x, w, a, b):
        return chunked_nats(kernel_unembed, LowRank(w, a, b), x, labels, weight, CHUNK, softcap)

    @jax.jit
    def everything(*args):
        grads = lambda fn, which: jax.value_and_grad(fn, which, has_aux=True)(*args)  # noqa: E731
        rows = chunked_logprobs(kernel_unembed, LowRank(*args[1:]), args[0], labels, CHUNK, softcap)
        return grads(plain, (0, 1, 2, 3)), grads(ours, (0, 1, 2, 3)), grads(ours, (0,)), grads(ours, (0, 2, 3)), rows

    plain_, trained, frozen, thin, rows = everything(x, w, a, b)
    (nats, z), (dx, dw, da, db) = plain_
    tiny.close(trained[1], (dx, dw, da, db))
    tiny.close(frozen[1], (dx,))
    tiny.close(thin[1], (dx, da, db))
    correct = (z.argmax(-1) == labels) * weight
    for (ours_nats, ours_correct), _ in (trained, frozen, thin):
        np.testing.assert_allclose([ours_nats, ours_correct], [nats, correct.sum()], rtol=1e-5)
    logp = jax.nn.log_softmax(z)
    np.testing.assert_allclose(rows.logprob, logp[np.arange(N), labels], atol=1e-5)
    np.testing.assert_allclose(rows.entropy, -(jnp.exp(logp) * logp).sum(-1), atol=1e-5)


@pytest.mark.slow
def test_a_quantised_kernel_and_dropout_in_the_head():
    x, w, _, _, labels, weight = data()
    codes = quantise(w)
    fn = lambda head: jax.grad(lambda x: chunked_nats(kernel_unembed, head, x, labels, weight, CHUNK)[0])(x)  # noqa: E731
    tiny.close(fn(codes), fn(codes.dequantise(jnp.float32)))
    noisy = lambda head, x, rng: x @ (w + jax.random.normal(rng, w.shape))  # noqa: E731
    ones = lambda seed: chunked_logprobs(noisy, None, jnp.ones((4, D)), labels[:4] * 0, 2, rng=jax.random.key(seed))  # noqa: E731
    one, again, other = ones(1).logprob, ones(1).logprob, ones(2).logprob
    assert one[0] == again[0] != other[0] and one[0] == one[2] != one[1]  # rows 0 and 2 are one chunk


def whole(model):
    """The language model's loss by chunks, as a task writes it."""

    def fn(variables, batch, rng):
        v = model_variables(variables)
        hidden = model.apply(v, batch["tokens"], batch["mask"])[:, :-1]
        weight = (batch["mask"][:, :-1] * batch["mask"][:, 1:]) * batch["weight"][:, None]
        labels = batch["tokens"][:, 1:].reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return chunked_nats(model_unembed(model), model_head(v), hidden, labels, weight.reshape(-1), 10)[0]

    return fn


@pytest.mark.parametrize(
    "spec, tie, which",
    [
        ("lora:targets=lm_head", False, "peft"),
        pytest.param("full", True, "params", marks=pytest.mark.slow),
        pytest.param("full", False, "params", marks=pytest.mark.slow),
        pytest.param("lora:targets=all", True, "peft", marks=pytest.mark.slow),
    ],
)
def test_equals_the_plain_loss_of_a_model(spec, tie, which):
    case = tiny.Case(spec, "decoder", tie_embeddings=tie)
    point, batch = case.point, tiny.batch()

    def both(part):
        v, rows = point | {which: part}, jnp.mean(batch["weight"])  # sums of rows that count once on average
        return case.loss(v, batch, None).sum / rows, whole(case.model)(v, batch, None) / rows

    @jax.jit
    def run(part):
        return [jax.value_and_grad(lambda p, i=i: both(p)[i])(part) for i in (0, 1)]

    (plain, plain_grad), (ours, ours_grad) = run(point[which])
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    tiny.close(ours_grad, plain_grad)


def largest(fn, *args):
    return max(
        out.aval.size
        for eqn in tiny.equations(jax.make_jaxpr(fn)(*args).jaxpr)
        for out in eqn.outvars
        if out.aval.shape
    )


def test_no_logits_exist_and_a_frozen_head_multiplies_twice():
    n, d, v, chunk = 512, 16, 1000, 64
    x, w, y = jnp.ones((n, d)), jnp.ones((d, v)), jnp.zeros(n, int)
    fn = lambda x, w: chunked_nats(kernel_unembed, w, x, y, jnp.ones(n), chunk)[0]  # noqa: E731
    for wrt in (0, (0, 1)):
        assert largest(jax.grad(fn, wrt), x, w) <= chunk * v
    assert largest(jax.grad(lambda x: cross_entropy(x @ w, y).sum()), x) == n * v
    frozen = tiny.products(jax.make_jaxpr(jax.grad(fn))(x, w).jaxpr)
    assert sorted(shape for shape, _ in frozen) == [(chunk, d), (chunk, v)]


@pytest.mark.slow
def test_memory_falls_by_the_logits():
    """SmolLM2's head, 4 x 512 tokens: compiled temporaries of the loss and its gradient."""
    n, d, v, chunk = 2048, 576, 49152, 256
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((n, d), "float32"), ((d, v), "float32"), ((n,), "int32"))]
    temp = lambda fn: jax.jit(jax.grad(fn)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    plain = temp(lambda x, w, y: cross_entropy(x @ w, y).sum())
    ours = temp(lambda x, w, y: chunked_nats(kernel_unembed, w, x, y, jnp.ones(n), chunk)[0])
    print(f"temporaries: plain {plain / 2**20:.0f} MiB, by chunks {ours / 2**20:.0f} MiB")
    assert plain >= n * v * 4
    # In place of [n, V]: some buffers of [chunk, V], and the hidden states with their gradients.
    assert ours <= 4 * chunk * v * 4 + 6 * n * d * 4
