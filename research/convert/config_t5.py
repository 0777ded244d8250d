"""T5's `config.json`, both ways."""

from research.convert.config_parts import Json, refuse
from research.models.t5 import T5Config


def from_hf(hf: Json) -> T5Config:
    """Our config. ModelError for a feature that the model here does not have."""
    # Files of transformers 5 say "tied" of every T5; whether one is shows in its weights (`load`).
    tied, kind = hf.get("tie_word_embeddings", True), hf.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        refuse("t5", f"feed_forward_proj {kind!r} (only 'relu', 'gated-gelu')")
    return T5Config(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["d_model"],
        num_layers=hf["num_layers"],
        num_decoder_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        num_heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        intermediate_size=hf["d_ff"],
        gated=kind == "gated-gelu",
        tie_embeddings=bool(tied),
        scale_outputs=bool(hf.get("scale_decoder_outputs", tied)),
        buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        dropout=hf.get("dropout_rate", 0.1),
        start_token_id=hf.get("decoder_start_token_id") or hf.get("pad_token_id") or 0,
        max_positions=hf.get("n_positions", 512),
    )


def to_hf(config: T5Config) -> Json:
    """What `config.json` says, readable by transformers 4 and 5."""
    return {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "decoder_start_token_id": config.start_token_id,
        "n_positions": config.max_positions,
        "is_encoder_decoder": True,
        "dtype": config.param_dtype,
    }
