"""BLOOM's `config.json`, both ways."""

from research.convert.config_parts import Json, refuse
from research.models.bloom import BloomConfig


def from_hf(hf: Json) -> BloomConfig:
    """Our config. ModelError for a feature that the model here does not have."""
    if hf.get("apply_residual_connection_post_layernorm"):
        refuse("bloom", "apply_residual_connection_post_layernorm")
    width = hf.get("hidden_size") or hf["n_embed"]  # the name in the first files
    return BloomConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        num_layers=hf.get("n_layer") or hf["num_hidden_layers"],
        num_heads=hf.get("n_head") or hf["num_attention_heads"],
        intermediate_size=4 * width,
        max_positions=hf.get("seq_length") or 2048,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        dropout=hf.get("hidden_dropout", 0.0),
        attention_dropout=hf.get("attention_dropout", 0.0),
    )


def to_hf(config: BloomConfig) -> Json:
    """What `config.json` says, readable by transformers 4 and 5."""
    return {
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "dtype": config.param_dtype,
    }
