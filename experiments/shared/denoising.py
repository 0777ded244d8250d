"""A denoiser of images and its samples: the pieces that `diffusion`, its table and `sample_images` share.

A denoiser is told the class of an image, its caption, or nothing. One that is told the class is trained on some of its
classes; each class that an adapter brings gets a row of its own in the table of labels: the task's head, which trains
with every method and lies in the adapter (`with_rows`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import captions, common, own_model
from experiments.shared.pictures import in_turn
from research.convert.fingerprint import fingerprint
from research.data import images as image_data
from research.data.images import Images
from research.diffusion import process as processes
from research.diffusion import samplers
from research.diffusion.denoiser import Guidance, denoiser
from research.diffusion.process import Process
from research.errors import DataError, FlagError, ModelError, did_you_mean
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import tree
from research.peft.method import Method, PyTree, Variables
from research.tasks.loss import model_variables

PROCESSES = ("flow", "cosine", "linear", "cosine_zero_snr", "linear_zero_snr", "edm")
LABELS = ("condition", "labels", "embedding")  # the table of labels, in every denoiser


@dataclass(frozen=True)
class Setting:
    """What a denoiser was trained for, beside its shapes: the process and what is predicted of it, the names of all
    classes and the numbers of those that it saw. `sigma_data`: the standard deviation of its images. `encoder`: name
    and fingerprint of the model by which it is told captions, if it is.
    """

    process: str
    shift: float
    predict: str
    label_dropout: float
    sigma_data: float
    classes: tuple[str, ...]
    trained: tuple[int, ...]
    encoder: tuple[str, ...] = ()

    def make_process(self) -> Process:
        """The process. Raises FlagError for an unknown name, or a shift of what has none."""
        if self.process not in PROCESSES:
            raise FlagError(f"unknown process {self.process!r}.{did_you_mean(self.process, PROCESSES)}")
        if self.process == "flow":
            return processes.flow(self.shift)
        if self.shift != 1:
            raise FlagError(f"--shift={self.shift:g} is flow's alone: leave it away with --process={self.process}.")
        if self.process == "edm":
            return processes.edm()
        made = processes.cosine() if self.process.startswith("cosine") else processes.linear()
        return processes.zero_snr(made) if self.process.endswith("zero_snr") else made


@dataclass(frozen=True)
class Denoiser:
    """A model and what belongs to it: the trainer's `Base`."""

    name: str
    config: Any
    model: nn.Module
    params: PyTree
    setting: Setting
    fingerprint: str
    tokenizer: None = None

    def save(self, directory: Path) -> int:
        """Writes it as a directory; returns its bytes."""
        setting = common.jsonable(self.setting)
        return own_model.save(directory, "diffusion", self.config, self.params, setting=setting)

    def told(self, data: Images) -> dict[str, np.ndarray]:
        """What the model is told of images: {"labels": int32 [N]}, {"text": fp32 [N, E]} or nothing."""
        if self.config.text_features:
            return {"text": self.read(data.captions)}
        return {"labels": data.labels} if self.config.num_classes else {}

    def told_in_turn(self, classes: Sequence[int], count: int) -> dict[str, np.ndarray]:
        """What it is told of `count` images of classes that take turns; nothing where it has none."""
        return {"labels": in_turn(classes, count)} if self.config.num_classes else {}

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as the model was told them. Raises ModelError where the encoder is no more what it was."""
        name, known = self.setting.encoder
        if captions.encoder(name).base.fingerprint != known:
            raise ModelError(f"{self.name} was told captions by {name} ({known}), which has other weights now.")
        return captions.encode(name, texts)


def load(directory: str | Path) -> Denoiser:
    """Reads a saved denoiser. Raises ModelError."""
    found = own_model.load(directory, "diffusion")
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in found.record["setting"].items()}
        setting = Setting(**fields)
        setting.make_process()
        if len(setting.encoder) != (2 if found.config.text_features else 0):
            raise TypeError(f"encoder {setting.encoder}")
    except (KeyError, TypeError, AttributeError, FlagError) as error:
        raise ModelError(f"model {directory} is damaged: its setting can't be read ({error}).") from None
    name = str(directory)
    return Denoiser(name, found.config, found.model, found.params, setting, fingerprint(found.params, found.config))


def fresh(name: str, config: Any, setting: Setting, seed: int) -> Denoiser:
    """One with new parameters."""
    model = own_model.module(config)
    params = own_model.fresh(model, seed)
    return Denoiser(name, config, model, params, setting, fingerprint(params, config))


# ------------------------------------------------------------------------------------------------ rows of new classes


def new_rows(base: Denoiser, count: int, rng: jax.Array) -> Variables:
    """The head of `count` new classes, {"labels": {"rows": [K, D]}}: each starts as the mean of the classes that the
    base knows, and a little off it.
    """
    table = base.params[LABELS[0]][LABELS[1]][LABELS[2]]
    mean = table[jnp.asarray(base.setting.trained)].mean(0)
    return {"labels": {"rows": mean + 0.02 * jax.random.normal(rng, (count, *mean.shape))}}


def with_rows(variables: Variables, new: Sequence[int]) -> Variables:
    """What the model is applied with: the head's rows stand in the table of labels, at the classes `new`."""
    read = model_variables(variables)
    if not new:
        return read
    a, b, c = LABELS
    params = read["params"]
    table = params[a][b][c].at[jnp.asarray(new)].set(variables["head"]["labels"]["rows"])
    return read | {"params": params | {a: params[a] | {b: params[a][b] | {c: table}}}}


