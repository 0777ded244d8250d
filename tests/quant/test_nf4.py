from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import ModelError
from research.peft import method as peft
from research.peft import tree
from research.quant.nf4 import CODES, NF4, Scales, axes_of, quantise
from research.quant.tree import error, quantise_axes, quantise_tree
from research.train import mesh as meshes
from tests import tiny

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nf4.npz")


def kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_code_values_are_the_quantiles_of_a_normal():
    quantile, end = NormalDist().inv_cdf, 0.9677083
    right = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    left = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    np.testing.assert_allclose(CODES, np.sort([*left, 0.0, *right]) / max(right), atol=1e-6)
    assert CODES[7] == 0 and CODES[0] == -1 and CODES[15] == 1


def test_codes_scales_and_values_are_those_of_bitsandbytes():
    node = quantise(jnp.asarray(GOLDEN["kernel"]), double=False)
    np.testing.assert_array_equal(CODES, GOLDEN["table"])
    np.testing.assert_array_equal(node.scale, GOLDEN["scale"])
    np.testing.assert_array_equal(node.codes & 15, GOLDEN["codes"][::2])
    np.testing.assert_array_equal(node.codes >> 4, GOLDEN["codes"][1::2])
    np.testing.assert_array_equal(node.dequantise(jnp.float32), GOLDEN["values"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 512), (3, 64, 12), (2, 56, 6)])
def test_error_is_bounded_by_block_and_code_and_a_stack_is_its_layers(shape):
    w = kernel(*shape)
    node = quantise(w)
    assert node.shape == shape and node.ndim == len(shape) and node.dequantise(jnp.bfloat16).dtype == jnp.bfloat16
    block = max(n for n in range(1, 65) if shape[-2] % n == 0)
    assert node.scale.shape == (*shape[:-2], shape[-2] // block, shape[-1])
    largest = np.abs(np.asarray(w).reshape(*shape[:-2], -1, block, shape[-1])).max(-2)
    gap = np.abs(np.asarray(node.scale.dequantise()) - largest)
    assert np.all(gap <= 0.5001 * np.repeat(node.scale.step, shape[-1] // node.scale.step.shape[-1], -1))
    bound = np.repeat(largest * np.diff(CODES).max() / 2 + gap, block, axis=-2)
    assert np.all(np.abs(np.asarray(node.dequantise(jnp.float32) - w)) <= bound + 1e-6)
    assert 0.05 < error(w, node).frobenius < 0.11
    if len(shape) == 3:
        for i in range(shape[0]):
            assert tiny.same(quantise(w[i]).codes, node.codes[i])
    vmapped = jax.vmap(lambda n: n.dequantise(jnp.float32))(node) if len(shape) == 3 else node.dequantise(jnp.float32)
    np.testing.assert_array_equal(vmapped, node.dequantise(jnp.float32))


def test_zeros_stay_zero_and_odd_inputs_are_refused():
    w = kernel(64, 8).at[:, 3].set(0)
    assert not np.any(quantise(w).dequantise(jnp.float32)[:, 3])
    with pytest.raises(ModelError, match="even"):
        quantise(kernel(7, 8))


def test_bytes_of_the_base():
    w = jax.ShapeDtypeStruct((2, 576, 1536), jnp.float32)  # SmolLM2's gate
    for double, want in ((True, 0.5 + 1 / 64 + 4 / 64 / 256), (False, 0.5 + 4 / 64)):
        node = jax.eval_shape(lambda x, double=double: quantise(x, double=double), w)
        assert tree.nbytes(node) / (4 * 2 * 576 * 1536) == pytest.approx(want / 4, abs=1e-4)
        assert tree.nbytes(node) <= 0.16 * tree.nbytes(w)


def test_axes_follow_every_part():
    shapes, axes = peft.base(tiny.case("linear_probe", "decoder").model)
    flat = tree.paths(quantise_axes(axes, "nf4"), is_leaf=lambda x: isinstance(x, tuple))
    for path, leaf in tree.paths(jax.eval_shape(lambda p: quantise_tree(p, "nf4"), shapes)).items():
        assert len(flat[path]) == leaf.ndim, path
    assert flat["layers/attn/q/kernel/scale/mean"] == ("layers",)


def test_sharded_blocks_are_dequantised_where_they_are():
    node, mesh = quantise(kernel(2, 256, 1024)), meshes.make_mesh("data:2,fsdp:2,tensor:2")
    names = axes_of(("layers", "embed", "mlp"))
    assert isinstance(names, NF4) and isinstance(names.scale, Scales)
    places = meshes.shardings(names, node, mesh)
    whole = jax.sharding.NamedSharding(mesh, meshes.partition_spec(("layers", "embed", "mlp"), node.shape, mesh))
    fn = jax.jit(lambda n: n.dequantise(jnp.float32), in_shardings=(places,), out_shardings=whole)
    here = meshes.shard(node, places)
    program = fn.lower(here).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert here.codes.addressable_shards[0].data.nbytes == node.codes.nbytes // 4
    np.testing.assert_array_equal(fn(here), node.dequantise(jnp.float32))
