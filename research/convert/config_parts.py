"""What the configurations of several families share."""

from typing import Any

from research.errors import ModelError

Json = dict[str, Any]

# Theirs to ours; the first of two names for one function is the one we write.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
ACTIVATIONS |= {"quick_gelu": "quick_gelu"}
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def refuse(family: str, what: str) -> None:
    raise ModelError(f"{family} config asks for {what}, which is not supported.")


def rope(family: str, hf: Json) -> tuple[float, tuple | None]:
    """Returns (theta, scaling). transformers 5 keeps both in rope_parameters, 4 in rope_theta and rope_scaling."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE:
        refuse(family, f"rope type {kind!r} (only {', '.join(ROPE)})")
    if float(given.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse(family, "partial_rotary_factor")
    return theta, (kind, *(given[key] for key in ROPE[kind])) if ROPE[kind] else None


def rope_to_hf(scaling: tuple | None) -> Json:
    """The inverse for the scaling."""
    if scaling is None:
        return {"rope_type": "default"}
    kind, *values = scaling
    return {"rope_type": kind} | dict(zip(ROPE[kind], values, strict=True))


def their_activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
