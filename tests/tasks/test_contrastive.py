"""The contrastive loss against its closed forms and transformers' own value, and classes named by prompts."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.load import load
from research.errors import DataError
from research.tasks import classify, contrastive
from research.tasks.contrastive import info_nce

GOLDEN = Path(__file__).parent.parent / "golden" / "clip"
N = 5


def test_pairs_that_all_look_alike_give_ln_n():
    same = jnp.ones((N, 4)) / 2
    found, slope = jax.value_and_grad(lambda s: info_nce(same, same, s).mean())(2.6592)
    np.testing.assert_allclose([found, slope], [math.log(N), 0.0], atol=1e-5)


@pytest.mark.parametrize("log_scale", [0.0, 1.5, math.log(1 / 0.07)])
def test_orthogonal_pairs_are_a_function_of_the_temperature(log_scale):
    own, s = jnp.eye(N), math.exp(log_scale)
    found, slope = jax.value_and_grad(lambda x: info_nce(own, own, x).mean())(log_scale)
    np.testing.assert_allclose(found, math.log1p((N - 1) * math.exp(-s)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope, -s * (N - 1) / (math.exp(s) + N - 1), rtol=1e-4, atol=1e-5)
    shifted = info_nce(own, jnp.roll(own, 1, axis=0), jnp.float32(log_scale))
    np.testing.assert_allclose(shifted.mean(), found + s, rtol=1e-4)
    assert shifted.metrics["accuracy/text"][0] == 0


def test_both_directions_count():
    """Two images of one text: the rows are sure, the columns are not."""
    images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    rows = [math.log(2), math.log(2)]  # each image sees two equal texts
    columns = [math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    found = info_nce(images, texts, jnp.float32(0.0))
    np.testing.assert_allclose(found.sum, (sum(rows) + sum(columns)) / 2, rtol=1e-6)
    assert found.weight == 2 and found.metrics["accuracy/image"][0] == 1


def test_a_row_that_only_pads_is_nobodys_negative():
    draw = np.random.default_rng(0)
    images, texts = (jnp.asarray(draw.normal(size=(N, 3)), jnp.float32) for _ in range(2))
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])
    run = jax.value_and_grad(lambda i, t, w: info_nce(i, t, jnp.float32(1.0), w).mean(), argnums=(0, 1))
    keep = np.array([0, 1, 3])
    (whole, (gi, gt)), (part, (pi, pt)) = run(images, texts, weight), run(images[keep], texts[keep], jnp.ones(3))
    np.testing.assert_allclose(whole, part, rtol=1e-6)
    for padded, alone in ((gi, pi), (gt, pt)):
        np.testing.assert_allclose(padded[keep], alone, atol=1e-6)
        assert (np.delete(padded, keep, axis=0) == 0).all()


def test_the_scale_stops_at_a_hundred_and_can_come_back():
    images, texts = jnp.eye(2), jnp.array([[0.0, 1.0], [1.0, 0.0]])  # all wrong: a smaller scale is better
    run = jax.value_and_grad(lambda s: info_nce(images, texts, s).mean())
    (above, slope), (most, _) = run(7.0), run(math.log(100.0))
    np.testing.assert_allclose(above, most, rtol=1e-5)
    assert slope > 0


@pytest.fixture(scope="module")
def golden():
    return load(str(GOLDEN)), dict(np.load(GOLDEN / "outputs.npz"))


def test_the_loss_is_that_of_transformers(golden):
    base, want = golden
    batch = {name: want[name][:2] for name in ("images", "tokens", "mask")}
    found = jax.jit(lambda p: contrastive.loss(base.model)({"params": p}, batch, None))(base.params)
    np.testing.assert_allclose(found.mean(), want["loss"], atol=1e-4)
    np.testing.assert_allclose(found.metrics["logit_scale"][0] / 2, 1 / 0.07, rtol=1e-3)


def test_prompts_classify_as_the_texts_themselves(golden):
    base, want = golden
    prompts = [str(x) for x in want["prompts"]]
    variables = {"params": base.params}
    head = contrastive.zero_shot(base.model, variables, base.tokenizer, prompts, ["{}"])
    found = jax.jit(lambda v, x: classify.logits(base.model, v, {"images": x}))(
        variables | {"head": head}, want["images"]
    )
    np.testing.assert_allclose(found, want["logits"], atol=1e-4)
    both = contrastive.zero_shot(base.model, variables, base.tokenizer, ["cat", "dog"], ["a {}.", "a photo of a {}."])
    np.testing.assert_allclose(jnp.linalg.norm(both["kernel"], axis=0), 1 / 0.07, rtol=1e-3)
    with pytest.raises(DataError, match="templates with {}"):
        contrastive.zero_shot(base.model, variables, base.tokenizer, ["cat"], ["a photo"])
