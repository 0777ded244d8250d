"""Soft prompts and attention methods: where they start, their formulas, their counts and what is kept of them."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.errors import FlagError, ModelError
from research.models.bert import BertConfig
from research.models.registry import build, preset
from research.nn.sites import Site
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.ipt import Intrinsic, autoencoded
from research.peft.llama_adapter import Adaption
from research.peft.prefix import PrefixMlp
from research.peft.prompt import VirtualTokens, prompt
from research.peft.ptuning import Encoder
from research.peft.spot import trained
from research.quant.tree import quantise_tree
from tests import tiny

BASE = {"name": "tiny", "fingerprint": "f" * 64}
TABLE = np.asarray(tiny.params(tiny.DECODER)["embed"]["tokens"]["embedding"])
WORDS = ["[CLS]", "[SEP]", "[UNK]", "good", "bad", "very", "film", "下", "面", "是"]


@functools.cache
def tokenizers() -> dict:
    """A tokenizer of words and Chinese characters that puts special tokens around a text, as both libraries have it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), characters])
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return {"tokenizers": plain, "transformers": PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")}


def fitted(spec: str, tokenizer=None, **changes) -> dict:
    """A fresh adapter on the tiny decoder."""
    case, method = tiny.case("prompt", "decoder", **changes), registry.parse(spec, tokenizer=tokenizer)
    variables = {
        "params": tiny.params(case.config),
        "peft": peft.init(method, jax.random.key(1), case.sites),
    }
    return method.fit(jax.random.key(3), variables, None, None) if method.fit else variables


def table(variables: dict, name: str = "prompt") -> np.ndarray:
    return np.asarray(variables["peft"]["embed"]["prompt"][name].table)


@functools.cache
def shapes(name: str):
    sizes = {"gpt2-medium": (1024, 24, 16), "bert-large": (1024, 24, 16), "d768": (768, 2, 12), "d1024": (1024, 2, 16)}
    d, layers, heads = sizes.get(name, (0, 0, 0))
    config = BertConfig(100, d, layers, heads, 4 * d) if d else preset(name)
    return peft.sites(build(config))


def counts(name: str, spec: str) -> tuple[int, int]:
    """Trained elements while it trains, and those of what is kept, both from shapes."""
    sites, method = shapes(name), registry.parse(spec)
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))
    kept = jax.eval_shape(lambda x: peft.realised(method, {"params": {}, "peft": x}, sites), added)
    variables = [{"params": {}, "peft": added}, kept]
    return tuple(tree.count(v, peft.mask(method, v)) for v in variables)


# ------------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_a_text_start_is_the_texts_embeddings_repeated_or_cut(library):
    tokenizer = tokenizers()[library]
    long, short = (table(fitted(f"prompt:start=text,length={n},text=very good film", tokenizer)) for n in (7, 2))
    np.testing.assert_array_equal(long, TABLE[[5, 3, 6, 5, 3, 6, 5]])
    np.testing.assert_array_equal(short, TABLE[[5, 3]])


