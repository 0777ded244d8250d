"""From a name to a model: packaged, a directory of Hugging Face files, a `.gguf` file, a hub id, or tiny and random."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.convert import hf
from research.convert.config import config_from_hf
from research.convert.fingerprint import fingerprint
from research.convert.gguf import GGUFSource
from research.convert.names import LM_HEAD, VIT_HEAD, canonical
from research.data import assets, joined, smoke
from research.data.pins import JOINED
from research.errors import ModelError, UserError, did_you_mean
from research.models import tie
from research.models.bert import BertConfig
from research.models.llama import LlamaConfig
from research.models.registry import PRESETS, Config, build, preset
from research.models.stack import unstack
from research.models.t5 import T5Config
from research.models.vit import VitConfig
from research.nn.kernels import attending
from research.peft import method, tree

# The packaged weights and the preset that describes them, so that a shape is known without a download.
PACKAGED = {
    "minilm-l6": "minilm-l6",
    "smollm2-135m-instruct": "smollm2-135m",
    "gemma3-270m": "gemma3-270m",
}
SMOKE = ("smoke", "smoke-llama")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
# Of a hub repository only this is fetched: no pickles, no code, no folders of other formats.
HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
CONFIG_FILES = ["config.json"]


@dataclass(frozen=True)
class Pretrained:
    """A model and what belongs to it: `model.apply({"params": params}, tokens, mask)`.

    The tokenizer may be None, and so may the path of the files.
    """

    name: str
    config: Config
    model: nn.Module
    params: tree.PyTree
    tokenizer: Any
    fingerprint: str
    path: Path | None = None


def load(
    name: str,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    attention: str = "xla",
    untie: bool = False,
    seed: int = 0,
    places: Callable[[tree.PyTree, tree.PyTree], tree.PyTree] | None = None,
) -> Pretrained:
    """Loads weights and tokenizer.

    Args:
      name: `minilm-l6` or `smollm2-135m-instruct` (packaged), `smoke` or `smoke-llama` (tiny and random), a directory
        of Hugging Face files, a `.gguf` file, or a hub id `org/name[@revision]`.
      dtype, param_dtype: of the computation and of the parameters. scan, remat: see the model's config.
      attention: one of `research.nn.kernels.NAMES`.
      untie: give a model whose output is its token table a projection of its own.
      seed: of the random models.
      places: (logical axes, shapes) -> shardings, where the parameters go straight into their shards.
    Raises ModelError: nothing of that name, or files that are broken or not supported. FlagError: an attention that
    this family has not.
    """
    options = {"dtype": dtype, "param_dtype": param_dtype, "scan": scan, "remat": remat}
    path = None
    if name in SMOKE:
        tokenizer = smoke.smoke_tokenizer()
        config = attending(dataclasses.replace(_smoke_config(name, len(tokenizer)), **options), attention)
        params = _random(config, seed)
    else:
        path = _find(name)
        source = GGUFSource(path) if path.is_file() else hf.SafetensorsSource(path)
        config = source.config if isinstance(source, GGUFSource) else _as_saved(_read_config(path), source)
        config = attending(dataclasses.replace(config, **options), attention)
        shapes, axes = method.base(build(config))
        params = hf.import_params(config, source, None if places is None else places(axes, shapes))
        tokenizer = source.tokenizer() if isinstance(source, GGUFSource) else _tokenizer(path)
    if untie:
        params, config = tie.untie(params, config)
    return Pretrained(name, config, build(config), params, tokenizer, fingerprint(params, config), path)


def load_config(name: str) -> Config:
    """Returns the config alone, of a preset too; no weights are read (of a hub id, config.json is fetched).

    Raises ModelError: nothing of that name.
    """
    if name in SMOKE:
        return _smoke_config(name, len(smoke.smoke_tokenizer()))
    if name in PACKAGED or name in PRESETS:
        return preset(PACKAGED.get(name, name))
    path = _find(name, files=CONFIG_FILES)
    return GGUFSource(path).config if path.is_file() else _read_config(path)


def _find(name: str, files: list[str] | None = None) -> Path:
    """Returns a directory of Hugging Face files, or a GGUF file."""
    path = Path(name).expanduser()
    if name in PACKAGED:
        path = joined.fetch(name) if name in JOINED else assets.fetch(name)
    elif path.is_file():
        if path.suffix == ".safetensors":
            raise ModelError(f"{name} is one file of weights: name its directory, where config.json lies too.")
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: a model is a directory of Hugging Face files or a .gguf file.")
        return path
    elif not path.is_dir():
        return _hub(name, files or HUB_FILES)
    ggufs = sorted(path.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path


def _hub(name: str, files: list[str]) -> Path:
    """Fetches a hub repository's files (or takes them from the hub's own cache)."""
    id_ = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not id_ or name.startswith((".", "/", "~")) or Path(name).suffix in (".gguf", ".safetensors"):
        if name in PRESETS:
            raise ModelError(f"{name!r} is a preset of shapes without weights; name its hub id or a directory instead.")
        shapes = PRESETS if files == CONFIG_FILES else ()  # a preset is enough for counting, not for weights
        hint = did_you_mean(name, [*PACKAGED, *SMOKE, *shapes])
        raise ModelError(f"no model {name!r}: neither packaged, a path that exists, nor a hub id org/name.{hint}")
    import huggingface_hub

    try:
        repo, revision = id_.groups()
        wanted = {"allow_patterns": files, "ignore_patterns": ["*/*"]}
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **wanted))
    except Exception as e:  # which errors come through depends on the hub client's HTTP library
        reason = str(e).strip().splitlines()[0].rstrip(".") if str(e).strip() else type(e).__name__
        hint = did_you_mean(name, [*PACKAGED, *SMOKE])
        raise ModelError(
            f"no local directory {name!r}, and it could not be fetched from the hub ({reason}). "
            f"Packaged models need no hub.{hint}"
        ) from e


def _read_config(directory: Path) -> Config:
    file = directory / "config.json"
    try:
        parsed = json.loads(file.read_text())
    except FileNotFoundError as e:
        raise ModelError(f"{directory}: no config.json, so this is not a directory of Hugging Face files.") from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read as JSON ({e}).") from e
    if not isinstance(parsed, dict):
        raise ModelError(f"{file}: holds a {type(parsed).__name__}, not a JSON object.")
    try:
        return config_from_hf(parsed)
    except UserError as e:
        raise ModelError(f"{file}: {e}") from e


def _as_saved(config: Config, source: hf.Source) -> Config:
    """What config.json leaves open and the file shows: whether BERT has its pooler, T5 an output of its own, and how
    many classes a ViT's head has, if it has one.
    """
    found = {canonical(config, name): shape for name, shape in source.shapes.items()}
    if isinstance(config, BertConfig) and config.pooler:
        return dataclasses.replace(config, pooler="pooler.dense.weight" in found)
    if isinstance(config, T5Config):
        return dataclasses.replace(config, tie_embeddings=LM_HEAD.theirs not in found)
    if isinstance(config, VitConfig):
        return dataclasses.replace(config, num_classes=found.get(VIT_HEAD[0].theirs, (0,))[0])
    return config


def _tokenizer(directory: Path) -> Any:
    """Returns the directory's tokenizer, or None where it has none."""
    if not any((directory / file).exists() for file in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception for a broken file
        raise ModelError(f"{directory}: the tokenizer's files cannot be read ({str(e).splitlines()[0]}).") from e


def _smoke_config(name: str, vocab_size: int) -> Config:
    """Small enough to train in seconds on a CPU, and with every feature of its family that costs nothing."""
    size = {"vocab_size": vocab_size, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    if name == "smoke":
        return BertConfig(**size, max_positions=128)
    return LlamaConfig(**size, num_kv_heads=2, head_dim=8, max_positions=256, tie_embeddings=True)


def _random(config: Config, seed: int) -> tree.PyTree:
    """Random parameters, the same whether scanned or unrolled. Drawn by numpy: compiling `init` would take seconds."""
    model = build(dataclasses.replace(config, scan=True))
    shapes = method.base(model)[0]
    draw = np.random.default_rng(seed)

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith(("scale", "bias")):
            return jnp.full(x.shape, path.endswith("scale"), x.dtype)
        return jnp.asarray(draw.normal(scale=x.shape[-2] ** -0.5, size=x.shape), x.dtype)

    params = tree.map_with_path(leaf, shapes)
    return params if config.scan else unstack(params)
