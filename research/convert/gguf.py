"""GGUF files: weights dequantised, presented under Hugging Face names; configuration and tokenizer from the metadata.

    blk.{i}.attn_q.weight   ->   model.layers.{i}.self_attn.q_proj.weight

llama.cpp rotates neighbouring pairs where Hugging Face rotates the two halves of a head, so its converter permutes the
rows of LLaMA's query and key. Here they are put back: forgetting it gives SmolLM2 a perplexity of 117 instead of 30.
"""

from pathlib import Path
from typing import Any

import numpy as np

from research.convert.config import config_from_hf
from research.errors import ModelError, did_you_mean
from research.models.llama import LlamaConfig
from research.nn.rope import frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before BPE, by `tokenizer.ggml.pre`: single digits and GPT-2's rule, or a rule of its own.
SPLITS = {
    "smollm": None,
    "qwen2": _QWEN_SPLIT,
    "llama-bpe": _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H*K, ...] from interleaved pairs (llama.cpp) to two halves a head (Hugging Face)."""
    rows, *rest = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


class GGUFSource:
    """A GGUF file as a source of weights (`hf.Source`), with `config` and `tokenizer()`.

    Raises ModelError: not a whole GGUF file, an architecture or a tokenizer that is not supported.
    """

    def __init__(self, path: Path | str):
        import gguf

        self.label = str(path)
        try:
            reader = gguf.GGUFReader(path)
            self.meta: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError, OverflowError, TypeError) as e:
            raise ModelError(f"{path}: not a whole GGUF file ({e}); fetch it again.") from e
        self.architecture = self.meta.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            hint = did_you_mean(str(self.architecture), ARCHITECTURES)
            raise ModelError(f"{path}: GGUF architecture {self.architecture!r} is not supported.{hint}")
        self._tensors = {self._name(t.name): t for t in reader.tensors if t.name != ROPE_FACTORS}
        # `shape` counts the fastest axis first; numpy and Hugging Face count it last.
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}
        factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
        self.config: LlamaConfig = self._config(factors)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, dequantised to float32, in Hugging Face's layout and row order."""
        import gguf

        tensor = self._tensors[name]
        value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self.architecture == "llama" and (heads := self._heads(name)):
            value = unpermute(value, heads)
        return value

    def _heads(self, name: str) -> int | None:
        module = name.split(".")[-2]
        return {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(module)

    @staticmethod
    def _name(name: str) -> str:
        """Their name, or the GGUF one where it has none (it is then reported as unexpected)."""
        stem, _, suffix = name.rpartition(".")
        if stem in _TOP:
            return f"{_TOP[stem]}.{suffix}"
        block, _, module = stem.partition(".")[2].partition(".")
        return f"model.layers.{block}.{_LAYER[module]}.{suffix}" if module in _LAYER else name

    def _config(self, rope_factors: np.ndarray | None) -> LlamaConfig:
        def get(key: str, default: Any = None) -> Any:
            value = self.meta.get(f"{self.architecture}.{key}", default)
            if value is None:
                raise ModelError(f"{self.label}: the metadata have no {self.architecture}.{key}.")
            # float32 metadata: 1e-5 arrives as 9.99999975e-06.
            return float(f"{value:.6g}") if isinstance(value, float) else value

        heads, width = get("attention.head_count"), get("embedding_length")
        kind = get("rope.scaling.type", "none")
        rope: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
        if rope_factors is not None:
            rope |= self._llama3(get("attention.key_length", width // heads), rope["rope_theta"], rope_factors)
        elif kind != "none":
            rope |= {"rope_type": kind, "factor": get("rope.scaling.factor", 1.0)}
        embedding = "model.embed_tokens.weight"
        return config_from_hf(
            {
                "model_type": self.architecture,
                "vocab_size": self.shapes[embedding][0] if embedding in self.shapes else get("vocab_size"),
                "hidden_size": width,
                "num_hidden_layers": get("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": get("attention.head_count_kv", heads),
                "head_dim": get("attention.key_length", width // heads),
                "intermediate_size": get("feed_forward_length"),
                "max_position_embeddings": get("context_length"),
                "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
                "rope_parameters": rope,
                "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            }
        )

    def _llama3(self, head_dim: int, theta: float, factors: np.ndarray) -> dict[str, Any]:
        """Llama 3.1's scaling, in GGUF a divisor a frequency; published models differ in `factor` alone."""
        factor = float(f"{factors.max():.6g}")
        scaling = ("llama3", factor, 1.0, 4.0, 8192)
        divisors = frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)
        if factors.shape != divisors.shape or not np.allclose(factors, divisors, rtol=1e-3):
            raise ModelError(f"{self.label}: {ROPE_FACTORS} is not Llama 3.1's scaling, the only one supported.")
        names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return dict(zip(names, scaling, strict=True))

    def tokenizer(self) -> Any:
        """Rebuilds the byte-level BPE tokenizer as a transformers.PreTrainedTokenizerFast, chat template included."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        get = {key.removeprefix("tokenizer."): value for key, value in self.meta.items()}.get
        kind, pre = get("ggml.model"), get("ggml.pre", "default")
        if kind != "gpt2":
            raise ModelError(f"{self.label}: GGUF tokenizer model {kind!r} is not supported. Valid: gpt2.")
        if pre not in SPLITS:
            raise ModelError(f"{self.label}: GGUF pre-tokenizer {pre!r} is not supported.{did_you_mean(pre, SPLITS)}")
        tokens, types = get("ggml.tokens", []), get("ggml.token_type", [])
        merges = [tuple(merge.split(" ", 1)) for merge in get("ggml.merges", [])]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # With ignore_merges a word that is a token is taken whole: Llama 3's vocabulary was cut from tiktoken ranks.
        bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
        if SPLITS[pre] is None:
            cut, rule = pre_tokenizers.Digits(individual_digits=True), True
        else:
            cut, rule = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"), False
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule)]
        )
        bpe.decoder = decoders.ByteLevel()
        if pre == "qwen2":
            bpe.normalizer = normalizers.NFC()
        for token, type_ in zip(tokens, types, strict=False):
            if type_ in (_CONTROL, _USER_DEFINED):
                bpe.add_tokens([AddedToken(token, special=type_ == _CONTROL, normalized=False)])
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        roles = {role: get(f"ggml.{name}_token_id") for name, role in names.items()}
        roles = {role: tokens[i] for role, i in roles.items() if i is not None and i < len(tokens)}
        if (bos := roles.get("bos_token")) and get("ggml.add_bos_token", pre == "llama-bpe"):
            template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, vocabulary[bos])]}
            bpe.post_processor = processors.TemplateProcessing(**template)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **roles)
        fast.chat_template = get("chat_template")
        return fast
