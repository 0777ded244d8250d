"""Writes adapter directories that Hugging Face PEFT reads (`hf_peft.py` reads theirs).

What is written is what the nodes are, whatever method made them: PiSSA's W + s (A B - A0 B0) is a LoRA of twice the
rank, ranks of zeros are left out, and ranks and scales that differ are patterns.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.convert import hf_peft_keys as keys
from research.convert.config import Config, Json
from research.convert.hf_peft_keys import CONFIG, SOFT, UNDER, WEIGHTS
from research.convert.hf_peft_methods import TYPES
from research.errors import ModelError
from research.files import os_error, replace_directory
from research.models.bert import BertConfig
from research.nn.on import On
from research.nn.sites import Node
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.fourierft import FourierFt
from research.peft.ia3 import ScaleInput
from research.peft.lora import Lora
from research.peft.method import Sites, Variables
from research.peft.pissa import Start
from research.peft.prefix import Prefix, Shift
from research.peft.prompt import VirtualTokens
from research.peft.shira import Shira
from research.peft.vera import Projections

VERSION = "0.21.2"  # of the format
PRODUCER = {"format": "pt", "producer": "peftree"}  # the weights' metadata: marks a directory that may be written over


def save(
    directory: str | Path, spec: str, variables: Variables, config: Config, sites: Sites, base: str | None = None
) -> Path:
    """Writes a directory that `PeftModel.from_pretrained` reads; either all of it appears or nothing does.

    Args:
      spec: the method's specification.
      variables: base, adapter and, for a classifier, head.
      base: what the base is called.
    Raises ModelError: a method, or a part of its state, without a counterpart there; a directory that holds something
    else; a full disk.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    directory = Path(directory)
    c, tensors = _describe(spec, variables, config, sites)
    c |= {"base_model_name_or_path": base, "inference_mode": True, "peft_version": VERSION}

    def fill(folder: Path) -> None:
        try:
            save_file(tensors, folder / WEIGHTS, PRODUCER)
        except SafetensorError as error:
            raise os_error(error, "weights not saved") from error
        (folder / CONFIG).write_text(json.dumps(c, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def ours(folder: Path) -> bool:
        try:
            with safe_open(folder / WEIGHTS, "np") as file:
                return file.metadata() == PRODUCER
        except (OSError, SafetensorError):
            return False

    replace_directory(directory, fill, ours=ours, needed=sum(x.nbytes for x in tensors.values()))
    return directory


def _describe(spec: str, variables: Variables, config: Config, sites: Sites) -> tuple[Json, dict[str, np.ndarray]]:
    """Their configuration and tensors."""
    method, given = registry.parse(spec), _given(spec)
    trained = [path for path, m in tree.paths(peft.mask(method, variables)["params"]).items() if tree.trains(m)]
    nodes = tree.paths(peft.realised(method, variables, sites)["peft"], is_leaf=peft.is_node)
    nodes = {path: node for path, node in nodes.items() if not isinstance(node, Shift)}
    kind, head, bert = _kind(nodes, trained, given["method"]), variables.get("head"), isinstance(config, BertConfig)
    c: Json = {"peft_type": kind, "task_type": "FEATURE_EXTRACTION" if bert else "CAUSAL_LM"}
    tensors: dict[str, np.ndarray] = {}
    if head is not None:
        c |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
        _write_head(kind, head, config, tensors)
    headless = bert and head is None
    if kind in SOFT:
        found = {"": _write_soft(nodes, config, tensors)}
    elif kind == "LN_TUNING":
        found = {}
        c |= {"target_modules": _write_norms(trained, variables["params"], config, headless, tensors)}
    else:
        found = _write_nodes(nodes, given, config, headless, sites, tensors)
        c |= _target_modules(found, keys.linears(config, headless))
    return c | TYPES[kind].write(found, given, config), tensors


def _given(spec: str) -> dict[str, Any]:
    """The method's name and its options: the defaults, and the specification's own as text."""
    if len(registry.split(spec)) > 1:
        raise ModelError(f"{spec} is several methods, and a directory of Hugging Face PEFT holds one.")
    name, _, text = spec.strip().partition(":")
    out = {key: p.default for key, p in inspect.signature(registry.find(name)).parameters.items()}
    for option in re.split(r",(?=\s*\w+\s*=)", text) if text else ():
        key, _, value = (part.strip() for part in option.partition("="))
        out[key] = None if value.lower() == "none" else value
    return out | {"method": name}


def _kind(nodes: dict[str, Node], trained: list[str], name: str) -> str:
    """Their peft_type of an adapter."""
    if not nodes and trained and all(re.fullmatch(keys.NORMS, path) for path in trained):
        return "LN_TUNING"
    soft = {VirtualTokens: "P_TUNING" if name == "ptuning" else "PROMPT_TUNING", Prefix: "PREFIX_TUNING"}
    kinds = set()
    for node in nodes.values():
        inner = node.node if isinstance(node, On) else node
        found = keys.of(inner)
        kinds.add("LORA" if isinstance(inner, Start) else found[0] if found else soft.get(type(inner)))
    if trained or len(kinds) != 1 or None in kinds:
        raise ModelError(f"{name} has no counterpart in Hugging Face PEFT.")
    return kinds.pop()


def _write_nodes(
    nodes: dict[str, Node], given: dict[str, Any], config: Config, headless: bool, sites: Sites, tensors: dict
) -> dict[str, Node]:
    """Adds the nodes' tensors, and returns {their module: our node of that layer}."""
    names = {place: module for module, place in keys.linears(config, headless).items()}
    names |= {place: module for module, place in keys.attentions(config)}
    found, fresh = {}, not any(np.any(x) for path, x in tree.paths(nodes).items() if path.endswith("/lam"))
    for path, node in nodes.items():
        inner = jax.tree.map(np.asarray, node.node if isinstance(node, On) else node)
        if isinstance(inner, Projections):
            tensors |= {f"base_model.{key.suffix}": key.write(getattr(inner, key.field)) for key in keys.of(inner)[1]}
            continue
        site = sites[path.rpartition("/")[0]]
        here = keys.places(path, names, site.stack.shape[0] if site.stack.shape else 1)
        if not here:
            raise ModelError(f"{path}: {config.family}'s files have no module for this projection alone.")
        for place in here:
            one = jax.tree.map(lambda x, place=place: x[place.index], inner)
            one = _plain(one) if isinstance(one, Start) else one
            rows = keys.rows(one, fresh)
            absent = isinstance(node, On) and place.site.startswith("layers/") and place.layer not in node.layers
            if absent or (isinstance(one, keys.PADDED) and rows.size == 0):
                continue
            if place.module in found:
                raise ModelError(f"two nodes at {place.site} have no counterpart in Hugging Face PEFT.")
            found[place.module] = one
            for key in keys.of(one)[1]:
                if (value := getattr(one, key.field)) is not None:
                    value = keys.signed(one, value[key.at(rows)])
                    tensors[f"{UNDER}{place.module}.{key.suffix}"] = key.write(value)
            if isinstance(one, Shira):
                where = np.stack([one.index % site.shape[1], one.index // site.shape[1]]).astype(np.int32)
                tensors[f"{UNDER}{place.module}.shira_indices"] = where
            if isinstance(one, FourierFt):
                _check_where(one, int(given["seed"]), site.shape)
    return found


def _plain(node: Start) -> Lora:
    """W + s (A B - A0 B0) as one LoRA of twice the rank."""
    return Lora(np.concatenate([node.a, -node.a0], axis=1), np.concatenate([node.b, node.b0]), node.scale)


def _check_where(node: FourierFt, seed: int, shape: tuple[int, ...]) -> None:
    """Their files have no places but a seed."""
    if not np.array_equal(node.where, keys.torch_where(seed, shape, node.spectrum.size)):
        raise ModelError(
            f"fourierft: the coefficients' places are not those that torch draws from seed={seed}, and a file of "
            "Hugging Face PEFT has only the seed: only an adapter that was read from such a file can be written."
        )


def _target_modules(found: dict[str, Node], names: dict) -> Json:
    """target_modules and, for (IA)3, those whose input is scaled, which must be some of them word for word."""
    targets = keys.named(set(found), names)
    forward = {module for module, node in found.items() if isinstance(node, ScaleInput)}
    if not forward:
        return {"target_modules": targets}
    if not set(short := keys.named(forward, names)) <= set(targets):
        targets, short = sorted(found), sorted(forward)
    return {"target_modules": targets, "feedforward_modules": short}


def _write_soft(nodes: dict[str, Node], config: Config, tensors: dict) -> Node:
    """Adds prompt_embeddings, and returns one layer's node."""
    if any(isinstance(node, On) for node in nodes.values()):
        raise ModelError("a prefix in some layers only has no counterpart in Hugging Face PEFT.")
    path, node = next(iter(nodes.items()))
    if isinstance(node, VirtualTokens):
        tensors["prompt_embeddings"] = np.asarray(node.table)
        return node
    layers = [np.stack([n.k, n.v]) for _, n in sorted(nodes.items(), key=lambda item: keys.number(item[0]))]
    layers = layers[0].swapaxes(0, 1) if path.startswith("layers/") else np.stack(layers)  # [L, 2, P, kv_heads, K]
    if len(layers) != config.num_layers:
        raise ModelError("a prefix in some layers only has no counterpart in Hugging Face PEFT.")
    tensors["prompt_embeddings"] = np.moveaxis(layers, 2, 0).reshape(layers.shape[2], -1)
    return node.replace(k=layers[0, 0], v=layers[0, 1])


def _write_norms(trained: list[str], params: tree.PyTree, config: Config, headless: bool, tensors: dict) -> list[str]:
    """Adds the norms, and returns their target_modules."""
    flat, names, chosen = tree.paths(params), keys.norms(config, headless), set()
    for name, (ours, i) in names.items():
        path, index = keys.locate(flat, ours, i)
        if path in trained:
            module, _, leaf = name.rpartition(".")
            tensors[f"{UNDER}{module}.ln_tuning_layers.{leaf}"] = np.asarray(flat[path])[index]
            chosen.add(module)
    return keys.named(chosen, {name.rpartition(".")[0] for name in names})


def _write_head(kind: str, head: dict[str, Any], config: Config, tensors: dict) -> None:
    bert, name = isinstance(config, BertConfig), keys.head_name(kind, config)
    if config.family == "roberta" or (bert and (kind in SOFT or not config.pooler)) or (not bert and "bias" in head):
        raise ModelError(f"a classifier like this one on {config.family} has no counterpart in Hugging Face PEFT.")
    tensors[f"{name}.weight"] = np.ascontiguousarray(np.asarray(head["kernel"]).T)
    if "bias" in head:
        tensors[f"{name}.bias"] = np.asarray(head["bias"])
