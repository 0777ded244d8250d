"""Hugging Face `config.json` to our configs and back.

What a config asks for and the models here do not compute (yarn, biases on every LLaMA projection, a sliding window on
some layers only) is an error, never a model that is quietly different.
"""

from research.convert import config_bloom, config_gemma, config_t5, config_vision
from research.convert.config_parts import ACTIVATIONS, Json, refuse, rope, rope_to_hf, their_activation
from research.errors import ModelError, did_you_mean
from research.models.bert import BertConfig
from research.models.bloom import BloomConfig
from research.models.clip import ClipConfig
from research.models.gemma import GemmaConfig
from research.models.gpt2 import Gpt2Config
from research.models.llama import LlamaConfig
from research.models.registry import Config
from research.models.t5 import T5Config
from research.models.vit import VitConfig

ARCHITECTURES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "gpt2": "GPT2",
    "bloom": "Bloom",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "t5": "T5",
    "vit": "ViT",
    "clip": "CLIP",
}
FAMILIES = tuple(ARCHITECTURES)
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
        refuse(family, "quantization_config (weights already quantised)")
    try:
        if family in ("bert", "roberta"):
            return _bert(family, hf)
        if family in ("gemma2", "gemma3_text"):
            return config_gemma.from_hf(family, hf)
        if family == "t5":
            return config_t5.from_hf(hf)
        if family == "bloom":
            return config_bloom.from_hf(hf)
        if family == "vit":
            return config_vision.vit_from_hf(hf)
        if family == "clip":
            return config_vision.clip_from_hf(hf)
        return _gpt2(hf) if family == "gpt2" else _llama(family, _SILENT[family] | hf)
    except KeyError as e:
        raise ModelError(f"config.json of a {family} model has no {e.args[0]!r}.") from e
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise ModelError(f"config.json of a {family} model has a value that makes no sense ({e}).") from e


def _bert(family: str, hf: Json) -> BertConfig:
    if (kind := hf.get("position_embedding_type", "absolute")) != "absolute":
        refuse(family, f"position_embedding_type {kind!r} (only 'absolute')")
    if hf.get("is_decoder"):
        refuse(family, "is_decoder (only encoders)")
    if (activation := hf.get("hidden_act", "gelu")) not in ACTIVATIONS:
        refuse(family, f"hidden_act {activation!r} (only {', '.join(ACTIVATIONS)})")
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


def _gpt2(hf: Json) -> Gpt2Config:
    if (activation := hf.get("activation_function", "gelu_new")) not in ACTIVATIONS:
        refuse("gpt2", f"activation_function {activation!r} (only {', '.join(ACTIVATIONS)})")
    if not hf.get("scale_attn_weights", True):
        refuse("gpt2", "scores that are not scaled (scale_attn_weights false)")
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if hf.get(option):
            refuse("gpt2", option)
    dropout = hf.get("resid_pdrop", 0.1)
    if hf.get("embd_pdrop", 0.1) != dropout:
        refuse("gpt2", f"embd_pdrop {hf.get('embd_pdrop', 0.1)} beside resid_pdrop {dropout} (only one rate for both)")
    return Gpt2Config(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        num_layers=hf["n_layer"],
        num_heads=hf["n_head"],
        intermediate_size=hf.get("n_inner") or 4 * hf["n_embd"],
        max_positions=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=ACTIVATIONS[activation],
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        dropout=dropout,
        attention_dropout=hf.get("attn_pdrop", 0.1),
    )


def _llama(family: str, hf: Json) -> LlamaConfig:
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse(family, f"hidden_act {hf['hidden_act']!r} (only 'silu')")
    for bias in ("attention_bias", "mlp_bias"):
        if hf.get(bias):
            refuse(family, f"{bias} (only Qwen2's, on query, key and value)")
    heads, (theta, scaling) = hf["num_attention_heads"], rope(family, hf)
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
        refuse(family, "a sliding window on some layers only")
    return window if kinds[0] == "sliding_attention" else None


def config_to_hf(config: Config) -> Json:
    """Returns what `config.json` says of the bare model, readable by transformers 4 and 5.

    Architecture, labels and token ids are for the caller to add (`export.export_hf`).
    """
    if isinstance(config, GemmaConfig):
        return config_gemma.to_hf(config)
    if isinstance(config, Gpt2Config):
        return _gpt2_to_hf(config)
    if isinstance(config, T5Config):
        return config_t5.to_hf(config)
    if isinstance(config, BloomConfig):
        return config_bloom.to_hf(config)
    if isinstance(config, VitConfig):
        return config_vision.vit_to_hf(config)
    if isinstance(config, ClipConfig):
        return config_vision.clip_to_hf(config)
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
            "hidden_act": their_activation(config.activation),
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "pad_token_id": config.pad_token_id,
        }
    scaling = rope_to_hf(config.rope_scaling)
    out = shared | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling else None,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
    }
    if config.family == "mistral":
        out["sliding_window"] = config.sliding_window
    elif config.family in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        out |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        out["max_window_layers"] = 0 if windowed else config.num_layers
    return out


def _gpt2_to_hf(config: Gpt2Config) -> Json:
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        # The family's own name of the function.
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else their_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "dtype": config.param_dtype,
    }
