"""What ViT and CLIP call their leaves in Hugging Face files."""

from research.convert.names_parts import Row, norm, pairs

# P are patches and the class token, I the pixels of a patch, C classes, E the width of CLIP's common space.
VIT = (
    Row("embed/patches/kernel", "embeddings.patch_embeddings.projection.weight", "I D", form="patches"),
    Row("embed/patches/bias", "embeddings.patch_embeddings.projection.bias", "D"),
    Row("embed/class_token", "embeddings.cls_token", "1 D", form="batched"),
    Row("embed/positions/embedding", "embeddings.position_embeddings", "P D", form="batched"),
    *norm("layers/attn_norm", "encoder.layer.{i}.layernorm_before"),
    *pairs("layers/attn/q", "encoder.layer.{i}.attention.attention.query", "D D", "D"),
    *pairs("layers/attn/k", "encoder.layer.{i}.attention.attention.key", "D D", "D"),
    *pairs("layers/attn/v", "encoder.layer.{i}.attention.attention.value", "D D", "D"),
    *pairs("layers/attn/o", "encoder.layer.{i}.attention.output.dense", "D D", "D"),
    *pairs("layers/mlp/up", "encoder.layer.{i}.intermediate.dense", "D F", "F"),
    *pairs("layers/mlp/down", "encoder.layer.{i}.output.dense", "F D", "D"),
    *norm("layers/mlp_norm", "encoder.layer.{i}.layernorm_after"),
    *norm("norm", "layernorm"),
)
VIT_HEAD = tuple(pairs("head", "classifier", "D C", "C", top=True))


def _tower(ours: str, theirs: str, last: str) -> list[Row]:
    """What CLIP's towers have in common."""
    block = f"{theirs}.encoder.layers.{{i}}"
    rows = [*norm(f"{ours}/layers/attn_norm", f"{block}.layer_norm1")]
    for x, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        rows += pairs(f"{ours}/layers/attn/{x}", f"{block}.self_attn.{name}", "D D", "D")
    rows += norm(f"{ours}/layers/mlp_norm", f"{block}.layer_norm2")
    rows += pairs(f"{ours}/layers/mlp/up", f"{block}.mlp.fc1", "D F", "F")
    rows += pairs(f"{ours}/layers/mlp/down", f"{block}.mlp.fc2", "F D", "D")
    return [*rows, *norm(f"{ours}/norm", f"{theirs}.{last}")]


CLIP = (
    Row("text/embed/tokens/embedding", "text_model.embeddings.token_embedding.weight", "V D"),
    Row("text/embed/positions/embedding", "text_model.embeddings.position_embedding.weight", "P D"),
    *_tower("text", "text_model", "final_layer_norm"),
    Row("vision/embed/class_token", "vision_model.embeddings.class_embedding", "1 D", form="flat"),
    Row("vision/embed/patches/kernel", "vision_model.embeddings.patch_embedding.weight", "I D", form="patches"),
    Row("vision/embed/positions/embedding", "vision_model.embeddings.position_embedding.weight", "P D"),
    *norm("vision/embed/norm", "vision_model.pre_layrnorm"),  # their spelling
    *_tower("vision", "vision_model", "post_layernorm"),
    *pairs("text_projection", "text_projection", "D E"),
    *pairs("visual_projection", "visual_projection", "D E"),
    Row("logit_scale", "logit_scale", ""),
)
