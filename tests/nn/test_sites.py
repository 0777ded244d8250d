"""What sites hand to their nodes, in the models themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.layers import apply_layers
from research.nn.param import dropout, training_rng
from research.nn.sites import AttentionNode, EmbedNode, OutputNode, ResidualNode, Virtual
from research.peft import tree
from tests import tiny

BOTH = [(family, scan) for family in tiny.CONFIGS for scan in (True, False)]
models = pytest.mark.parametrize(("family", "scan"), BOTH)


class Mean(OutputNode):
    """The mean of the layers' outputs, and the last one's share."""

    share: jax.Array
    trained = ("share",)

    def outputs(self, x, layers, embedded, mask, rng):
        return layers.mean(axis=0) * (1 - self.share) + x * self.share


class Spy(ResidualNode):
    """Replaces a sublayer's output by one of the things it may read."""

    which: jax.Array
    trained = ("which",)

    def residual(self, stream, x, y, norm, rng):
        return jnp.stack([stream, x, y, norm(stream + y)])[self.which]


class FromInput(AttentionNode):
    """Keys and values projected from the layer's own input, as VPT's are from its prompts."""

    size: jax.Array
    trained = ("size",)

    def keys_values(self, x, project):
        k, v = project(jnp.full((1, 1, x.shape[-1]), 0.3) * self.size)
        return Virtual(k[0], v[0], jnp.ones(1, bool))


class Two(EmbedNode):
    """Two virtual tokens, and a shift."""

    by: jax.Array
    trained = ("by",)

    def tokens(self):
        return jnp.zeros((2, 32))

    def shift(self):
        return self.by


def run(family, scan, added, **changes):
    case = tiny.case("linear_probe", family, scan=scan, **changes)
    return case.forward({"params": tiny.params(case.config), "peft": added})


def site_paths(family, scan):
    return tiny.case("linear_probe", family, scan=scan).sites


@models
def test_every_kind_is_recorded(family, scan):
    sites = site_paths(family, scan)
    kinds = {path.removeprefix("layers/").removeprefix("layers_0/"): site for path, site in sites.items()}
    expected = {
        "attn/q": ("linear", (32, 32), ("embed", "heads")),
        "attn/k": ("linear", (32, 32 if family == "encoder" else 16), ("embed", "kv_heads")),
        "attn/o": ("linear", (32, 32), ("heads", "embed")),
        "mlp/up": ("linear", (32, 56), ("embed", "mlp")),
        "mlp/down": ("linear", (56, 32), ("mlp", "embed")),
        "attn/kv": ("attention", (4 if family == "encoder" else 2, 8), ("kv_heads", None)),
        "attn_residual": ("residual", (32,), ("embed",)),
        "mlp_residual": ("residual", (32,), ("embed",)),
        "embed/prompt": ("embed", (32,), ("embed",)),
        "outputs": ("output", (2, 32), (None, "embed")),
    }
    for path, told in expected.items():
        assert (kinds[path].kind, kinds[path].shape, kinds[path].axes) == told, path
    assert all(s.stack.shape == ((2,) if p.startswith("layers/") else ()) for p, s in sites.items())
    assert sum(s.kind == "residual" for s in sites.values()) == (2 if scan else 4)


@models
def test_an_output_node_gets_every_layers_output(family, scan):
    only = [run(family, scan, {"outputs": {"mean": Mean(share=jnp.asarray(s))}}) for s in (0.0, 1.0)]
    base = run(family, scan, {})
    np.testing.assert_allclose(only[1], base, atol=1e-6)
    # The same two outputs by cutting the stack: a residual that adds nothing leaves a layer out.
    first = tiny.case("linear_probe", family, scan=False, num_layers=1)
    params = {
        k: v for k, v in tiny.params(tiny.case("linear_probe", family, scan=False).config).items() if k != "layers_1"
    }
    if family == "encoder":
        np.testing.assert_allclose(only[0], (first.forward({"params": params}) + base) / 2, atol=1e-5)
    else:
        assert np.abs(only[0] - base).max() > 1e-2


@models
@pytest.mark.parametrize("place", ["attn_residual", "mlp_residual"])
def test_a_residual_node_gets_stream_input_and_output(family, scan, place):
    def replaced(which):
        node = Spy(which=jnp.asarray([which, 2]) if scan else jnp.asarray(which))
        added = {"layers": {place: {"spy": node}}} if scan else {"layers_0": {place: {"spy": node}}}
        return run(family, scan, added)

    outputs = [replaced(which) for which in range(4)]
    np.testing.assert_allclose(outputs[2], run(family, scan, {}), atol=1e-5)
    same = lambda i, j: np.array_equal(outputs[i], outputs[j])  # noqa: E731
    assert same(0, 1) == (family == "encoder"), "a post-LN sublayer reads the stream itself"
    assert not same(0, 2) and not same(3, 2) and not same(3, 0)


@models
def test_an_attention_node_may_use_the_layers_own_projections(family, scan):
    def added(size, scan):
        node = {"attn": {"kv": {"own": FromInput(size=jnp.full(2, size) if scan else jnp.asarray(size))}}}
        return {"layers": node} if scan else {"layers_0": node, "layers_1": node}

    outputs = [run(family, scan, added(size, scan)) for size in (1.0, 3.0)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    np.testing.assert_allclose(run(family, not scan, added(1.0, not scan)), outputs[0], atol=1e-5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_virtual_tokens_take_the_first_positions_and_are_cut_off(family):
    plain, shifted = (run(family, True, {"embed": {"prompt": {"two": Two(by=jnp.asarray(n))}}}) for n in (0, 5))
    assert plain.shape == run(family, True, {}).shape
    moved = np.abs(plain - shifted).max()
    assert moved > 1e-3 if family == "encoder" else moved < 1e-4, "rotary embedding sees distances alone"


class Noise(nn.Module):
    """A layer whose output is its dropout mask."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dropout(jnp.ones_like(x), 0.5, training_rng(self))


class Stack(nn.Module):
    """Three of them."""

    num_layers: int
    scan: bool
    remat: str

    def setup(self) -> None:
        self.layers = Noise() if self.scan else [Noise() for _ in range(self.num_layers)]

    def __call__(self, x: jax.Array) -> tuple:
        return apply_layers(self.layers, self, x, collect=True)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_draw_their_own_dropout_and_all_outputs_are_collected(scan, remat):
    x = jnp.ones((2, 3, 8))
    last, layers = Stack(3, scan, remat).apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert layers.shape == (3, 2, 3, 8)
    np.testing.assert_array_equal(layers[-1], last)
    assert len({layer.tobytes() for layer in np.asarray(layers)}) == 3


def test_a_site_without_nodes_costs_nothing():
    case, data = tiny.case("linear_probe", "encoder"), tiny.batch()
    program = lambda v: str(jax.make_jaxpr(lambda v: case.model.apply(v, data["tokens"], data["mask"]))(v))  # noqa: E731
    params = tiny.params(case.config)
    assert program({"params": params}) == program({"params": params, "peft": {}})
    assert tree.count(case.variables["peft"]) == 0
