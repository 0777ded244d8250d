import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import FlagError
from research.peft import tree
from research.peft.merge import merge
from research.quant.nf4 import NF4
from research.quant.tree import dequantise_tree, error, errors, is_quantised, quantise_tree
from tests import tiny

SGD = optax.chain(tiny.tap(), optax.sgd(0.1))
LORA = "lora:targets=all"


def test_unknown_kinds_and_targets_name_the_nearest():
    params = {"layers": {"q": {"kernel": jnp.ones((4, 4))}}}
    with pytest.raises(FlagError, match="unknown quantisation 'nf5'. Did you mean 'nf4'"):
        quantise_tree(params, "nf5")
    with pytest.raises(FlagError, match="Did you mean 'layers/q/kernel'"):
        quantise_tree(params, "nf4", "layers/k/kernel")


def test_error_is_its_definition():
    w = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    found = errors({"a": w}, {"a": jnp.asarray(w).at[1, 1].add(0.5)})["a"]
    np.testing.assert_allclose([found.max, found.frobenius], [0.5, 0.5 / np.linalg.norm(w)], rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        pytest.param(LORA, "decoder", marks=pytest.mark.slow),
        pytest.param("dora:targets=all", "decoder", marks=pytest.mark.slow),
        pytest.param("ia3", "decoder", marks=pytest.mark.slow),
        pytest.param("oft", "decoder", marks=pytest.mark.slow),
        pytest.param("houlsby", "encoder", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_an_nf4_base_is_one_on_the_dequantised(spec, family):
    """Scanned, jitted; three steps: QLoRA is LoRA on the rounded base."""
    case, results = tiny.case(spec, family), []
    codes = quantise_tree(case.point["params"], "nf4")
    assert sum(isinstance(x, NF4) for x in jax.tree.leaves(codes, is_leaf=is_quantised)) >= 6
    step = jax.jit(case.stepper(SGD))
    for params in (codes, dequantise_tree(codes)):
        case_mask = case.mask | {"params": tree.constant(params, False)}
        point = case.point | {"params": params}
        trainable, extra, frozen = tiny.state.split(point, case_mask)
        state, losses = tiny.state.create(trainable, SGD, jax.random.key(4), extra, case_mask), []
        for i in range(3):
            state, metrics = step(state, frozen, tiny.micro(tiny.batch(seed=i), 1))
            losses.append(metrics["loss"])
        results.append((jax.tree.leaves(state.trainable), losses))
    tiny.close(results[0], results[1], 1e-5)
    assert results[0][1][0] != results[0][1][2]


@pytest.mark.parametrize("kind, most", [("int8", 0.02), pytest.param("nf4", 0.13, marks=pytest.mark.slow)])
def test_merging_gives_a_float_kernel_with_the_quantisations_own_error(kind, most):
    case = tiny.case(LORA, "decoder")
    params = case.point["params"]
    codes = quantise_tree(params, kind)
    merged, exact = merge(case.point | {"params": codes}), merge(case.point)
    assert not any(map(is_quantised, jax.tree.leaves(merged["params"], is_leaf=is_quantised)))
    found, own = errors(exact["params"], merged["params"]), errors(params, codes)
    for path in found:
        inside = re.match(r"layers/.*/kernel", path)
        assert (0 < found[path].frobenius < most) if inside else found[path].max == 0, path
        np.testing.assert_allclose(found[path].max, own[path].max, atol=1e-5)


@pytest.mark.slow
def test_two_runs_share_an_nf4_base_under_vmap():
    case = tiny.case(LORA, "decoder")
    base, data = quantise_tree(case.point["params"], "nf4"), tiny.batch()
    fn = lambda added: case.loss({"params": base, "peft": added}, data, None).sum  # noqa: E731
    both = jax.tree.map(lambda x: jnp.stack([x, x]), case.point["peft"])
    alone = jax.jit(fn)(case.point["peft"])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(both), [alone, alone], rtol=1e-5)
    assert error(jnp.ones((4, 2)), jnp.ones((4, 2))).max == 0