def test_a_text_may_hold_commas_and_any_script():
    tokens = table(fitted("prompt:start=text,length=8,text=下面是。, good: 下", tokenizers()["transformers"]))
    np.testing.assert_array_equal(tokens, TABLE[[7, 8, 9, 2, 3, 2, 7, 7]])  # "。," and ":" are unknown


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_a_label_start_is_the_mean_of_each_name_then_vocabulary(library):
    tokens = table(fitted("prompt:start=labels,length=6,pool=10,labels=very bad | good", tokenizers()[library]))
    np.testing.assert_allclose(tokens[0], (TABLE[5] + TABLE[4]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(tokens[1], TABLE[3])
    rows = [int(np.abs(TABLE - t).sum(axis=1).argmin()) for t in tokens[2:]]
    np.testing.assert_array_equal(TABLE[rows], tokens[2:])
    assert len(set(rows)) == 4 and max(rows) < 10


def test_labels_may_fill_the_prompt():
    tokens = table(fitted("prompt:start=labels,length=2,labels=good|bad", tokenizers()["transformers"]))
    np.testing.assert_array_equal(tokens, TABLE[[3, 4]])


def test_the_start_is_found_beside_its_own_site():
    """Of a model with an embed site elsewhere, and on a quantised table."""
    node = VirtualTokens(jnp.zeros((2, 32)))
    params = {
        "left": {"embed": {"tokens": {"embedding": jnp.asarray(TABLE)}}},
        "right": {"embed": {"tokens": {"embedding": jnp.asarray(-TABLE)}, "prompts": {"tokens": jnp.zeros(3)}}},
    }
    method = prompt(2, "text", text="good bad", tokenizer=tokenizers()["tokenizers"])
    added = {side: {"embed": {"prompt": {"prompt": node, "other": node}}} for side in params}
    out = method.fit(jax.random.key(0), {"params": params, "peft": added}, None, None)["peft"]
    for side, sign in (("left", 1), ("right", -1)):
        here = out[side]["embed"]["prompt"]
        np.testing.assert_array_equal(here["prompt"].table, sign * TABLE[[3, 4]])
        assert not here["other"].table.any()
    shared = {"params": {"shared": {"tokens": {"embedding": jnp.asarray(TABLE)}}}, "peft": added}
    out = method.fit(jax.random.key(0), shared, None, None)["peft"]
    np.testing.assert_array_equal(out["right"]["embed"]["prompt"]["prompt"].table, TABLE[[3, 4]])


def test_a_start_on_an_int8_base():
    case = tiny.case("prompt", "decoder")
    params = quantise_tree(tiny.params(case.config))
    method = registry.parse("prompt:start=text,length=2,text=good bad", tokenizer=tokenizers()["tokenizers"])
    variables = {"params": params, "peft": peft.init(method, jax.random.key(1), case.sites)}
    tokens = table(method.fit(jax.random.key(3), variables, None, None))
    assert tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, TABLE[[3, 4]], atol=0.05)


REFUSED = {
    "prompt:start=text": "has no text: name one, such as text=",
    "prompt:start=text,text= ": "has no text",
    "prompt:text=good": "start=random does not use text=good: leave it out, or choose start=text",
    "prompt:start=vocab,labels=a|b": "start=vocab does not use labels",
    "prompt:start=labels": "empty name: name each class, as in labels=negative",
    "prompt:start=labels,labels=good||bad": "empty name",
    "prompt:start=labels,length=2,labels=a|b|c": "no token for each of the 3 labels: at least 3",
    "prompt:pool=10": "start=random does not use pool=10",
    "prompt:start=text,text=good,pool=10": "start=text does not use pool=10",
    "prompt:start=txt": "unknown start 'txt'. Did you mean 'text'",
    "prompt:tokenizer=x": "no option 'tokenizer'",
    "spot:length=0": "length=0 is out of range",
    "ptuning:length=0": "length=0 is out of range",
    "ptuning:hidden=0": "hidden=0 is out of range",
    "ptuning:encoder=gru": "unknown encoder 'gru'. Valid: lstm, mlp",
    "ptuning_v2:hidden=-1": "hidden=-1 is out of range",
    "ipt:code=0": "code=0 is out of range",
    "ipt:steps=10": "steps=10 is not used without sources",
    "ipt:sources=a||b": "empty name",
    "llama_adapter:length=0": "length=0 is out of range",
}  # fmt: skip


@pytest.mark.parametrize("spec", REFUSED)
def test_options_that_nothing_uses_are_refused(spec):
    with pytest.raises(FlagError, match=REFUSED[spec].replace("|", r"\|")) as caught:
        registry.parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompt:start=text,text=good", "need the model's tokenizer, and it has none. Valid: start=vocab"),
        ("prompt:start=labels,labels=good|bad", "need the model's tokenizer"),
        ("prompt:start=labels,labels=good|bad,pool=3", "more than the 3 vocabulary rows to draw from: at most 3"),
    ],
)
def test_what_only_fit_can_refuse(spec, message):
    with pytest.raises(FlagError, match=message):
        fitted(spec, tokenizers()["tokenizers"] if "pool" in spec else None)


