"""`config.json` of ViT and CLIP, both ways, and what their files say of pixels and classes."""

import json
from pathlib import Path

from research.convert.config_parts import ACTIVATIONS, Json, refuse, their_activation
from research.errors import ModelError
from research.models.clip import ClipConfig, text_tower, vision_tower
from research.models.vit import VitConfig
from research.vision.preprocess import CLIP, HALF

# What `transformers` assumes where the configuration of a tower is silent.
_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
_TEXT = _TOWER | {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT |= {"max_position_embeddings": 77, "eos_token_id": 49407}
_VISION = _TOWER | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_channels": 3}
_VISION |= {"image_size": 224, "patch_size": 32}
_VIT = _VISION | {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
_VIT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vit_from_hf(hf: Json) -> VitConfig:
    """Our config of a ViT. ModelError for a feature that the model here does not have."""
    c = _VIT | hf
    if not c["qkv_bias"]:
        refuse("vit", "queries, keys and values without a bias (qkv_bias false)")
    classes = len(labels(hf)) or 2  # transformers' own default, which its files leave out
    bare = not any("ForImageClassification" in name for name in hf.get("architectures") or ())
    return VitConfig(
        *_image("vit", c),
        num_classes=0 if bare else classes,
        dropout=c["hidden_dropout_prob"],
        attention_dropout=c["attention_probs_dropout_prob"],
        norm_eps=c["layer_norm_eps"],
        activation=_activation("vit", c),
    )


def vit_to_hf(config: VitConfig) -> Json:
    """What `config.json` says of a ViT. ModelError where transformers has none like it."""
    parts = {
        f"pooling by {config.pooling}": config.pooling != "token",
        "convolutions in front of the patches": config.stem,
        "another start of its layers": config.pre_norm or not config.patch_bias,
    }
    if lacking := [what for what, there in parts.items() if there]:
        raise ModelError(f"transformers' ViT reads a class token: it has no place for {lacking[0]}.")
    names = [f"LABEL_{i}" for i in range(config.num_classes)]
    return (
        _image_to_hf(config)
        | {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification" if names else "ViTModel"],
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "qkv_bias": True,
            "dtype": config.param_dtype,
        }
        | (labelled(names) if names else {})
    )


def clip_from_hf(hf: Json) -> ClipConfig:
    """Our config of a CLIP. ModelError for a feature that the model here does not have."""
    # The first files say it all twice, and the second time counts.
    text, vision = (
        defaults | (hf.get(f"{name}_config") or {}) | (hf.get(f"{name}_config_dict") or {})
        for name, defaults in (("text", _TEXT), ("vision", _VISION))
    )
    return ClipConfig(
        text_tower(
            text["hidden_size"],
            text["num_hidden_layers"],
            text["num_attention_heads"],
            text["intermediate_size"],
            text["vocab_size"],
            text["max_position_embeddings"],
            attention_dropout=text["attention_dropout"],
            norm_eps=text["layer_norm_eps"],
            activation=_activation("clip", text),
        ),
        vision_tower(
            vision["hidden_size"],
            vision["num_hidden_layers"],
            vision["num_attention_heads"],
            vision["intermediate_size"],
            _side("clip", vision["patch_size"]),
            _side("clip", vision["image_size"]),
            channels=vision["num_channels"],
            attention_dropout=vision["attention_dropout"],
            norm_eps=vision["layer_norm_eps"],
            activation=_activation("clip", vision),
        ),
        projection=hf.get("projection_dim") or 512,
        eos_token_id=text["eos_token_id"],
        logit_scale=hf.get("logit_scale_init_value", 2.6592),
    )


def clip_to_hf(config: ClipConfig) -> Json:
    """What `config.json` says of a CLIP."""
    text, vision = config.text, config.vision
    return {
        "model_type": "clip",
        "projection_dim": config.projection,
        "logit_scale_init_value": config.logit_scale,
        "text_config": _sizes_to_hf(text)
        | {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_positions,
            "attention_dropout": text.attention_dropout,
            "eos_token_id": config.eos_token_id,
            "projection_dim": config.projection,
        },
        "vision_config": _image_to_hf(vision)
        | {
            "model_type": "clip_vision_model",
            "attention_dropout": vision.attention_dropout,
            "projection_dim": config.projection,
        },
        "dtype": config.param_dtype,
    }


def labels(hf: Json) -> tuple[str, ...]:
    """The class names of a `config.json`, in order; () where it has none."""
    named = {int(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
    return tuple(named[i] for i in sorted(named))


def labelled(names: list[str]) -> Json:
    """The inverse."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def pixels(directory: Path, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a pixel in [0, 1] as the model wants it: of preprocessor_config.json, or the
    family's own. ModelError for a file that is broken.
    """
    mean, std = CLIP if family == "clip" else HALF
    if not (file := directory / "preprocessor_config.json").exists():
        return mean, std
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("do_normalize", True) is False:
            return (0.0,), (1.0,)
        read = lambda key, own: tuple(float(x) for x in found.get(key) or own)  # noqa: E731
        return read("image_mean", mean), read("image_std", std)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: no preprocessing can be read from it ({error}).") from error


def _side(family: str, value: int | list[int]) -> int:
    """One number for both sides. ModelError where they differ."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        refuse(family, f"images or patches of sides {sorted(sides)} (only squares)")
    return int(sides.pop())


def _activation(family: str, c: Json) -> str:
    if c["hidden_act"] not in ACTIVATIONS:
        refuse(family, f"hidden_act {c['hidden_act']!r} (only {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[c["hidden_act"]]


def _image(family: str, c: Json) -> tuple[int, ...]:
    """The first fields of a VitConfig."""
    sizes = (c[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    return _side(family, c["image_size"]), _side(family, c["patch_size"]), c["num_channels"], *sizes


def _sizes_to_hf(config: VitConfig) -> Json:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": their_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
    }


def _image_to_hf(config: VitConfig) -> Json:
    sizes = {"image_size": config.image_size, "patch_size": config.patch, "num_channels": config.channels}
    return _sizes_to_hf(config) | sizes
