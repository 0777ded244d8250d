"""Hugging Face checkpoints: one table of names and shapes a family, read in both directions.

    ours (config.scan)            theirs                                          shape here
    layers/attn/q/kernel          model.layers.{i}.self_attn.q_proj.weight        [L, D, H*K], theirs [H*K, D] a layer

Kernels are `[in, out]` here and `[out, in]` there, so every leaf called `kernel` is transposed and nothing else is. A
source of weights is anything with `shapes` and `read(name)`: safetensors files here, a GGUF file in `gguf.py`.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.convert.config import Config
from research.errors import ModelError
from research.models.bert import BertConfig
from research.peft import tree

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A leaf of ours, its name in their files (`{i}` is the layer) and the letters of its shape, in our order."""

    ours: str
    theirs: str
    shape: str


def _pairs(ours: str, theirs: str, kernel: str, bias: str | None = None) -> list[Row]:
    """A projection: kernel `[in, out]` and, if `bias` names its letter, a bias."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", kernel)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias", bias)] if bias else [])


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight", "D"), Row(f"{ours}/bias", f"{theirs}.bias", "D")]


BERT = (
    Row("embed/tokens/embedding", "embeddings.word_embeddings.weight", "V D"),
    Row("embed/positions/embedding", "embeddings.position_embeddings.weight", "P D"),
    Row("embed/types/embedding", "embeddings.token_type_embeddings.weight", "S D"),
    *_norm("embed/norm", "embeddings.LayerNorm"),
    *_pairs("layers/attn/q", "encoder.layer.{i}.attention.self.query", "D D", "D"),
    *_pairs("layers/attn/k", "encoder.layer.{i}.attention.self.key", "D D", "D"),
    *_pairs("layers/attn/v", "encoder.layer.{i}.attention.self.value", "D D", "D"),
    *_pairs("layers/attn/o", "encoder.layer.{i}.attention.output.dense", "D D", "D"),
    *_norm("layers/attn_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *_pairs("layers/mlp/up", "encoder.layer.{i}.intermediate.dense", "D F", "F"),
    *_pairs("layers/mlp/down", "encoder.layer.{i}.output.dense", "F D", "D"),
    *_norm("layers/mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
)
BERT_POOLER = tuple(_pairs("pooler", "pooler.dense", "D D", "D"))

# Q is H*K, G the key and value heads' H*K, K one head's size.
LLAMA = (
    Row("embed/tokens/embedding", "embed_tokens.weight", "V D"),
    Row("layers/attn_norm/scale", "layers.{i}.input_layernorm.weight", "D"),
    *_pairs("layers/attn/q", "layers.{i}.self_attn.q_proj", "D Q"),
    *_pairs("layers/attn/k", "layers.{i}.self_attn.k_proj", "D G"),
    *_pairs("layers/attn/v", "layers.{i}.self_attn.v_proj", "D G"),
    *_pairs("layers/attn/o", "layers.{i}.self_attn.o_proj", "Q D"),
    Row("layers/mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight", "D"),
    *_pairs("layers/mlp/gate", "layers.{i}.mlp.gate_proj", "D F"),
    *_pairs("layers/mlp/up", "layers.{i}.mlp.up_proj", "D F"),
    *_pairs("layers/mlp/down", "layers.{i}.mlp.down_proj", "F D"),
    Row("norm/scale", "norm.weight", "D"),
)
LLAMA_QKV_BIAS = tuple(
    Row(f"layers/attn/{x}/bias", f"layers.{{i}}.self_attn.{x}_proj.bias", d) for x, d in zip("qkv", "QGG", strict=True)
)
LLAMA_QK_NORM = tuple(Row(f"layers/attn/{x}_norm/scale", f"layers.{{i}}.self_attn.{x}_norm.weight", "K") for x in "qk")
LM_HEAD = Row("lm_head/kernel", "lm_head.weight", "D V")


def table(config: Config) -> tuple[Row, ...]:
    """Returns the rows of exactly the leaves that a model of this config has."""
    if isinstance(config, BertConfig):
        return BERT + (BERT_POOLER if config.pooler else ())
    rows = LLAMA + (LLAMA_QKV_BIAS if config.qkv_bias else ()) + (LLAMA_QK_NORM if config.qk_norm else ())
    return rows if config.tie_embeddings else (*rows, LM_HEAD)


def shape_of(config: Config, row: Row) -> tuple[int, ...]:
    """Shape of one layer's leaf, in our order."""
    sizes = {"V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size}
    if isinstance(config, BertConfig):
        sizes |= {"P": config.max_positions, "S": config.type_vocab_size}
    else:
        sizes |= {"Q": config.num_heads * config.head_dim, "G": config.num_kv_heads * config.head_dim}
        sizes |= {"K": config.head_dim}
    return tuple(sizes[letter] for letter in row.shape.split())


def prefix(config: Config, headless: bool = False) -> str:
    """Their prefix of all but a head: BertModel has none (`headless`), BertForX `bert.`, LLaMA `model.`."""
    if isinstance(config, BertConfig):
        return "" if headless else f"{config.family}."
    return "model."


def canonical(config: Config, name: str) -> str:
    """Their name without prefix and in today's spelling (BERT's first files say gamma and beta)."""
    name = re.sub(r"^(bert|roberta)\." if isinstance(config, BertConfig) else r"^model\.", "", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


# Buffers, and heads of the pretraining objective: not part of the model here.
_BUFFERS = r"embeddings\.(position_ids|token_type_ids)|.*rotary_emb\.inv_freq|.*\.attention\.(masked_)?bias"
_HEADS = r"cls\..*|(classifier|score|qa_outputs|pre_classifier|vocab_\w+)\..*"


class Source(Protocol):
    """Weights by their Hugging Face names."""

    label: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsSource:
    """The tensors of one or several safetensors files, read one at a time.

    Args:
      path: a `.safetensors` file, or a directory with `model.safetensors` or `model.safetensors.index.json`.
    Raises ModelError: no safetensors there (pickles are refused), or a file that is truncated or altered.
    """

    def __init__(self, path: Path | str):
        from safetensors import SafetensorError, safe_open

        self.label = str(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Any] = {}
        for file in safetensors_files(Path(path)):
            try:
                handle = safe_open(file, framework="np")
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as e:
                raise ModelError(f"{file}: not a whole safetensors file ({e}); fetch it again.") from e
            self.shapes |= shapes
            self._file |= dict.fromkeys(shapes, handle)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor; bfloat16 arrives as ml_dtypes.bfloat16."""
        from safetensors import SafetensorError

        try:
            return self._file[name].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as e:
            raise ModelError(f"{self.label}: {name} cannot be read ({e}).") from e


def safetensors_files(path: Path) -> list[Path]:
    """Returns the files that hold a checkpoint's tensors: one, or those that the index of a sharded one names."""
    if path.is_file():
        return [path]
    if (whole := path / "model.safetensors").exists():
        return [whole]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise ModelError(f"{index}: not a safetensors index ({e}).") from e
        # A shard is a sibling of its index: a name with a folder in it comes from a broken or hostile file.
        if lost := [n for n in names if Path(n).name != n or not (path / n).exists()]:
            raise ModelError(f"{index}: {len(lost)} of {len(names)} shards missing ({_some(lost)}).")
        return [path / n for n in names]
    pickles = [p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        raise ModelError(f"{path}: only pickled weights ({_some(pickles)}), which can run code; convert them.")
    raise ModelError(f"{path}: no model.safetensors and no model.safetensors.index.json.")


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


def match(config: Config, source: Source) -> dict[str, str]:
    """Returns {canonical name: name in the source} after checking that nothing is missing or left over.

    Raises ModelError: names missing or unexpected (counts, and up to ten of each).
    """
    found = {canonical(config, name): name for name in source.shapes}
    wanted = {row.theirs.format(i=i) for row in table(config) for i in range(config.num_layers)}
    ignored, bert = f"{_BUFFERS}|{_HEADS}", isinstance(config, BertConfig)
    ignored += (r"|lm_head\..*" + ("" if config.pooler else r"|pooler\..*")) if bert else ""
    extra = [name for name in found if name not in wanted and not re.fullmatch(ignored, name)]
    if not bert and config.tie_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not _equal(source, found["lm_head.weight"], found.get("embed_tokens.weight")):
            raise ModelError(
                f"{source.label}: config ties lm_head to the embedding, but lm_head.weight differs from it."
            )
    missing = [name for name in wanted if name not in found]
    if missing or extra:
        parts = [
            f"{len(x)} names {what} ({_some(x)})" for x, what in ((missing, "missing"), (extra, "unexpected")) if x
        ]
        raise ModelError(f"{source.label}: not the weights of this {config.family} config: {'; '.join(parts)}.")
    if heads := [name for name in found if name not in wanted and re.fullmatch(_HEADS, name)]:
        log.warning("%s: left out the file's own head (%s)", source.label, _some(heads))
    return found


def _equal(source: Source, a: str, b: str | None) -> bool:
    return b is not None and source.shapes[a] == source.shapes[b] and np.array_equal(source.read(a), source.read(b))


def import_params(config: Config, source: Source) -> tree.PyTree:
    """Reads a model's `params` leaf by leaf, stacked over layers if `config.scan`, in `config.param_dtype`.

    Returns the tree that `build(config).init` would make. At no time does more than one leaf exist twice.
    Raises ModelError: missing, unexpected or mis-shaped tensors.
    """
    names = match(config, source)
    dtype = jnp.dtype(config.param_dtype)
    flat: dict[str, jax.Array] = {}

    def read(row: Row, i: int) -> np.ndarray:
        name, shape = names[row.theirs.format(i=i)], shape_of(config, row)
        theirs = shape[::-1] if row.ours.endswith("kernel") else shape
        if source.shapes[name] != theirs:
            raise ModelError(
                f"{source.label}: {name} has shape {list(source.shapes[name])}, the config wants {list(theirs)} "
                f"(for {row.ours})."
            )
        value = source.read(name)
        return value.T if row.ours.endswith("kernel") else value

    for row in table(config):
        if "{i}" not in row.theirs:
            flat[row.ours] = jnp.asarray(np.ascontiguousarray(read(row, 0), dtype))
        elif config.scan:
            whole = np.empty((config.num_layers, *shape_of(config, row)), dtype)
            for i in range(config.num_layers):
                whole[i] = read(row, i)
            flat[row.ours] = jnp.asarray(whole)
        else:
            for i in range(config.num_layers):
                path = row.ours.replace("layers/", f"layers_{i}/", 1)
                flat[path] = jnp.asarray(np.ascontiguousarray(read(row, i), dtype))
    return tree.unflatten(flat)


def export_tensors(config: Config, params: tree.PyTree, headless: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, tensor in their layout, a view where it can be): the inverse of `import_params`.

    Args:
      params: scanned or unrolled; leaves are arrays (a quantised or adapted kernel is merged first).
      headless: whether BERT names go without `bert.` (the bare model) or with it (under a task head).
    """
    flat, start = tree.paths(params), prefix(config, headless)
    for row in table(config):
        their = row.theirs if row is LM_HEAD else start + row.theirs
        for i in range(config.num_layers if "{i}" in their else 1):
            path = row.ours
            if "{i}" in their and path not in flat:
                path = path.replace("layers/", f"layers_{i}/", 1)
            if not hasattr(flat.get(path), "shape"):
                raise ModelError(f"cannot export: params have no array at {path}; merge adapters and dequantise first.")
            value = np.asarray(flat[path])
            value = value[i] if "{i}" in their and path == row.ours else value
            if value.shape != shape_of(config, row):
                raise ModelError(
                    f"cannot export {path}: shape {value.shape}, the config wants {shape_of(config, row)}."
                )
            yield their.format(i=i), value.T if path.endswith("kernel") else value
