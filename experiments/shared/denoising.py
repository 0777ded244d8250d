"""From images to a denoiser and its samples: the pieces that `diffusion`, its table and `sample_images` share.

A denoiser is trained on some of its classes. Each class that an adapter brings gets a row of its own in the table of
labels: the task's head, which trains with every method and lies in the adapter (`with_rows`).
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common, own_model
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
SMOKE_CLASSES = ("horizontal", "vertical", "square", "cross")


@dataclass(frozen=True)
class Setting:
    """What a denoiser was trained for, beside its shapes: the process and what is predicted of it, the names of all
    classes and the numbers of those that it saw. `sigma_data`: the standard deviation of its images.
    """

    process: str
    shift: float
    predict: str
    label_dropout: float
    sigma_data: float
    classes: tuple[str, ...]
    trained: tuple[int, ...]

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


def load(directory: str | Path) -> Denoiser:
    """Reads a saved denoiser. Raises ModelError."""
    found = own_model.load(directory, "diffusion")
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in found.record["setting"].items()}
        setting = Setting(**fields)
        setting.make_process()
    except (KeyError, TypeError, AttributeError, FlagError) as error:
        raise ModelError(f"model {directory} is damaged: its setting can't be read ({error}).") from None
    name = str(directory)
    return Denoiser(name, found.config, found.model, found.params, setting, fingerprint(found.params, found.config))


def fresh(name: str, config: Any, setting: Setting, seed: int) -> Denoiser:
    """One with new parameters."""
    model = own_model.module(config)
    params = own_model.fresh(model, seed)
    return Denoiser(name, config, model, params, setting, fingerprint(params, config))


# ------------------------------------------------------------------------------------------------- images and classes


def load_images(source: str, size: int | None = None, channels: int | None = None) -> tuple[Images, Images]:
    """The training and the test part of an image set; "smoke" is tiny and drawn here. Raises DataError."""
    return (stripes(160, 0), stripes(96, 1)) if source == "smoke" else image_data.load(source, size, channels)


def stripes(count: int, seed: int) -> Images:
    """`count` grey images of 8x8 in four classes, each a bright figure somewhere on a dark ground."""
    draw, images = np.random.default_rng(seed), np.zeros((count, 8, 8, 1), np.uint8)
    labels = np.arange(count, dtype=np.int32) % len(SMOKE_CLASSES)
    for image, label in zip(images, labels, strict=True):
        y, x = draw.integers(1, 6, 2)
        tall, wide = ((slice(y, y + 2), slice(0, 8)), (slice(0, 8), slice(x, x + 2)))
        places = ([tall], [wide], [(slice(y, y + 2), slice(x, x + 2))], [tall, wide])[label]
        for place in places:
            image[place] = draw.integers(180, 256)
    names = tuple(SMOKE_CLASSES[label] for label in labels)
    return Images(images, labels, SMOKE_CLASSES, names)


def choose(text: str | None, classes: Sequence[str]) -> tuple[int, ...]:
    """Class numbers from "8,9", "0-7" or names; all of them without a text. FlagError names what there is."""
    if text is None:
        return tuple(range(len(classes)))
    found: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if part in classes:
            found.append(list(classes).index(part))
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            found += range(int(first), int(last or first) + 1)
        else:
            raise FlagError(f"--classes: there is no class {part!r}.{did_you_mean(part, classes)}")
    if beyond := [n for n in found if n >= len(classes)]:
        raise FlagError(f"--classes: there is no class {beyond[0]}. Valid: 0-{len(classes) - 1}.")
    if not found or len(set(found)) < len(found):
        raise FlagError(f"--classes={text} names {'no class' if not found else 'a class twice'}.")
    return tuple(sorted(found))


def of_classes(data: Images, classes: Sequence[int], count: int = 0, seed: int = 0) -> Images:
    """The rows of the given classes, with their own numbers; `count` of each where it is not 0.

    Raises DataError for a class without images, or with fewer.
    """
    if empty := [data.classes[c] for c in classes if not (data.labels == c).any()]:
        raise DataError(f"class {empty[0]!r} has no images: leave it out of --classes.")
    if count:
        return image_data.few_shot(data, count, seed, classes)
    return data if len(classes) == len(data.classes) else data.take(np.flatnonzero(np.isin(data.labels, classes)))


def evenly(data: Images, count: int) -> Images:
    """`count` rows, the classes taking turns; all rows where there are no more."""
    place = np.zeros(len(data.labels), np.int64)  # of a row among those of its class
    for label in np.unique(data.labels):
        own = data.labels == label
        place[own] = np.arange(own.sum())
    return data.take(np.lexsort((data.labels, place))[:count])


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 -> fp32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


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


Draw = Callable[[Variables, jax.Array, jax.Array, jax.Array], jax.Array]


def times(process: Process, sampling: Sampling) -> np.ndarray:
    """The grid that suits sampler and process. Raises FlagError for too few steps."""
    if sampling.sampler == "dpmpp_2m" and process.name != "edm":
        return processes.log_snr_times(process, sampling.sample_steps)
    grid = processes.karras_times if process.name == "edm" else processes.even_times
    return grid(process, sampling.sample_steps)


def drawer(base: Denoiser, sampling: Sampling, method: Method | None = None, new: Sequence[int] = ()) -> Draw:
    """Returns (variables, labels [B], index [B], rng) -> uint8 [B, H, W, C]; `index`: an image's place in its set.

    Raises FlagError: guidance of a model that never saw an image without its class, or that has none.
    """
    process, setting, c = base.setting.make_process(), base.setting, base.config
    sites, conditional = peft.sites(base.model), c.num_classes > 0
    samplers.sampler(sampling.sampler)
    guidance = None
    if sampling.guidance != 1:
        if not conditional:
            raise FlagError(f"--guidance={sampling.guidance:g} needs a model with classes: this one is unconditional.")
        if setting.label_dropout == 0:
            raise FlagError(
                f"--guidance={sampling.guidance:g} needs a model that also learnt images without their class: this one "
                "was trained with --label_dropout=0."
            )
        guidance = Guidance(sampling.guidance, c.num_classes, (sampling.low, sampling.high), sampling.rescale)
    grid, shape = times(process, sampling), (c.image_size, c.image_size, c.channels)

    @jax.jit
    def draw(variables: Variables, labels: jax.Array, index: jax.Array, rng: jax.Array) -> jax.Array:
        v = with_rows(variables if method is None else peft.realised(method, variables, sites), new)
        denoise = denoiser(
            lambda x, t, y: base.model.apply(v, x, t, y), process, setting.predict,
            labels if conditional else None, guidance, setting.sigma_data,
        )  # fmt: skip
        x = samplers.sample(sampling.sampler, denoise, process, grid, rng, index, shape)
        return jnp.round(127.5 * (jnp.clip(x, -1, 1) + 1)).astype(jnp.uint8)

    return draw


def generate(draw: Draw, variables: Variables, labels: np.ndarray, seed: int = 0, batch: int = 0) -> np.ndarray:
    """labels int [N] -> uint8 [N, H, W, C]. Image n is a function of (seed, n, label) alone, whatever the batch: all of
    them, at most 256, where it is 0. Each size of a batch is a shape to compile.
    """
    devices, rng = jax.device_count(), jax.random.key(seed)
    batch = -(-(batch or min(256, len(labels))) // devices) * devices  # a mesh shares its rows out
    found = []
    for start in range(0, len(labels), batch):
        index = np.minimum(np.arange(start, start + batch), len(labels) - 1)
        found.append(tree.whole(draw(variables, labels[index].astype(np.int32), index, rng)))
    return np.concatenate(found)[: len(labels)]


def in_turn(classes: Sequence[int], count: int) -> np.ndarray:
    """`count` labels, the classes taking turns."""
    return np.asarray(classes, np.int32)[np.arange(count) % len(classes)]


def sheet(images: np.ndarray, columns: int, names: Sequence[str] = (), zoom: int = 2, gap: int = 2) -> bytes:
    """uint8 [N, H, W, C], row by row, each with its name in front -> a PNG; what is missing of a row stays white."""
    from PIL import Image, ImageDraw

    count, height, width, channels = images.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for n, image in enumerate(images):
        top, left = gap + n // columns * (height + gap), gap + n % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    page = page.repeat(zoom, axis=0).repeat(zoom, axis=1)
    margin = 8 * max(map(len, names), default=0)
    whole = Image.new("RGB", (page.shape[1] + margin, page.shape[0]), "white")
    whole.paste(Image.fromarray(page[..., 0] if channels == 1 else page).convert("RGB"), (margin, 0))
    for row, name in enumerate(names):
        ImageDraw.Draw(whole).text((4, zoom * (gap + row * (height + gap) + height // 2) - 6), name, fill="black")
    written = io.BytesIO()
    whole.save(written, "png")
    return written.getvalue()


def sized(config: Any, data: Images, conditional: bool, **shape: int | None) -> Any:
    """A preset's configuration for the images at hand: their size, channels and classes, and what `shape` gives of
    patch, width and layers. Raises DataError for images that are not square or whose size the patch doesn't divide,
    FlagError for an option that the model has not.
    """
    height, width, channels = data.images.shape[1:]
    if height != width:
        raise DataError(f"the images are {height}x{width}: give --size, and they are cut to squares.")
    fields = {"image_size": height, "channels": channels, "learn_sigma": False, "text_features": 0}
    fields |= {"num_classes": len(data.classes) if conditional else 0}
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
