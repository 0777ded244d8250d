"""GGUF reading, on small files that the `gguf` package writes."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.convert.gguf import GGUFSource, unpermute
from research.convert.hf import import_params
from research.convert.load import load
from research.errors import ModelError

GOLDEN = Path(__file__).parent.parent / "golden"
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TOKENS = ["<unk>", "<s>", "</s>", *"acst12Ġ", "at", "cat", "cats", "Ġcats", "<tool>"]
TYPES = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 11 + [gguf.TokenType.USER_DEFINED]
MERGES = ["a t", "c at", "cat s", "Ġ cats"]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter has it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(file: Path, name: str, architecture: str, change=None, tokenizer=None, theta=None, q8=(), factors=None):
    """Writes a golden model as GGUF: names, the permutation where llama.cpp has it, and metadata."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(theta or ropes.get("full_attention", ropes)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    for key, value in (tokenizer or {}).items():
        getattr(writer, f"add_{key}")(value)
    if change:
        change(writer)
    for key, value in load_file(GOLDEN / name / "model.safetensors").items():
        stem, suffix = key.rsplit(".", 1)
        if stem in TOP:
            target = TOP[stem]
        else:
            _, _, i, module = stem.split(".", 3)
            target = f"blk.{i}.{(GEMMA if architecture == 'gemma3' else LAYER)[module]}"
            if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                value = permute(value, 4 if "q_proj" in module else 2)
        if architecture == "gemma3" and stem.endswith("norm"):
            value = value + 1
        if target in q8:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{target}.{suffix}", gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.{suffix}", np.ascontiguousarray(value))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


TOKENIZER = {
    "tokenizer_model": "gpt2",
    "tokenizer_pre": "smollm",
    "token_list": TOKENS,
    "token_types": TYPES,
    "token_merges": MERGES,
    "unk_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
}


def test_permutation_and_its_inverse():
    # One head of 4 rows: llama.cpp keeps the pairs (0, 2), (1, 3) next to each other.
    assert unpermute(np.array([0, 2, 1, 3]), 1).tolist() == [0, 1, 2, 3]
    weight = np.random.default_rng(0).normal(size=(24, 5))
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 3), weight)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_same_parameters_as_the_hugging_face_files(name, tmp_path):
    architecture = "llama" if name == "mistral" else name  # llama.cpp has no architecture of Mistral's own
    file = write(tmp_path / "m.gguf", name, architecture, tokenizer=TOKENIZER)
    got, want = load(str(file)), load(str(GOLDEN / name))
    assert (got.fingerprint == want.fingerprint) == (name != "mistral")  # whose window a GGUF file does not carry
    same = {k: getattr(got.config, k) == getattr(want.config, k) for k in want.config.__dataclass_fields__}
    assert [k for k, v in same.items() if not v] == (["sliding_window", "family"] if name == "mistral" else [])


def test_quantised_tensors_are_dequantised(tmp_path):
    exact = GGUFSource(write(tmp_path / "a.gguf", "qwen2", "qwen2")).read("model.embed_tokens.weight")
    source = GGUFSource(write(tmp_path / "b.gguf", "qwen2", "qwen2", q8=["token_embd"]))
    got = source.read("model.embed_tokens.weight")
    assert got.dtype == np.float32 and got.shape == source.shapes["model.embed_tokens.weight"] == exact.shape
    error = np.abs(got - exact).max()
    assert 0 < error <= np.abs(exact).max() / 127


def test_llama3_scaling_is_read_from_its_tensor(tmp_path):
    # Wavelengths 6, 199, 6283 and 198692: kept below 8192/4, divided by 32 above 8192, blended between:
    # s = (8192/6283.2 - 1)/3 = 0.10127, and 1/((1 - s)/32 + s) = 7.7309.
    factors = np.array([1.0, 1.0, 7.7309, 32.0], np.float32)
    file = write(tmp_path / "a.gguf", "llama", "llama", theta=1e6, factors=factors)
    assert GGUFSource(file).config.rope_scaling == ("llama3", 32.0, 1.0, 4.0, 8192)
    file = write(tmp_path / "b.gguf", "llama", "llama", theta=1e6, factors=factors[::-1].copy())
    with pytest.raises(ModelError, match="rope_freqs.weight is not Llama 3.1's scaling"):
        GGUFSource(file)


def test_tokenizer_merges_digits_specials_and_template(tmp_path):
    tokenizer = load(str(write(tmp_path / "m.gguf", "llama", "llama", tokenizer=TOKENIZER))).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("cats cats12")["input_ids"]) == ["cats", "Ġcats", "1", "2"]
    assert tokenizer.decode(tokenizer("cats cats12")["input_ids"]) == "cats cats12"
    assert tokenizer("<s>cat</s>")["input_ids"] == [1, TOKENS.index("cat"), 2]
    assert tokenizer("cat<tool>")["input_ids"] == [TOKENS.index("cat"), TOKENS.index("<tool>")]
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*TOKENS[:3], "</s>")
    assert tokenizer.decode([1, TOKENS.index("cat"), 2], skip_special_tokens=True) == "cat"
    assert tokenizer.chat_template == TOKENIZER["chat_template"]


