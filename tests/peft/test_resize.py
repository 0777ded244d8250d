"""Tokens added to a vocabulary: what the rows are, what stays, and how adapters trained before come along."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.fingerprint import fingerprint
from research.errors import FlagError, ModelError
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.resize import add_tokens, carry
from research.quant.tree import quantise_tree
from tests import tiny

TIED = dataclasses.replace(tiny.DECODER, tie_embeddings=True)
CONFIGS = {"encoder": tiny.ENCODER, "decoder": tiny.DECODER, "tied": TIED}
NEW = 3


@pytest.mark.parametrize("name", CONFIGS)
def test_new_rows_are_the_mean_and_old_ones_stay(name):
    config = CONFIGS[name]
    params = tiny.params(config)
    more, new = add_tokens(params, config, NEW)
    assert new == dataclasses.replace(config, vocab_size=tiny.VOCAB + NEW) and config.vocab_size == tiny.VOCAB
    assert jax.tree.structure(more) == jax.tree.structure(params)
    changed = set()
    for path, leaf in tree.paths(more).items():
        old = tree.paths(params)[path]
        if leaf is old:
            continue
        changed.add(path)
        axis = 1 if path.startswith("lm_head") else 0
        rows, before = np.moveaxis(np.asarray(leaf), axis, 0), np.moveaxis(np.asarray(old), axis, 0)
        np.testing.assert_array_equal(rows[: tiny.VOCAB], before)
        np.testing.assert_allclose(rows[tiny.VOCAB :], np.tile(before.mean(axis=0), (NEW, 1)), atol=1e-6)
    assert changed == {"embed/tokens/embedding"} | ({"lm_head/kernel"} if name == "decoder" else set())
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(jnp.shape, peft.base(build(new))[0])


@pytest.mark.parametrize("name", ["decoder", "tied"])
def test_old_logits_stay_and_new_tokens_are_no_likelier_than_one_in_v(name):
    config, data = CONFIGS[name], tiny.batch()
    params = tiny.params(config)
    more, new = add_tokens(params, config, NEW)

    def run(params: dict, config: LlamaConfig) -> jax.Array:
        apply = lambda p: build(config).apply({"params": p}, data["tokens"], data["mask"], method="logits")  # noqa: E731
        return jax.jit(apply)(params)

    logits = [run(params, config), run(more, new)]
    np.testing.assert_allclose(logits[1][..., : tiny.VOCAB], logits[0], atol=1e-5)
    assert np.all(jax.nn.softmax(logits[1])[..., tiny.VOCAB :] <= 1 / tiny.VOCAB + 1e-6)


def test_drawn_rows_differ_a_little_and_only_with_a_key():
    table = lambda rng: np.asarray(  # noqa: E731
        add_tokens(tiny.params(TIED), TIED, NEW, rng)[0]["embed"]["tokens"]["embedding"], np.float64
    )
    plain, drawn = table(None)[tiny.VOCAB :], table(jax.random.key(0))[tiny.VOCAB :]
    assert np.ptp(plain, axis=0).max() == 0 and np.ptp(drawn, axis=0).min() > 0
    spread = table(None)[: tiny.VOCAB].std(axis=0)
    assert np.abs((drawn - plain) / spread).max() < 0.05
    np.testing.assert_array_equal(drawn, table(jax.random.key(0))[tiny.VOCAB :])
    assert not np.array_equal(drawn, table(jax.random.key(1))[tiny.VOCAB :])


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("lora", "encoder"),
        ("lora+trainable_tokens:rows=5|60", "decoder"),
        ("full", "decoder"),
        ("full", "tied"),
        ("fishmask:fraction=0.02,batches=1", "tied"),
    ],
)
def test_adapters_trained_before_come_along(spec, name, tmp_path):
    config = CONFIGS[name]
    method, model, params = registry.parse(spec), build(config), tiny.params(config)
    sites = peft.sites(model)
    variables = {"params": params, "peft": peft.init(method, jax.random.key(0), sites)}
    if method.fit:
        marks = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape) < 0.1, params)
        node = variables["peft"]["reparam"]["fishmask"].replace(chosen=marks)
        variables["peft"] = {"reparam": {"fishmask": node}}
    mask = peft.mask(method, variables)
    variables = jax.tree.map(
        lambda new, old, m: jnp.where(m, new, old) if tree.trains(m) else old, tiny.noise(variables), variables, mask
    )
    before = fingerprint(params, config)
    adapter.save(tmp_path / "a", spec, variables, sites, {"name": "tiny", "fingerprint": before})
    loaded = adapter.load(tmp_path / "a")

    more, new = add_tokens(params, config, NEW)
    after, resized = fingerprint(more, new), build(new)
    assert after != before
    with pytest.raises(ModelError, match="load that base"):
        adapter.attach(loaded, more, peft.sites(resized), after)
    carried = carry(loaded, more, before, after)
    assert loaded.meta["base"]["fingerprint"] == before, "nothing it is given changes"
    there = adapter.attach(carried, more, peft.sites(resized), after)

    trained = peft.realised(method, variables, sites)
    for path, leaf in tree.paths(there["params"]).items():
        old = tree.paths(trained["params"])[path]
        cut = tuple(slice(0, n) for n in old.shape)
        np.testing.assert_array_equal(leaf[cut], old, err_msg=path)
        beyond = tree.paths(more)[path]
        if leaf.shape != old.shape:
            axis = 1 if path.startswith("lm_head") else 0
            np.testing.assert_array_equal(
                np.take(leaf, range(tiny.VOCAB, tiny.VOCAB + NEW), axis),
                np.take(beyond, range(tiny.VOCAB, tiny.VOCAB + NEW), axis),
            )
    assert tiny.same(there["peft"], adapter.attach(loaded, params, sites, before)["peft"])
    assert carry(carried, more, before, after) is carried
    # and saved again it is an adapter of the new base
    if spec != "fishmask:fraction=0.02,batches=1":
        adapter.save(tmp_path / "b", spec, there, peft.sites(resized), carried.meta["base"])
        again = adapter.attach(adapter.load(tmp_path / "b"), more, peft.sites(resized), after)
        assert tiny.same(again, there)


def test_what_is_refused(tmp_path):
    params = tiny.params(TIED)
    for n in (0, -1):
        with pytest.raises(FlagError, match=f"n={n} is out of range: the least value is 1"):
            add_tokens(params, TIED, n)
    with pytest.raises(ModelError, match="has 64 tokens, the configuration has 65"):
        add_tokens(params, dataclasses.replace(TIED, vocab_size=65), 1)
    with pytest.raises(ModelError, match="tokens/embedding is quantised"):
        add_tokens(quantise_tree(params, targets=".*embedding"), TIED, 1)
    with pytest.raises(ModelError, match="no token table"):
        add_tokens({"layers": params["layers"]}, TIED, 1)
    case = tiny.case("lora", "encoder")
    adapter.save(tmp_path / "a", "lora", case.variables, case.sites, {"name": "tiny", "fingerprint": "f" * 64})
    with pytest.raises(ModelError, match="trained on base tiny .ffffffffffff.*not on the one"):
        carry(adapter.load(tmp_path / "a"), params, "a" * 64, "b" * 64)
