"""Models that were trained here from nothing, as directories: a denoiser, a feature network, a vision base.

    DIR/config.json          task, the model's configuration, what the task adds, sha256 of the weights
    DIR/model.safetensors    the parameters by path, "layers/attn/q/kernel"

A directory is written whole or not at all, and loading it is strict: altered bytes and missing, unexpected or
mis-shaped leaves are errors.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common
from research import files
from research.convert.export import PRODUCER, write_safetensors
from research.diffusion.features import Features, FeaturesConfig
from research.errors import ModelError
from research.models.dit import DitConfig
from research.models.registry import build
from research.models.unet import UnetConfig
from research.models.vit import VitConfig
from research.peft import method as peft
from research.peft import tree

WEIGHTS, META = "model.safetensors", "config.json"
CONFIGS = {"dit": DitConfig, "unet": UnetConfig, "vit": VitConfig, "features": FeaturesConfig}


class Saved(NamedTuple):
    """What a directory holds; `record` is its config.json."""

    record: dict[str, Any]
    config: Any
    model: nn.Module
    params: tree.PyTree


def module(config: Any) -> nn.Module:
    """The module of a configuration. Raises ModelError as `build` does."""
    return Features(config) if isinstance(config, FeaturesConfig) else build(config)


def fresh(model: nn.Module, seed: int) -> tree.PyTree:
    """New parameters. Raises ModelError for a model that its own image size does not fit."""
    new = jax.jit(lambda rng: nn.unbox(model.init(rng, *model.example())["params"]))
    return new(jax.random.key(seed))


def save(directory: Path, task: str, config: Any, params: tree.PyTree, half: bool = False, **more: Any) -> int:
    """Writes a directory atomically and returns its bytes. `half`: the weights in fp16. `more`: further JSON values.

    Raises ModelError where it can't be written, or holds something else.
    """
    to_host = lambda x: np.asarray(tree.whole(x), np.float16 if half else None)  # noqa: E731
    leaves = {path: to_host(x) for path, x in tree.paths(params).items()}
    record = PRODUCER | {"task": task, "config": common.jsonable(config), **more}

    def fill(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, leaves.items)
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        common.write_json(folder / META, record | {"sha256": sha256})

    return files.replace_directory(
        directory, fill, ours=lambda d: _record(d).get("task") == task, needed=sum(x.nbytes for x in leaves.values())
    )


def task_of(directory: Path) -> str | None:
    """What the model of a directory is for; None where it is not one of ours."""
    return _record(directory).get("task")


def load(directory: str | Path, task: str) -> Saved:
    """Reads a directory. Raises ModelError: none, damaged, or for another task."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    directory = Path(directory).expanduser()
    record = _record(directory)
    if record.get("task") != task:
        found = f"is for task {record['task']!r}" if "task" in record else f"has no {META} of ours"
        raise ModelError(f"{directory} is no saved model for {task}: it {found}.")
    try:
        described = dict(record["config"])
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in described.items()}
        config = CONFIGS[described["family"]](**fields)
        model = module(config)
        wanted = tree.paths(peft.base(model)[0])
        if hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest() != record["sha256"]:
            raise ModelError(f"model {directory} is damaged: {WEIGHTS} is not the file that {META} describes.")
        leaves = load_file(directory / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"model {directory} is damaged: {str(error).splitlines()[0]}.") from None
    wrong = [path for path in wanted.keys() | leaves.keys() if _shape(wanted, path) != _shape(leaves, path)]
    if wrong:
        raise ModelError(f"model {directory} does not fit its {META}: {', '.join(sorted(wrong)[:5])}.")
    params = {path: jnp.asarray(leaves[path], x.dtype) for path, x in wanted.items()}
    return Saved(record, config, model, tree.unflatten(params))


def _record(directory: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none that can be read."""
    try:
        found = json.loads((directory / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shape(leaves: dict[str, Any], path: str) -> tuple[int, ...] | None:
    return leaves[path].shape if path in leaves else None
