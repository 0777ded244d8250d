"""Cached decoding against teacher forcing, for every method, with rows of different lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import DataError, FlagError
from research.generate import cache as caches
from research.generate.decode import generate
from research.generate.sampling import Sampling
from research.models.registry import build
from research.peft import method as peft
from research.peft import registry
from research.tasks.loss import model_variables
from tests import tiny

ROOM = 4
CHAIN = "prefix:length=3+prompt:length=2+lora"
QUICK = (CHAIN, "llama_adapter", "ladder")
SPECS = [registry.small(name) for name in registry.names()] + [
    "prefix:length=3+prompt:length=2+lora",
    "ladder:layers=0",
]


def prompts(rows: int = 3, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Padded on the left by different amounts; the pads are random tokens."""
    rng = np.random.default_rng(5)
    mask = (np.arange(length) >= np.arange(rows)[:, None] * 2).astype(np.int32)
    return rng.integers(1, tiny.VOCAB, (rows, length)).astype(np.int32), mask


def applies(spec: str) -> bool:
    """Three have nothing to train in this decoder, or need to be told what; any other must run."""
    try:
        method, model = registry.parse(spec), build(tiny.DECODER)
        added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), peft.sites(model)))
        peft.mask(method, {"params": peft.base(model)[0], "peft": added, "head": {"bias": jnp.zeros(1)}})
    except FlagError:
        return spec not in ("bitfit", "cross_attention", "trainable_tokens")
    return True


def forced(spec: str, family: str = "decoder", **changes) -> tuple[np.ndarray, np.ndarray]:
    """Logits after the prompt and after each of ROOM more tokens: all at once, and one by one."""
    case = tiny.case(spec, family, **changes)
    tokens, mask = prompts()
    more = np.random.default_rng(6).integers(1, tiny.VOCAB, (tokens.shape[0], ROOM)).astype(np.int32)
    whole, ones = np.concatenate([tokens, more], axis=1), np.ones_like(more)

    @jax.jit
    def both(variables, whole, mask):
        v = peft.realised(case.method, {k: x for k, x in variables.items() if k != "head"}, case.sites)
        full = case.model.apply(model_variables(v), whole, jnp.concatenate([mask, ones], axis=1), method="logits")
        logits, cache = caches.prefill(case.model, v, whole[:, :-ROOM], mask, ROOM)

        def one(carry, token):
            cache, left = carry
            logits, cache = caches.step(case.model, v, cache, token, left)
            return (cache, left - 1), logits

        _, rest = jax.lax.scan(one, (cache, jnp.asarray(ROOM)), whole[:, -ROOM:].T)
        return full[:, -ROOM - 1 :], jnp.concatenate([logits[:, None], rest.swapaxes(0, 1)], axis=1)

    return jax.tree.map(np.asarray, both(case.point, whole, mask))


def parameters(specs):
    return [
        pytest.param(s, id=f"{s}-decoder", marks=[] if s.startswith(QUICK) and "layers" not in s else pytest.mark.slow)
        for s in specs
    ]


@pytest.mark.parametrize("spec", parameters([s for s in SPECS if applies(s)]))
def test_cached_decoding_is_teacher_forcing(spec):
    full, cached = forced(spec)
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"scan": False}, {"sliding_window": 3}], ids=str)
def test_in_other_layouts(changes):
    full, cached = forced(CHAIN, **changes)
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_in_layers_of_two_kinds(scan):
    full, cached = forced(CHAIN, "gemma", scan=scan)
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@functools.cache
def generated(temperature: float, stop: tuple = ()):
    case = tiny.case(CHAIN, "decoder")
    v = peft.realised(case.method, case.point, case.sites)
    run = lambda tokens, mask, rng: generate(  # noqa: E731
        case.model, v, tokens, mask, rng, max_new=6, sampling=Sampling(temperature), stop=stop, pad=0
    )
    tokens, mask = prompts()
    return jax.tree.map(np.asarray, jax.jit(run)(tokens, mask, jax.random.key(3)))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_scoring_what_was_generated(temperature):
    case, out = tiny.case(CHAIN, "decoder"), generated(temperature)
    tokens, mask = prompts()
    whole = {"tokens": np.concatenate([tokens, out.tokens], 1), "mask": np.concatenate([mask, out.mask], 1)}
    logits = case.forward(case.point, whole)[:, tokens.shape[1] - 1 : -1]
    scores = np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(scores, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)
    assert (out.mask == 1).all()
    if temperature == 0:
        np.testing.assert_array_equal(out.tokens, np.argmax(logits, axis=-1))


def test_a_row_ends_at_its_stop_token():
    free = generated(0.0)
    stop = int(free.tokens[0, 2])
    out = generated(0.0, (stop,))
    for row in range(len(free.tokens)):
        hits = np.flatnonzero(free.tokens[row] == stop)
        length = hits[0] + 1 if len(hits) else free.tokens.shape[1]
        np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
        assert out.mask[row].sum() == length and (out.tokens[row, length:] == 0).all()
        assert (out.logprobs[row, length:] == 0).all()


def test_a_prompt_padded_on_the_right_is_refused():
    case = tiny.case("lora", "decoder")
    tokens, mask = prompts()
    with pytest.raises(DataError, match="row 1 does not end"):
        generate(case.model, case.variables, tokens, mask[:, ::-1], jax.random.key(0), max_new=2)
    with pytest.raises(FlagError, match="max_new=0"):
        generate(case.model, case.variables, tokens, mask, jax.random.key(0), max_new=0)
