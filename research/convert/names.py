"""What Hugging Face calls each leaf: one table of names and shapes a family, read in both directions.

    ours (config.scan)            theirs                                          shape here
    layers/attn/q/kernel          model.layers.{i}.self_attn.q_proj.weight        [L, D, H*K], theirs [H*K, D] a layer

Kernels are `[in, out]` here and `[out, in]` there, so every leaf called `kernel` is transposed, but for GPT-2's, whose
Conv1D has them as here. Where they fuse q, k and v in one tensor, three leaves of ours are parts of it. A patch
embedding is a convolution there, [D, C, P, P], and one kernel [P*P*C, D] here; tokens and tables may have other ranks.
"""

import re

import numpy as np

from research.convert.config import Config
from research.convert.names_parts import Row, fused, norm, pairs
from research.convert.names_vision import CLIP, VIT, VIT_HEAD
from research.models.bert import BertConfig
from research.models.bloom import BloomConfig
from research.models.clip import ClipConfig
from research.models.gemma import GemmaConfig
from research.models.gpt2 import Gpt2Config
from research.models.t5 import T5Config
from research.models.vit import VitConfig

BERT = (
    Row("embed/tokens/embedding", "embeddings.word_embeddings.weight", "V D"),
    Row("embed/positions/embedding", "embeddings.position_embeddings.weight", "P D"),
    Row("embed/types/embedding", "embeddings.token_type_embeddings.weight", "S D"),
    *norm("embed/norm", "embeddings.LayerNorm"),
    *pairs("layers/attn/q", "encoder.layer.{i}.attention.self.query", "D D", "D"),
    *pairs("layers/attn/k", "encoder.layer.{i}.attention.self.key", "D D", "D"),
    *pairs("layers/attn/v", "encoder.layer.{i}.attention.self.value", "D D", "D"),
    *pairs("layers/attn/o", "encoder.layer.{i}.attention.output.dense", "D D", "D"),
    *norm("layers/attn_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *pairs("layers/mlp/up", "encoder.layer.{i}.intermediate.dense", "D F", "F"),
    *pairs("layers/mlp/down", "encoder.layer.{i}.output.dense", "F D", "D"),
    *norm("layers/mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
)
BERT_POOLER = tuple(pairs("pooler", "pooler.dense", "D D", "D"))

# Q is H*K, G the key and value heads' H*K, K one head's size.
LLAMA = (
    Row("embed/tokens/embedding", "embed_tokens.weight", "V D"),
    Row("layers/attn_norm/scale", "layers.{i}.input_layernorm.weight", "D"),
    *pairs("layers/attn/q", "layers.{i}.self_attn.q_proj", "D Q"),
    *pairs("layers/attn/k", "layers.{i}.self_attn.k_proj", "D G"),
    *pairs("layers/attn/v", "layers.{i}.self_attn.v_proj", "D G"),
    *pairs("layers/attn/o", "layers.{i}.self_attn.o_proj", "Q D"),
    Row("layers/mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight", "D"),
    *pairs("layers/mlp/gate", "layers.{i}.mlp.gate_proj", "D F"),
    *pairs("layers/mlp/up", "layers.{i}.mlp.up_proj", "D F"),
    *pairs("layers/mlp/down", "layers.{i}.mlp.down_proj", "F D"),
    Row("norm/scale", "norm.weight", "D"),
)
LLAMA_QKV_BIAS = tuple(
    Row(f"layers/attn/{x}/bias", f"layers.{{i}}.self_attn.{x}_proj.bias", d) for x, d in zip("qkv", "QGG", strict=True)
)
LLAMA_QK_NORM = tuple(Row(f"layers/attn/{x}_norm/scale", f"layers.{{i}}.self_attn.{x}_norm.weight", "K") for x in "qk")
LM_HEAD = Row("lm_head/kernel", "lm_head.weight", "D V", top=True)

GPT2 = (
    Row("embed/tokens/embedding", "wte.weight", "V D"),
    Row("embed/positions/embedding", "wpe.weight", "P D"),
    *norm("layers/attn_norm", "h.{i}.ln_1"),
    *fused("h.{i}.attn.c_attn", conv=True),
    *pairs("layers/attn/o", "h.{i}.attn.c_proj", "D D", "D", conv=True),
    *norm("layers/mlp_norm", "h.{i}.ln_2"),
    *pairs("layers/mlp/up", "h.{i}.mlp.c_fc", "D F", "F", conv=True),
    *pairs("layers/mlp/down", "h.{i}.mlp.c_proj", "F D", "D", conv=True),
    *norm("norm", "ln_f"),
)

BLOOM = (
    Row("embed/tokens/embedding", "word_embeddings.weight", "V D"),
    *norm("embed/norm", "word_embeddings_layernorm"),
    *norm("layers/attn_norm", "h.{i}.input_layernorm"),
    *fused("h.{i}.self_attention.query_key_value"),
    *pairs("layers/attn/o", "h.{i}.self_attention.dense", "D D", "D"),
    *norm("layers/mlp_norm", "h.{i}.post_attention_layernorm"),
    *pairs("layers/mlp/up", "h.{i}.mlp.dense_h_to_4h", "D F", "F"),
    *pairs("layers/mlp/down", "h.{i}.mlp.dense_4h_to_h", "F D", "D"),
    *norm("norm", "ln_f"),
)

GEMMA = tuple(
    row._replace(theirs=row.theirs.replace("post_attention_layernorm", "pre_feedforward_layernorm")) for row in LLAMA
) + (
    Row("layers/attn_post_norm/scale", "layers.{i}.post_attention_layernorm.weight", "D"),
    Row("layers/mlp_post_norm/scale", "layers.{i}.post_feedforward_layernorm.weight", "D"),
)


def _t5(stack: str, gated: bool) -> list[Row]:
    """One of T5's stacks. Its blocks number their sublayers."""
    block, names = f"{stack}.block.{{i}}.layer", [("attn", "SelfAttention")]
    names += [("cross_attn", "EncDecAttention")] if stack == "decoder" else []
    rows = [
        Row(
            f"{stack}/relative/embedding",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "R N",
        )
    ]
    for place, (ours, theirs) in enumerate(names):
        rows.append(Row(f"{stack}/layers/{ours}_norm/scale", f"{block}.{place}.layer_norm.weight", "D"))
        for x in "qkvo":
            shape = "Q D" if x == "o" else "D Q"
            rows += pairs(f"{stack}/layers/{ours}/{x}", f"{block}.{place}.{theirs}.{x}", shape)
    last = f"{block}.{len(names)}"
    rows.append(Row(f"{stack}/layers/mlp_norm/scale", f"{last}.layer_norm.weight", "D"))
    for ours, theirs in (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),):
        rows += pairs(f"{stack}/layers/mlp/{ours}", f"{last}.DenseReluDense.{theirs}", "D F")
    rows += pairs(f"{stack}/layers/mlp/down", f"{last}.DenseReluDense.wo", "F D")
    return [*rows, Row(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight", "D")]


def table(config: Config) -> tuple[Row, ...]:
    """Returns the rows of exactly the leaves that a model of this config has."""
    if isinstance(config, BertConfig):
        return BERT + (BERT_POOLER if config.pooler else ())
    if isinstance(config, VitConfig):
        return VIT + (VIT_HEAD if config.num_classes else ())
    if isinstance(config, ClipConfig):
        return CLIP
    if isinstance(config, Gpt2Config):
        rows = GPT2
    elif isinstance(config, BloomConfig):
        rows = BLOOM
    elif isinstance(config, T5Config):
        rows = (Row("embed/tokens/embedding", "shared.weight", "V D"),)
        rows += tuple(row for stack in ("encoder", "decoder") for row in _t5(stack, config.gated))
    elif isinstance(config, GemmaConfig):
        rows = GEMMA + (LLAMA_QK_NORM if config.qk_norm else ())
    else:
        rows = LLAMA + (LLAMA_QKV_BIAS if config.qkv_bias else ()) + (LLAMA_QK_NORM if config.qk_norm else ())
    return rows if config.tie_embeddings else (*rows, LM_HEAD)


def shape_of(config: Config, row: Row) -> tuple[int, ...]:
    """Shape of one layer's leaf, in our order."""
    space, config = getattr(config, "projection", None), part_of(config, row)
    sizes = {"D": config.hidden_size, "F": config.intermediate_size, "E": space, "1": 1}
    if isinstance(config, VitConfig):
        sizes |= {"P": config.patches + 1, "I": config.patch**2 * config.channels, "C": config.num_classes}
        return tuple(sizes[letter] for letter in row.shape.split())
    sizes["V"] = config.vocab_size
    if isinstance(config, BertConfig):
        sizes |= {"P": config.max_positions, "S": config.type_vocab_size}
    elif isinstance(config, Gpt2Config):
        sizes |= {"P": config.max_positions}
    elif isinstance(config, BloomConfig):
        pass
    elif isinstance(config, T5Config):
        sizes |= {"Q": config.num_heads * config.head_dim, "N": config.num_heads, "R": config.buckets}
    else:
        sizes |= {"Q": config.num_heads * config.head_dim, "G": config.num_kv_heads * config.head_dim}
        sizes |= {"K": config.head_dim}
    return tuple(sizes[letter] for letter in row.shape.split())


def part_of(config: Config, row: Row) -> Config:
    """The configuration that a row's sizes are in: of one of CLIP's towers, or the model's own."""
    if not isinstance(config, ClipConfig):
        return config
    return config.text if row.ours.startswith("text") else config.vision


def stored_shape(config: Config, row: Row) -> tuple[int, ...]:
    """Shape of one layer's tensor in their files."""
    shape = shape_of(config, row)
    if row.form == "patches":
        vit = part_of(config, row)
        return (shape[1], vit.channels, vit.patch, vit.patch)
    if row.form is not None:
        return (1, *shape) if row.form == "batched" else shape[1:]
    shape = shape if row.part is None else (*shape[:-1], 3 * shape[-1])
    return shape[::-1] if row.transposed else shape


def from_stored(config: Config, row: Row, value: np.ndarray) -> np.ndarray:
    """Their tensor in our order, a view where it can be; of one that fuses three, the row's part."""
    if row.form is not None:
        value = value.transpose(2, 3, 1, 0) if row.form == "patches" else value
        return value.reshape(shape_of(config, row))
    value = value.T if row.transposed else value
    return value if row.part is None else split(config, value, row.part)


def to_stored(config: Config, row: Row, value: np.ndarray) -> np.ndarray:
    """The inverse, of a tensor that is whole."""
    if row.form == "patches":
        width, channels, patch, _ = stored_shape(config, row)
        return value.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1)
    if row.form is not None:
        return value.reshape(stored_shape(config, row))
    return value.T if row.transposed else value


def split(config: Config, value: np.ndarray, part: int) -> np.ndarray:
    """A third of the last axis, q, k or v: of [..., 3 * H*K] in GPT-2's files, of [..., H * 3*K] in BLOOM's."""
    lead = value.shape[:-1]
    return value.reshape(*lead, _groups(config), 3, -1)[..., part, :].reshape(*lead, -1)


def fuse(config: Config, parts: list[np.ndarray]) -> np.ndarray:
    """The inverse, of all three."""
    lead = parts[0].shape[:-1]
    return np.stack([x.reshape(*lead, _groups(config), -1) for x in parts], axis=-2).reshape(*lead, -1)


def _groups(config: Config) -> int:
    return config.num_heads if isinstance(config, BloomConfig) else 1


def prefix(config: Config, headless: bool = False) -> str:
    """Their prefix of all but a head: BertModel has none (`headless`), BertForX `bert.`, likewise ViT, GPT-2 and BLOOM
    `transformer.`, T5 and CLIP none, LLaMA `model.`.
    """
    if isinstance(config, VitConfig):
        return "" if headless and not config.num_classes else "vit."
    if isinstance(config, BertConfig):
        return "" if headless else f"{config.family}."
    if isinstance(config, T5Config | ClipConfig):
        return ""
    return "transformer." if isinstance(config, Gpt2Config | BloomConfig) else "model."


def depth(config: Config, row: Row) -> int:
    """How many layers have the row's leaf; 1 for a leaf outside of them."""
    if "{i}" not in row.theirs:
        return 1
    if isinstance(config, ClipConfig):
        return part_of(config, row).num_layers
    return config.num_decoder_layers if row.ours.startswith("decoder/") else config.num_layers


def canonical(config: Config, name: str) -> str:
    """Their name without prefix and in today's spelling (BERT's first files say gamma and beta)."""
    start = r"(bert|roberta)\." if isinstance(config, BertConfig) else re.escape(prefix(config))
    name = re.sub(f"^{start}", "", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