def test_bos_is_added_where_the_file_says_so(tmp_path):
    file = write(tmp_path / "m.gguf", "llama", "llama", tokenizer=TOKENIZER | {"add_bos_token": True})
    assert GGUFSource(file).tokenizer()("cat")["input_ids"] == [1, TOKENS.index("cat")]


def test_qwen_cuts_text_as_transformers_does(tmp_path):
    from transformers import Qwen2Tokenizer

    file = write(tmp_path / "m.gguf", "qwen2", "qwen2", tokenizer=TOKENIZER | {"tokenizer_pre": "qwen2"})
    ours = GGUFSource(file).tokenizer().backend_tokenizer
    theirs = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[]).backend_tokenizer
    text = "It's 1813,  a\n\n  cats'LL—caf\u00e9 e\u0301!? x_y\t\r\n end  "
    assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)
    assert ours.normalizer.normalize_str(text) == theirs.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer_model", "bert", "tokenizer model 'bert' is not supported"),
        ("tokenizer_pre", "smolm", "pre-tokenizer 'smolm'.*Did you mean 'smollm'"),
    ],
)
def test_unknown_tokenizers_are_refused(tmp_path, key, value, message):
    file = write(tmp_path / "m.gguf", "llama", "llama", tokenizer=TOKENIZER | {key: value})
    with pytest.raises(ModelError, match=message):
        load(str(file))


def test_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(ModelError, match="architecture 'phi3' is not supported. Valid: gemma3, llama, qwen2, qwen3"):
        GGUFSource(write(tmp_path / "m.gguf", "mistral", "phi3"))


def test_gemmas_norms_names_and_window(tmp_path):
    got, want = GGUFSource(write(tmp_path / "m.gguf", "gemma3", "gemma3")), load(str(GOLDEN / "gemma3"))
    params = import_params(got.config, got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, want.params)
    assert got.config.sliding_window == 5 and got.config.family == "gemma3_text"


SPM = {
    "tokenizer_model": "llama",
    "token_list": ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "<0xE4>", "a", "b", "c", "ab", "bc", "▁", "▁a", "cab"],
    "token_scores": [0.0] * 6 + [-9.0, -9.0, -9.0, -2.0, -1.0, -9.0, -3.0, -4.0],
    "token_types": [3, 3, 3, 2, 4, 6, *[1] * 8],
    "unk_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "add_bos_token": True,
    "add_space_prefix": False,
}


def test_sentencepiece_merges_by_score(tmp_path):
    tokenizer = GGUFSource(write(tmp_path / "m.gguf", "gemma3", "gemma3", tokenizer=SPM)).tokenizer()
    words = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])  # noqa: E731
    assert words("abc") == ["<bos>", "a", "bc"]  # bc has a better score than ab
    assert words("cab") == ["<bos>", "cab"] and words("cabc") == ["<bos>", "c", "a", "bc"]
    assert words("a ab\n\nc") == ["<bos>", "a", "▁", "ab", "\n\n", "c"]
    assert tokenizer.decode(tokenizer("a ab\n\nc")["input_ids"], skip_special_tokens=True) == "a ab\n\nc"


def test_linear_scaling_is_kept_and_yarn_refused(tmp_path):
    def scaling(kind):
        def change(writer):
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(4.0)

        return change

    file = write(tmp_path / "a.gguf", "mistral", "llama", scaling(gguf.RopeScalingType.LINEAR))
    assert GGUFSource(file).config.rope_scaling == ("linear", 4.0)
    file = write(tmp_path / "b.gguf", "mistral", "llama", scaling(gguf.RopeScalingType.YARN))
    with pytest.raises(ModelError, match="rope type 'yarn'"):
        GGUFSource(file)


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: d[:40], lambda d: b"", lambda d: b"x" + d[1:]]
)
def test_damaged_files_are_one_line(tmp_path, damage):
    file = write(tmp_path / "m.gguf", "llama", "llama", tokenizer=TOKENIZER)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match="not a whole GGUF file") as error:
        load(str(file))
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_reported(tmp_path):
    source = GGUFSource(write(tmp_path / "m.gguf", "qwen2", "qwen2"))
    del source.shapes["model.norm.weight"]
    source.shapes["blk.0.attn_sinks.weight"] = (4,)
    from research.convert import hf

    with pytest.raises(ModelError, match=r"1 names missing \(norm.weight\); 1 names unexpected \(blk.0.attn_sinks"):
        hf.import_params(source.config, source)


def test_scan_or_not_is_the_same_base(tmp_path):
    file = str(write(tmp_path / "m.gguf", "qwen3", "qwen3", tokenizer=TOKENIZER))
    a, b = load(file), load(file, scan=False)
    assert a.fingerprint == b.fingerprint
    assert jax.tree.structure(a.params) != jax.tree.structure(b.params)
