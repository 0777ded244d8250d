import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.peft import method as peft
from research.peft import tree
from research.quant.int8 import Int8, quantise
from research.quant.tree import quantise_axes, quantise_tree
from tests import tiny


@pytest.mark.parametrize("shape", [(16, 12), (3, 16, 12)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_is_at_most_half_a_step(shape, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    node = quantise(w)
    assert node.codes.dtype == jnp.int8 and node.codes.shape == shape and node.ndim == len(shape)
    assert node.scale.dtype == jnp.float32 and node.scale.shape == (*shape[:-2], shape[-1])
    exact = np.asarray(w, np.float32)
    np.testing.assert_allclose(node.scale, np.abs(exact).max(-2) / 127, rtol=1e-6)
    error = np.abs(np.asarray(node.dequantise(jnp.float32)) - exact)
    assert np.all(error <= np.asarray(node.scale)[..., None, :] * 0.5001)
    assert np.abs(np.asarray(node.codes)).max() == 127
    assert node.dequantise(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_column_of_zeros_stays_one():
    w = jnp.ones((4, 3)).at[:, 1].set(0)
    np.testing.assert_allclose(quantise(w).dequantise(jnp.float32), w, atol=1e-6)


def test_whole_numbers_of_steps_are_exact():
    codes = np.random.default_rng(1).integers(-127, 128, (32, 5))
    codes[0] = 127
    np.testing.assert_array_equal(quantise(jnp.asarray(codes * 0.25, jnp.float32)).codes, codes)


@pytest.mark.parametrize("scan", [True, False])
def test_tree_quantises_the_layers_kernels_and_keeps_the_rest(scan):
    base = tiny.params(tiny.case("linear_probe", "encoder", scan=scan).config)
    out = quantise_tree(base)
    nodes = tree.paths(out, is_leaf=lambda x: isinstance(x, Int8))
    for path, leaf in tree.paths(base).items():
        inside = path.startswith("layers") and path.endswith("/kernel")
        assert isinstance(nodes[path], Int8) if inside else nodes[path] is leaf, path
    dense = sum(x.nbytes for path, x in tree.paths(base).items() if isinstance(nodes[path], Int8))
    assert tree.nbytes(out) < tree.nbytes(base) - 0.7 * dense
    only = tree.paths(quantise_tree(base, targets="attn/q/kernel"), is_leaf=lambda x: isinstance(x, Int8))
    assert [path for path, x in only.items() if isinstance(x, Int8)] == [
        p for p in nodes if p.endswith("attn/q/kernel")
    ]


def test_axes_follow_codes_and_scales():
    shapes, axes = peft.base(tiny.case("linear_probe", "decoder").model)
    abstract = jax.eval_shape(quantise_tree, shapes)
    flat = tree.paths(quantise_axes(axes), is_leaf=lambda x: isinstance(x, tuple))
    for path, leaf in tree.paths(abstract).items():
        assert len(flat[path]) == leaf.ndim, path
    assert flat["layers/attn/q/kernel/codes"] == ("layers", "embed", "heads")
    assert flat["layers/attn/q/kernel/scale"] == ("layers", "heads")
    assert flat["embed/tokens/embedding"] == ("vocab", "embed")


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_an_int8_model_is_the_dequantised_one(family):
    case = tiny.case("linear_probe", family)
    codes = quantise_tree(tiny.params(case.config))
    whole = jax.tree.map(
        lambda x: x.dequantise(jnp.float32) if isinstance(x, Int8) else x, codes, is_leaf=lambda x: isinstance(x, Int8)
    )
    exact = case.forward({"params": tiny.params(case.config)})
    ours = case.forward({"params": codes})
    np.testing.assert_allclose(ours, case.forward({"params": whole}), atol=1e-5)
    assert 1e-4 < np.abs(ours - exact).mean() / np.abs(exact).mean() < 0.1
