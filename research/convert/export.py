"""Writes a directory that `transformers` loads: model.safetensors, config.json and the tokenizer's files."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import files
from research.convert import config_vision, hf
from research.convert.config import ARCHITECTURES, Json, config_to_hf
from research.convert.names import LM_HEAD, VIT_HEAD
from research.errors import ModelError
from research.models.bert import BertConfig
from research.models.registry import Config
from research.peft import tree

PRODUCER = {"producer": "peftree"}  # in config.json: marks a directory that may be written over
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export_hf(
    directory: str | Path,
    config: Config,
    params: tree.PyTree,
    tokenizer: Any = None,
    head: tree.PyTree | None = None,
    class_names: Iterable[str] | None = None,
) -> Path:
    """Writes the model under Hugging Face names in torch's layout; either the whole directory appears or nothing does.

    Args:
      params: scanned or unrolled arrays, adapters merged.
      head: {"kernel": [D, C], "bias": [C]} of a classifier on `features`; BERT becomes BertForSequenceClassification, a
        LLaMA LlamaForSequenceClassification (whose `score` has no bias), a ViT ViTForImageClassification, in place of
        its own head. Without one: BertModel, LlamaForCausalLM, GPT2LMHeadModel, T5ForConditionalGeneration, CLIPModel,
        and ViTForImageClassification or ViTModel (whose pooler no head of ours reads).
      class_names: C labels for id2label.
    Returns the directory.
    Raises ModelError: what `transformers` has no class for, a directory that holds something else, a full disk.
    """
    directory = Path(directory).expanduser().absolute()
    described, heads = _describe(config, tokenizer, head, class_names)
    own = {row.theirs for row in (LM_HEAD, *VIT_HEAD)} if head is not None else ()  # the new head is instead of it

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from (t for t in hf.export_tensors(config, params, headless=head is None) if t[0] not in own)
        yield from heads

    def fill(folder: Path) -> None:
        write_safetensors(folder / "model.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)

    needed = sum(x.nbytes for x in (*jax.tree.leaves(params), *(value for _, value in heads)))
    files.replace_directory(directory, fill, ours=_is_export, needed=needed)
    return directory


def _describe(
    config: Config, tokenizer: Any, head: tree.PyTree | None, class_names: Iterable[str] | None
) -> tuple[Json, list[tuple[str, np.ndarray]]]:
    """Returns (config.json, the head's tensors)."""
    described, stem = config_to_hf(config) | PRODUCER, ARCHITECTURES[config.family]
    for role in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{role}_token_id", None)) is not None:
            described[f"{role}_token_id"] = token
    bert = isinstance(config, BertConfig)
    if head is None:
        if config.family == "vit" and config.num_classes and class_names is not None:
            described |= config_vision.labelled(list(class_names))
        kinds = {"bert": "Model", "roberta": "Model", "gpt2": "LMHeadModel", "t5": "ForConditionalGeneration"}
        kind = kinds.get(config.family, "Model" if config.family == "clip" else "ForCausalLM")
        return {"architectures": [stem + kind]} | described, []
    kernel, bias = np.asarray(head["kernel"]), head.get("bias")
    names = list(class_names) if class_names is not None else [f"LABEL_{i}" for i in range(kernel.shape[1])]
    if kernel.shape != (config.hidden_size, len(names)):
        raise ModelError(
            f"cannot export the head: its kernel has shape {list(kernel.shape)}, the model and class names want "
            f"{[config.hidden_size, len(names)]}."
        )
    if config.family == "clip":
        raise ModelError("cannot export the head: CLIPForImageClassification reads the mean of patches, ours does not.")
    if config.family == "t5":
        raise ModelError("cannot export the head: T5ForSequenceClassification has one dense layer more than ours.")
    if config.family == "roberta":
        raise ModelError("cannot export the head: RobertaForSequenceClassification has one dense layer more than ours.")
    if bert and not config.pooler:
        raise ModelError("cannot export the head: BertForSequenceClassification needs a pooler.")
    vit = config.family == "vit"
    if not (bert or vit) and bias is not None:
        raise ModelError(f"cannot export the head: {stem}ForSequenceClassification has no bias, and this head has one.")
    described |= {
        "architectures": [f"{stem}For{'Image' if vit else 'Sequence'}Classification"],
        **config_vision.labelled(names),
    }
    theirs = "classifier" if bert or vit else "score"
    tensors = [(f"{theirs}.weight", kernel.T)]
    return described, tensors + ([(f"{theirs}.bias", np.asarray(bias))] if bias is not None else [])


def write_safetensors(file: Path, tensors: Callable[[], Iterable[tuple[str, np.ndarray]]]) -> None:
    """Writes a safetensors file from a stream that is read twice, so that one tensor at a time is in memory.

    The format: 8 bytes with the header's length, the header as JSON padded to 8, then the tensors' bytes in a row.
    """
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors():
        if value.dtype.name not in _DTYPES:
            raise ModelError(f"cannot export {name}: dtype {value.dtype.name}. Valid: {', '.join(_DTYPES)}.")
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype.name], "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, value in tensors():
            out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        out.flush()
        os.fsync(out.fileno())


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as e:  # the tokenizers library reports a failed write as a bare Exception
        raise files.os_error(e, "tokenizer not saved") from e


def _is_export(directory: Path) -> bool:
    try:
        return json.loads((directory / "config.json").read_text()).get("producer") == PRODUCER["producer"]
    except (OSError, ValueError, AttributeError):
        return False