def attach(base: Denoiser, directory: str, force: bool = False) -> tuple[adapters.Adapter, Variables, tuple[int, ...]]:
    """(adapter, the variables of both, the classes that it brings). Raises ModelError as `adapter.attach` does."""
    loaded = adapters.load(directory)
    if loaded.meta.get("task") != "diffusion":
        raise ModelError(f"adapter {directory} is for task {loaded.meta.get('task')!r}, not 'diffusion'.")
    new = loaded.meta.get("new")
    if not isinstance(new, list) or not all(type(n) is int and 0 <= n < len(base.setting.classes) for n in new):
        raise ModelError(f"adapter {directory} is damaged: its adapter.json has no valid 'new'.")
    head = jax.eval_shape(lambda: new_rows(base, len(new), jax.random.key(0))) if new else None
    sites = peft.sites(base.model)
    variables = adapters.attach(loaded, base.params, sites, base.fingerprint, force, head)
    return loaded, variables, tuple(new)


# ------------------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; `guidance` 1 is the conditional model's own."""

    sampler: str = "heun"
    sample_steps: int = 12
    guidance: float = 1.0
    low: float = 0.0
    high: float = float("inf")
    rescale: float = 0.0


Draw = Callable[[Variables, dict[str, jax.Array], jax.Array, jax.Array], jax.Array]


def times(process: Process, sampling: Sampling) -> np.ndarray:
    """The grid that suits sampler and process. Raises FlagError for too few steps."""
    if sampling.sampler == "dpmpp_2m" and process.name != "edm":
        return processes.log_snr_times(process, sampling.sample_steps)
    grid = processes.karras_times if process.name == "edm" else processes.even_times
    return grid(process, sampling.sample_steps)


def drawer(base: Denoiser, sampling: Sampling, method: Method | None = None, new: Sequence[int] = ()) -> Draw:
    """Returns (variables, told, index [B], rng) -> uint8 [B, H, W, C]; told: labels [B], text [B, E] or nothing, as
    `Denoiser.told` has it; `index`: an image's place in its set.

    Raises FlagError: guidance of a model that never saw an image without its class or caption, or that is told neither.
    """
    process, setting, c = base.setting.make_process(), base.setting, base.config
    sites = peft.sites(base.model)
    samplers.sampler(sampling.sampler)
    guidance = None
    if sampling.guidance != 1:
        if not (c.num_classes or c.text_features):
            raise FlagError(
                f"--guidance={sampling.guidance:g} needs a model with classes or captions: this one is unconditional."
            )
        if setting.label_dropout == 0:
            raise FlagError(
                f"--guidance={sampling.guidance:g} needs a model that also learnt images of which it was told nothing: "
                "this one was trained with --label_dropout=0."
            )
        guidance = Guidance(sampling.guidance, c.num_classes, (sampling.low, sampling.high), sampling.rescale)
    grid, shape = times(process, sampling), (c.image_size, c.image_size, c.channels)

    @jax.jit
    def draw(variables: Variables, told: dict[str, jax.Array], index: jax.Array, rng: jax.Array) -> jax.Array:
        v = with_rows(variables if method is None else peft.realised(method, variables, sites), new)
        kind = next(iter(told), "labels")
        network = lambda x, t, y: base.model.apply(v, x, t, **{kind: y})  # noqa: E731
        denoise = denoiser(network, process, setting.predict, told.get(kind), guidance, setting.sigma_data)
        x = samplers.sample(sampling.sampler, denoise, process, grid, rng, index, shape)
        return jnp.round(127.5 * (jnp.clip(x, -1, 1) + 1)).astype(jnp.uint8)

    return draw


def generate(
    draw: Draw, variables: Variables, told: dict[str, np.ndarray], count: int, seed: int = 0, batch: int = 0
) -> np.ndarray:
    """-> uint8 [N, H, W, C], N = `count`. Image n is a function of (seed, n, what is told of it) alone, whatever the
    batch: all of them, at most 256, where it is 0. Each size of a batch is a shape to compile.
    """
    devices, rng = jax.device_count(), jax.random.key(seed)
    batch = -(-(batch or min(256, count)) // devices) * devices  # a mesh shares its rows out
    found = []
    for start in range(0, count, batch):
        index = np.minimum(np.arange(start, start + batch), count - 1)
        found.append(tree.whole(draw(variables, {k: leaf[index] for k, leaf in told.items()}, index, rng)))
    return np.concatenate(found)[:count]


def sized(config: Any, data: Images, num_classes: int, text_features: int, **shape: int | None) -> Any:
    """A preset's configuration for the images at hand: their size and channels, what is told of them, and what `shape`
    gives of patch, width and layers. Raises DataError for images that are not square or whose size the patch doesn't
    divide, FlagError for an option that the model has not.
    """
    height, width, channels = data.images.shape[1:]
    if height != width:
        raise DataError(f"the images are {height}x{width}: give --size, and they are cut to squares.")
    fields = {"image_size": height, "channels": channels, "learn_sigma": False}
    fields |= {"num_classes": num_classes, "text_features": text_features}
    given = {name: value for name, value in shape.items() if value is not None}
    if config.family == "unet":
        if wrong := given.keys() - {"width"}:
            raise FlagError(f"--{min(wrong)} is the transformer's: a UNet has --width alone.")
        fields |= {"head_dim": given["width"]} | given if given else {}
    else:
        size = given.get("width", config.hidden_size)
        head = 32 if size % 32 == 0 else size
        fields |= {"patch": given.get("patch", config.patch), "num_layers": given.get("layers", config.num_layers)}
        fields |= {"hidden_size": size, "intermediate_size": 4 * size, "num_heads": size // head}
        image_data.fits(data, fields["patch"])
    return dataclasses.replace(config, **fields)
