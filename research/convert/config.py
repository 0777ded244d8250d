"""Hugging Face `config.json` to our configs and back.

What a config asks for and the models here do not compute (yarn, biases on every LLaMA projection, a sliding window on
some layers only) is an error, never a model that is quietly different.
"""

from typing import Any

from research.errors import ModelError, did_you_mean
from research.models.bert import BertConfig
from research.models.llama import LlamaConfig
from research.models.registry import Config

Json = dict[str, Any]

FAMILIES = ("bert", "roberta", "llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
# Theirs to ours; the first of two names for one function is the one we write.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# What `transformers` assumes where a config.json is silent and the families differ.
_SILENT: dict[str, Json] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def config_from_hf(hf: Json) -> Config:
    """Returns our config for a parsed `config.json` of transformers 4 or 5.

    Raises ModelError: unknown `model_type`, a size missing, or a feature that the models here do not have.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"model_type {family!r} is not supported.{did_you_mean(str(family), FAMILIES)}")
    if hf.get("quantization_config"):
        _refuse(family, "quantization_config (weights already quantised)")
    try:
        return _bert(family, hf) if family in ("bert", "roberta") else _llama(family, _SILENT[family] | hf)
    except KeyError as e:
        raise ModelError(f"config.json of a {family} model has no {e.args[0]!r}.") from e
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise ModelError(f"config.json of a {family} model has a value that makes no sense ({e}).") from e


def _refuse(family: str, what: str) -> None:
    raise ModelError(f"{family} config asks for {what}, which is not supported.")


def _bert(family: str, hf: Json) -> BertConfig:
    if (kind := hf.get("position_embedding_type", "absolute")) != "absolute":
        _refuse(family, f"position_embedding_type {kind!r} (only 'absolute')")
    if hf.get("is_decoder"):
        _refuse(family, "is_decoder (only encoders)")
    if (activation := hf.get("hidden_act", "gelu")) not in ACTIVATIONS:
        _refuse(family, f"hidden_act {activation!r} (only {', '.join(ACTIVATIONS)})")
    pad = int(family == "roberta") if hf.get("pad_token_id") is None else hf["pad_token_id"]
    return BertConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        intermediate_size=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 512),
        type_vocab_size=hf.get("type_vocab_size", 2),
        # RoBERTa's first real token is at position padding_idx + 1; the rows before are counted in max_positions.
        position_offset=pad + 1 if family == "roberta" else 0,
        pooler=family == "bert",
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=ACTIVATIONS[activation],
        dropout=hf.get("hidden_dropout_prob", 0.1),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
        family=family,
        pad_token_id=pad,
    )


def _llama(family: str, hf: Json) -> LlamaConfig:
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        _refuse(family, f"hidden_act {hf['hidden_act']!r} (only 'silu')")
    for bias in ("attention_bias", "mlp_bias"):
        if hf.get(bias):
            _refuse(family, f"{bias} (only Qwen2's, on query, key and value)")
    heads, (theta, scaling) = hf["num_attention_heads"], _rope(family, hf)
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        intermediate_size=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_window(family, hf),
        family=family,
    )


def _rope(family: str, hf: Json) -> tuple[float, tuple | None]:
    """Returns (theta, scaling). transformers 5 keeps both in rope_parameters, 4 in rope_theta and rope_scaling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE:
        _refuse(family, f"rope type {kind!r} (only {', '.join(ROPE)})")
    if float(rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        _refuse(family, "partial_rotary_factor")
    return theta, (kind, *(rope[key] for key in ROPE[kind])) if ROPE[kind] else None


def _window(family: str, hf: Json) -> int | None:
    """The sliding window in tokens, the query's own included, or None. Qwen files name one even where it is off."""
    window = hf.get("sliding_window")
    if not window or family == "llama" or (family != "mistral" and not hf.get("use_sliding_window")):
        return None
    layers = hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or [
        "full_attention" if family != "mistral" and i < hf.get("max_window_layers", 28) else "sliding_attention"
        for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        _refuse(family, "a sliding window on some layers only")
    return window if kinds[0] == "sliding_attention" else None


def config_to_hf(config: Config) -> Json:
    """Returns what `config.json` says of the bare model, readable by transformers 4 and 5.

    Architecture, labels and token ids are for the caller to add (`export.export_hf`).
    """
    shared: Json = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "dtype": config.param_dtype,
    }
    if isinstance(config, BertConfig):
        return shared | {
            "max_position_embeddings": config.max_positions,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.norm_eps,
            "hidden_act": next(k for k, v in ACTIVATIONS.items() if v == config.activation),
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "pad_token_id": config.pad_token_id,
        }
    rope: Json = {"rope_type": "default"}
    if config.rope_scaling:
        kind, *values = config.rope_scaling
        rope = {"rope_type": kind} | dict(zip(ROPE[kind], values, strict=True))
    out = shared | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }
    if config.family == "mistral":
        out["sliding_window"] = config.sliding_window
    elif config.family in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        out |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        out["max_window_layers"] = 0 if windowed else config.num_layers
    return out
