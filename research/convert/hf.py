"""Hugging Face checkpoints, in and out, by the tables of `names.py`.

A source of weights is anything with `shapes` and `read(name)`: safetensors files here, a GGUF file in `gguf.py`.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.convert.config import Config
from research.convert.names import (
    Row,
    canonical,
    depth,
    from_stored,
    fuse,
    prefix,
    shape_of,
    stored_shape,
    table,
    to_stored,
)
from research.errors import ModelError
from research.models.bert import BertConfig
from research.models.vit import VitConfig
from research.peft import tree

log = logging.getLogger(__name__)


# Buffers, and heads of the pretraining objective: not part of the model here.
_BUFFERS = r"(.*\.)?embeddings\.(position_ids|token_type_ids)|.*rotary_emb\.inv_freq"
_BUFFERS += r"|.*\.(attention|attn)\.(masked_)?bias"
_BUFFERS += r"|(encoder|decoder)\.embed_tokens\.weight"  # T5's shared table again
_HEADS = r"cls\..*|(classifier|score|qa_outputs|pre_classifier|vocab_\w+)\..*"


class Source(Protocol):
    """Weights by their Hugging Face names."""

    label: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


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

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns one tensor, or the part of it that `index` cuts out; bfloat16 arrives as ml_dtypes.bfloat16."""
        from safetensors import SafetensorError

        try:
            return self._file[name].get_slice(name)[index] if index else self._file[name].get_tensor(name)
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
    wanted = {row.theirs.format(i=i) for row in table(config) for i in range(depth(config, row))}
    bert, heads = isinstance(config, BertConfig), _HEADS
    if isinstance(config, VitConfig):  # what no head of ours reads, and what masked pretraining fills in
        heads += r"|pooler\..*|embeddings\.mask_token"
    ignored = f"{_BUFFERS}|{heads}"
    ignored += (r"|lm_head\..*" + ("" if config.pooler else r"|pooler\..*")) if bert else ""
    extra = [name for name in found if name not in wanted and not re.fullmatch(ignored, name)]
    if not bert and getattr(config, "tie_embeddings", False) and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not _equal(source, found["lm_head.weight"], found.get(table(config)[0].theirs)):
            raise ModelError(
                f"{source.label}: config ties lm_head to the embedding, but lm_head.weight differs from it."
            )
    missing = [name for name in wanted if name not in found]
    if missing or extra:
        parts = [
            f"{len(x)} names {what} ({_some(x)})" for x, what in ((missing, "missing"), (extra, "unexpected")) if x
        ]
        raise ModelError(f"{source.label}: not the weights of this {config.family} config: {'; '.join(parts)}.")
    if left := [name for name in found if name not in wanted and re.fullmatch(heads, name)]:
        log.warning("%s: left out the file's own head (%s)", source.label, _some(left))
    return found


def _equal(source: Source, a: str, b: str | None) -> bool:
    return b is not None and source.shapes[a] == source.shapes[b] and np.array_equal(source.read(a), source.read(b))


def import_params(config: Config, source: Source, places: tree.PyTree = None) -> tree.PyTree:
    """Reads a model's `params` leaf by leaf, stacked over layers if `config.scan`, in `config.param_dtype`.

    places: shardings of the tree. Each process then reads only what its own devices hold, straight into their shards;
    without them every leaf is whole on one device. At no time does more than one leaf exist twice.
    Returns the tree that `build(config).init` would make.
    Raises ModelError: missing, unexpected or mis-shaped tensors.
    """
    names, dtype = match(config, source), jnp.dtype(config.param_dtype)
    where = {} if places is None else tree.paths(places)
    flat: dict[str, jax.Array] = {}

    def read(row: Row, i: int, index: tuple[slice, ...]) -> np.ndarray:
        name, theirs = names[row.theirs.format(i=i)], stored_shape(config, row)
        if source.shapes[name] != theirs:
            raise ModelError(
                f"{source.label}: {name} has shape {list(source.shapes[name])}, the config wants {list(theirs)} "
                f"(for {row.ours})."
            )
        if row.part is None and row.form is None:
            value = source.read(name, index[::-1] if row.transposed else index)
            return value.T if row.transposed else value
        return from_stored(config, row, source.read(name))[index]

    def leaf(path: str, shape: tuple[int, ...], cut: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        everything = tuple(slice(0, size) for size in shape)
        own = lambda index: np.asarray(cut(_bounded(index, shape)), dtype, order="C")  # noqa: E731
        if path in where:
            flat[path] = jax.make_array_from_callback(shape, where[path], own)
        else:
            flat[path] = jnp.asarray(own(everything))

    for row in table(config):
        shape, layers = shape_of(config, row), depth(config, row)
        if "{i}" not in row.theirs:
            leaf(row.ours, shape, lambda index, row=row: read(row, 0, index))
        elif config.scan:

            def stacked(index: tuple[slice, ...], row: Row = row) -> np.ndarray:
                count = index[0].stop - index[0].start
                out = np.empty((count, *(part.stop - part.start for part in index[1:])), dtype)
                for place in range(count):
                    out[place] = read(row, index[0].start + place, index[1:])
                return out

            leaf(row.ours, (layers, *shape), stacked)
        else:
            for i in range(layers):
                path = row.ours.replace("layers/", f"layers_{i}/", 1)
                leaf(path, shape, lambda index, row=row, i=i: read(row, i, index))
    return tree.unflatten(flat)


def _bounded(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The same slices with both ends said."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def export_tensors(config: Config, params: tree.PyTree, headless: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, tensor in their layout, a view where it can be): the inverse of `import_params`.

    Args:
      params: scanned or unrolled; leaves are arrays (a quantised or adapted kernel is merged first).
      headless: whether BERT and ViT names go without `bert.` (the bare model) or with it (under a task head).
    """
    flat, start, rows = tree.paths(params), prefix(config, headless), table(config)

    def leaf(row: Row, i: int) -> np.ndarray:
        path, stacked = row.ours, "{i}" in row.theirs
        if stacked and path not in flat:
            path = path.replace("layers/", f"layers_{i}/", 1)
        if not hasattr(flat.get(path), "shape"):
            raise ModelError(f"cannot export: params have no array at {path}; merge adapters and dequantise first.")
        value = np.asarray(flat[path])
        value = value[i] if stacked and path == row.ours else value
        if value.shape != shape_of(config, row):
            raise ModelError(f"cannot export {path}: shape {value.shape}, the config wants {shape_of(config, row)}.")
        return value

    for row in rows:
        if row.part:
            continue  # it went with the first part
        their = row.theirs if row.top else start + row.theirs
        for i in range(depth(config, row)):
            parts = [leaf(other, i) for other in rows if other.theirs == row.theirs]
            value = parts[0] if row.part is None else fuse(config, parts)
            yield their.format(i=i), to_stored(config, row, value)
