"""GGUF files: weights dequantised, presented under Hugging Face names; configuration and tokenizer from the metadata.

    blk.{i}.attn_q.weight   ->   model.layers.{i}.self_attn.q_proj.weight

llama.cpp rotates neighbouring pairs where Hugging Face rotates the two halves of a head, so its converter permutes the
rows of LLaMA's query and key. Here they are put back: forgetting it gives SmolLM2 a perplexity of 117 instead of 30.
Gemma's norms are stored with 1 added, which is taken off.
"""

from pathlib import Path
from typing import Any

import numpy as np

from research.convert import gguf_tokenizer
from research.convert.config import Config, config_from_hf
from research.errors import ModelError, did_you_mean
from research.nn.rope import frequencies

# Theirs to ours.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

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
_GEMMA = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"


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
        self.config: Config = self._config(factors)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns one tensor, dequantised to float32, in Hugging Face's layout and row order, or a part of it."""
        import gguf

        tensor = self._tensors[name]
        value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self.architecture == "llama" and (heads := self._heads(name)):
            value = unpermute(value, heads)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            value = value - 1.0  # the file has the 1 of Gemma's 1 + w in it
        return value[index]

    def _heads(self, name: str) -> int | None:
        module = name.split(".")[-2]
        return {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(module)

    def _name(self, name: str) -> str:
        """Their name, or the GGUF one where it has none (it is then reported as unexpected)."""
        stem, _, suffix = name.rpartition(".")
        if stem in _TOP:
            return f"{_TOP[stem]}.{suffix}"
        block, _, module = stem.partition(".")[2].partition(".")
        layer = _GEMMA if self.architecture == "gemma3" else _LAYER
        return f"model.layers.{block}.{layer[module]}.{suffix}" if module in layer else name

    def _config(self, rope_factors: np.ndarray | None) -> Config:
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
                "model_type": ARCHITECTURES[self.architecture],
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
            | ({"sliding_window": get("attention.sliding_window")} if self.architecture == "gemma3" else {})
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
        """The file's tokenizer as a transformers.PreTrainedTokenizerFast, chat template included."""
        return gguf_tokenizer.build(self.meta, self.label)
