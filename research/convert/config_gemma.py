"""Gemma 2's and Gemma 3's `config.json`, both ways."""

from research.convert.config_parts import Json, refuse, rope, rope_to_hf
from research.models.gemma import GemmaConfig

# What `transformers` assumes where a config.json is silent.
_SILENT: dict[str, Json] = {
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 4096,
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
    },
}  # fmt: skip


def from_hf(family: str, hf: Json) -> GemmaConfig:
    """Our config. ModelError for a feature that the model here does not have."""
    hf = _SILENT[family] | {"head_dim": 256, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256} | hf
    if (act := hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        refuse(family, f"hidden_activation {act!r} (only 'gelu_pytorch_tanh')")
    for feature in ("attention_bias", "use_bidirectional_attention"):
        if hf.get(feature):
            refuse(family, feature)
    if not hf.get("tie_word_embeddings", True):
        refuse(family, "an output that is not the token table")
    third, layers = family == "gemma3_text", hf["num_hidden_layers"]
    pattern = _pattern(family, hf, 6 if third else 2)
    # transformers 5 has one set of parameters for each kind of layer, 4 one theta more.
    ropes = hf.get("rope_parameters") or {}
    whole = hf | {"rope_parameters": ropes.get("full_attention", ropes if "rope_type" in ropes else None)}
    theta, scaling = rope(family, whole)
    local = ropes.get("sliding_attention", {}).get("rope_theta") or hf.get("rope_local_base_freq") or theta
    return GemmaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=layers,
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        intermediate_size=hf["intermediate_size"],
        query_scale=float(hf["query_pre_attn_scalar"]),
        max_positions=hf["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        local_theta=float(local),
        sliding_window=hf["sliding_window"],
        pattern=pattern,
        norm_eps=hf["rms_norm_eps"],
        qk_norm=third,
        attention_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
        family=family,
    )


def _pattern(family: str, hf: Json, usual: int) -> int:
    """Every so manieth layer sees everything."""
    kinds, given = hf.get("layer_types"), hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or usual
    if kinds is None:
        return given
    pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((i + 1) % pattern == 0) for i, kind in enumerate(kinds)):
        refuse(family, "full attention in layers that are not every so manieth one (layer_types)")
    return given if pattern > len(kinds) and given > len(kinds) else pattern


def to_hf(config: GemmaConfig) -> Json:
    """What `config.json` says, readable by transformers 4 and 5."""
    third, c = config.family == "gemma3_text", config
    kinds = ["full_attention" if (i + 1) % c.pattern == 0 else "sliding_attention" for i in range(c.num_layers)]
    whole = rope_to_hf(c.rope_scaling) | {"rope_theta": c.rope_theta}
    near = {"rope_type": "default", "rope_theta": c.local_theta}
    return {
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "query_pre_attn_scalar": c.query_scale,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": True,
        "sliding_window": c.sliding_window,
        "sliding_window_pattern": c.pattern,
        "layer_types": kinds,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.final_softcap,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_to_hf(c.rope_scaling) if c.rope_scaling else None,
        "rope_parameters": {"full_attention": whole, "sliding_attention": near} if third else whole,
        "dtype": c.param_dtype,
    } | ({"rope_local_base_freq": c.local_theta} if third else {})