def test_a_text_without_tokens_of_the_model():
    class Other:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return {"nothing": [], "foreign": [3, 64]}[text]

    for text in ("nothing", "foreign"):
        with pytest.raises(FlagError, match=f"'{text}' gives no tokens of this model"):
            fitted(f"prompt:start=text,text={text}", Other())
    method = registry.parse("prompt:start=vocab")
    with pytest.raises(FlagError, match="no token table.*start=random"):
        method.fit(jax.random.key(0), {"params": {}, "peft": fitted("prompt")["peft"]}, None, None)


# --------------------------------------------------------------------------------------------------------- SPoT and IPT


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Makes trained prompts: directory and table."""

    @functools.cache
    def make(spec: str = "prompt:length=4", seed: int = 1, **changes) -> tuple[Path, np.ndarray | None]:
        case = tiny.case(spec, "decoder", **changes)
        point = case.variables | {"peft": tiny.noise(case.variables["peft"], 0.3, seed)}
        directory = tmp_path_factory.mktemp("source") / "adapter"
        adapter.save(directory, spec, point, case.sites, BASE)
        prompts = peft.realised(case.method, point, case.sites)["peft"].get("embed")
        return directory, prompts and np.asarray(prompts["prompt"][spec.partition(":")[0]].table)

    return make


@pytest.mark.parametrize("spec", ["prompt:length=4", "ptuning:length=4"])
def test_spot_starts_from_a_trained_prompt(spec, source, tmp_path):
    directory, expected = source(spec)
    variables = fitted(f"spot:length=4,source={directory}")
    np.testing.assert_array_equal(table(variables, "spot"), expected)
    # The adapter that it becomes knows its source by name only.
    case = tiny.case("prompt:length=4", "decoder")
    name = f"spot:length=4,source={tmp_path / 'moved'}"
    adapter.save(tmp_path / "target", name, variables, case.sites, BASE)
    again = adapter.attach(adapter.load(tmp_path / "target"), variables["params"], case.sites, BASE["fingerprint"])
    assert tiny.same(again["peft"], variables["peft"])


def test_spot_without_a_source_trains_one():
    np.testing.assert_array_equal(table(fitted("spot"), "spot"), table(fitted("prompt:start=vocab")))


@pytest.mark.parametrize("spec", ["spot:length={},source={}", "ipt:length={},sources={}"])
def test_sources_that_do_not_fit(spec, source, tmp_path):
    directory, _ = source()
    with pytest.raises(FlagError, match="length=5 is not the length of the prompt in .*: choose length=4"):
        fitted(spec.format(5, directory))
    with pytest.raises(ModelError, match="is no adapter: .*no such directory"):
        fitted(spec.format(4, tmp_path / "nowhere"))
    other, _ = source("llama_adapter")
    with pytest.raises(ModelError, match="holds 0 prompts, not one"):
        fitted(spec.format(4, other))
    wide, _ = source("prompt:length=4", hidden_size=48)
    with pytest.raises(ModelError, match="of another base: its prompt is 48 wide, not 32"):
        fitted(spec.format(4, wide))
    registry.parse(spec.format(4, tmp_path / "nowhere"))  # nothing is read before `fit`


def test_a_chain_of_two_prompts_is_no_one_source(source, tmp_path):
    case = tiny.case("prompt:length=4+spot:length=4", "decoder")
    directory = tmp_path / "two"
    adapter.save(directory, case.spec, case.variables, case.sites, BASE)
    with pytest.raises(ModelError, match="holds 2 prompts, not one"):
        trained(directory, 4, 32)
    one, expected = source()
    chained = fitted(f"lora+spot:length=4,source={one}")["peft"]["embed"]["prompt"]["1_spot"].table
    np.testing.assert_array_equal(chained, expected)


def test_ipt_is_a_decoder_of_its_code():
    variables = fitted("ipt:length=3,code=4,hidden=5")
    node = variables["peft"]["reparam"]["ipt"]
    node = node.replace(b1=node.b1 + 0.3, b2=node.b2 - 0.2)
    z, w1, b1, w2, b2 = (np.asarray(x, np.float64) for x in (node.code, node.w1, node.b1, node.w2, node.b2))
    expected = np.tanh(z @ w1 + b1) @ w2.reshape(5, 96) + b2.ravel()
    np.testing.assert_allclose(node(), expected.reshape(3, 32), atol=1e-6)
    mask = peft.mask(registry.parse("ipt"), variables)["peft"]["reparam"]["ipt"]
    assert mask == Intrinsic(True, False, False, False, False)


def test_a_random_prompt_of_ipt_is_as_large_as_prompt_tunings():
    """tanh of N(0, 1/3) through U(-1/sqrt(hidden), 1/sqrt(hidden)): a third of E[tanh^2] = 0.22, where U(-0.5, 0.5)
    has 1/12."""
    std = float(jnp.std(fitted("ipt")["peft"]["reparam"]["ipt"]()))
    assert 0.2 < std < 0.35


def test_ipt_learns_to_decode_its_sources(source):
    sources = [source(seed=seed) for seed in (1, 2)]
    tables = np.stack([t for _, t in sources])
    spec = "ipt:length=4,code=4,hidden=16,steps={},sources=" + "|".join(str(d) for d, _ in sources)
    nodes = {steps: fitted(spec.format(steps))["peft"]["reparam"]["ipt"] for steps in (1, 600)}
    # The mean of two codes decodes to about what lies between the two prompts.
    far, near = (float(np.abs(nodes[steps]() - tables.mean(axis=0)).mean()) for steps in (1, 600))
    assert near < 0.2 * np.abs(tables[0] - tables[1]).mean() < far
    fresh = fitted("ipt:length=4,code=4,hidden=16")["peft"]["reparam"]["ipt"]
    for name in ("code", "w1", "b1", "w2", "b2"):
        assert not np.array_equal(getattr(fresh, name), getattr(nodes[600], name)), name
    one = autoencoded(jax.random.key(0), fresh, jnp.asarray(tables[:1]), 600)
    np.testing.assert_allclose(one(), tables[0], atol=0.02)


# ---------------------------------------------------------------------------------------- P-tuning, prefixes and LLaMA


def from_torch(arrays: dict) -> Encoder:
    """torch keeps kernels as [out, in], and the directions of a layer apart."""

    def both(layer: int, name: str) -> np.ndarray:
        ways = (arrays[f"lstm_head.{name}_l{layer}{way}"] for way in ("", "_reverse"))
        return np.stack([x.T for x in ways])

    names = {"w_in": "weight_ih", "w_state": "weight_hh", "b_in": "bias_ih", "b_state": "bias_hh"}
    layers = range(2) if "lstm_head.weight_ih_l0" in arrays else ()
    lstm = {str(i): {ours: both(i, theirs) for ours, theirs in names.items()} for i in layers}
    numbers = sorted({key.split(".")[1] for key in arrays if key.startswith("mlp_head")})
    head = {
        str(i): {"kernel": arrays[f"mlp_head.{n}.weight"].T, "bias": arrays[f"mlp_head.{n}.bias"]}
        for i, n in enumerate(numbers)
    }
    return jax.tree.map(jnp.asarray, Encoder(arrays["embedding.weight"], lstm, head))


@pytest.mark.parametrize("name", ["lama", "lstm", "mlp"])
def test_ptuning_is_torchs(name):
    with np.load(Path(__file__).parents[1] / "golden" / "ptuning.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    node, expected = from_torch(arrays), arrays["tokens"]
    np.testing.assert_allclose(node(), expected, atol=1e-6)
    for i in range(len(expected) - 1):  # each direction matters
        moved = node.replace(table=node.table.at[i].add(1.0))()
        assert (np.abs(moved - expected).max(axis=1) > 1e-5).sum() == (1 if name == "mlp" else len(expected))
    # Ours has the same arrays.
    options = {"lama": "lstm", "lstm": "lstm,hidden=4", "mlp": "mlp,hidden=4"}[name]
    site = Site("embed", (6,), ("embed",), jnp.zeros(()))
    added = peft.init(registry.parse(f"ptuning:length=5,encoder={options}"), jax.random.key(0), {"embed/prompt": site})
    ours = added["reparam"]["ptuning"]
    assert jax.tree.structure(ours) == jax.tree.structure(node)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, node)
    jax.tree.map(lambda a: np.testing.assert_array_less(0, np.abs(a).max()), ours)


COUNTS = [  # while it trains, and kept
    ("gpt2-medium", "prefix:length=5", 25_744_896, 245_760),
    ("gpt2-medium", "prefix:length=10", 25_750_016, 491_520),
    ("gpt2-medium", "prefix:length=5,hidden=0", 245_760, 245_760),
    ("bert-large", "ptuning_v2:length=20", 983_040, 983_040),
    ("bert-large", "ptuning_v2:length=128", 6_291_456, 6_291_456),
    # 20 * 1024 + 1024 * 512 + 512 + 512 * 24 * 2 * 1024 + 24 * 2 * 1024
    ("bert-large", "ptuning_v2:length=20,hidden=512", 25_760_256, 983_040),
    # the encoder of the LAMA experiments on 9 tokens
    ("d768", "ptuning", 8_278_272, 6_912),
    ("d1024", "ptuning", 14_707_712, 9_216),
    # HF PEFT on SmolLM2
    ("smollm2-135m", "ptuning:length=20,encoder=mlp", 1_008_576, 11_520),
    ("smollm2-135m", "ptuning:length=20,encoder=mlp,hidden=128", 176_192, 11_520),
    ("smollm2-135m", "ptuning:length=20,hidden=576", 15_293_376, 11_520),
    ("smollm2-135m", "llama_adapter", 172_830, 172_830),
    ("smollm2-135m", "llama_adapter:layers=20-29", 57_610, 57_610),
    ("smollm2-135m", "spot", 11_520, 11_520),
    ("smollm2-135m", "prompt:length=20", 11_520, 11_520),
    ("d768", "ipt:length=100", 250, 76_800),
]


@pytest.mark.parametrize(("name", "spec", "trained", "kept"), COUNTS)
def test_counts(name, spec, trained, kept):
    assert counts(name, spec) == (trained, kept)


def test_the_autoencoder_of_ipt_is_the_surveys_78m():
    """Its decoder, and a linear encoder from the 100 * 768 numbers of a prompt to the code."""
    added = jax.eval_shape(lambda: peft.init(registry.parse("ipt:length=100"), jax.random.key(0), shapes("d768")))
    decoder = tree.count(added) - 250
    assert decoder + 100 * 768 * 250 + 250 == 78_452_218


def test_ptuning_v2s_mlp_gives_keys_and_values_layer_by_layer():
    case = tiny.case("ptuning_v2:length=3,hidden=5", "decoder")
    added = peft.realised(case.method, case.point, case.sites)["peft"]
    mlp: PrefixMlp = case.point["peft"]["reparam"]["ptuning_v2"]
    e, w1, b1, w2, b2 = (np.asarray(x, np.float64) for x in (mlp.table, mlp.w1, mlp.b1, mlp.w2, mlp.b2))
    assert e.shape == (3, 32) and w1.shape == (32, 5)
    flat = np.tanh(e @ w1 + b1) @ w2 + b2
    expected = flat.reshape(3, 2, 2, 2, 8)  # P, layer, key or value, head, K
    node = added["layers"]["attn"]["kv"]["ptuning_v2"]
    np.testing.assert_allclose(node.k, expected[:, :, 0].swapaxes(0, 1), atol=1e-5)
    np.testing.assert_allclose(node.v, expected[:, :, 1].swapaxes(0, 1), atol=1e-5)
    assert added["embed"]["prompt"]["ptuning_v2"].by == 3 and "reparam" not in added


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_llama_adapter_is_a_second_softmax_behind_a_gate():
    rng = np.random.default_rng(0)
    p, q, y = (rng.normal(size=s).astype(np.float32) for s in ((3, 32), (2, 5, 4, 8), (2, 5, 32)))
    wk, wv = (rng.normal(size=(32, 16)).astype(np.float32) for _ in "kv")
    project = lambda h: tuple((h @ w).reshape(*h.shape[:-1], 2, 8) for w in (wk, wv))  # noqa: E731
    k, v = (np.repeat(a, 2, axis=1) for a in project(p))  # two queries share a key head
    probs = softmax(np.einsum("bthk,phk->bthp", q, k) / np.sqrt(8))
    expected = y + 0.7 * np.einsum("bthp,phk->bthk", probs, v).reshape(2, 5, 32)
    node = lambda gate: Adaption(jnp.asarray(p), jnp.full(1, gate))  # noqa: E731
    hook = lambda gate: node(gate).attended(jnp.asarray(q), jnp.asarray(y), y, project, None)  # noqa: E731
    np.testing.assert_allclose(hook(0.7), expected, atol=1e-5)
    np.testing.assert_array_equal(hook(0.0), y)


@pytest.mark.parametrize("spec", ["llama_adapter:layers=1", "prefix:hidden=8,length=3,layers=1"])
def test_only_the_arrays_of_chosen_layers_count(spec):
    case = tiny.case(spec, "decoder")
    name = spec.partition(":")[0]
    point = peft.realised(case.method, case.point, case.sites)
    here = point["peft"]["layers"]["attn"]["kv"][name]

    def moved(layer: int) -> np.ndarray:
        node = here.replace(node=jax.tree.map(lambda x: x.at[layer].add(1.0), here.node))
        return case.forward(point | {"peft": point["peft"] | {"layers": {"attn": {"kv": {name: node}}}}})

    output = case.forward(case.point)
    np.testing.assert_array_equal(moved(0), output)
    assert np.abs(moved(1) - output).max() > 1e-3


# ---------------------------------------------------------------------------------------------- what is kept, and (IA)3


@pytest.mark.parametrize("spec", ["ptuning:length=3", "ptuning:length=3,encoder=mlp", "ipt:length=3,code=4,hidden=8"])
def test_only_the_table_is_kept(spec, tmp_path):
    case = tiny.case(spec, "decoder")
    name = spec.partition(":")[0]
    adapter.save(tmp_path / "a", spec, case.point, case.sites, BASE)
    leaves = load_file(tmp_path / "a" / adapter.WEIGHTS)
    assert {k: x.shape for k, x in leaves.items()} == {f"peft/embed/prompt/{name}/table": (3, 32)}
    loaded = adapter.attach(adapter.load(tmp_path / "a"), case.point["params"], case.sites, BASE["fingerprint"])
    realised = peft.realised(case.method, case.point, case.sites)
    assert tiny.same(loaded["peft"], realised["peft"])
    assert tiny.same(peft.realised(case.method, loaded, case.sites), loaded)
    np.testing.assert_allclose(case.forward(loaded), case.forward(case.point), atol=1e-5)
    trained_leaves = tree.partition(loaded, peft.mask(case.method, loaded))[0]
    assert list(tree.paths(trained_leaves["peft"])) == [f"embed/prompt/{name}/table"]


def test_ia3_reaches_cross_attention_where_there_is_one():
    linear = lambda *shape: Site("linear", shape, ("embed", "heads"), jnp.zeros(()))  # noqa: E731
    names = ["attn/q", "attn/k", "attn/v", "attn/o", "cross_attn/q", "cross_attn/k", "cross_attn/v", "mlp/down"]
    sites = {f"layers_0/{name}": linear(4, 6) for name in names}
    added = peft.init(registry.parse("ia3"), jax.random.key(0), sites)
    found = {path: leaf.shape for path, leaf in tree.paths(added).items()}
    outputs = {f"layers_0/{a}/{x}/ia3/l": (6,) for a in ("attn", "cross_attn") for x in "kv"}
    assert found == outputs | {"layers_0/mlp/down/ia3/l": (4,)}


def test_the_cards():
    """The survey's words, where it knows the method."""
    said = {
        "prompt": ("2104.08691", "yes", "extra input"),
        "spot": ("2110.07904", "yes", "extra input"),
        "ipt": ("2110.07867", "yes", "extra FFN and input"),
        "ptuning": ("2103.10385", "yes", "extra input"),
        "ptuning_v2": ("2110.07602", "-", "-"),
        "prefix": ("2101.00190", "yes", "extra input"),
        "llama_adapter": ("2303.16199", "-", "-"),
        "ia3": ("2205.05638", "yes", "extra gating"),
    }
    for name, (paper, memory, inference) in said.items():
        card = importlib.import_module(f"research.peft.{name}").CARD
        assert card[:4] == (paper, "additive", memory, inference), name
