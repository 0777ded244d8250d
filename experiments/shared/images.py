"""From images of a class to a trained state: the pieces that `vision`'s modes share.

A batch holds uint8 pixels as they are stored; resizing, augmentation and normalising are in the loss, on the device.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import training
from experiments.shared.augmenting import Augment, augmented
from experiments.shared.training import Run
from experiments.shared.vit_base import VitBase
from research.data import images
from research.data.batches import Batches, eval_batches
from research.data.images import Images
from research.errors import DataError, FlagError, did_you_mean
from research.models.stack import stack
from research.models.vit import VitConfig
from research.peft import adapter, tree
from research.peft import method as peft
from research.peft.method import Method, Sites, Variables
from research.tasks import classify
from research.tasks.loss import Loss
from research.train import plot, step
from research.train import state as states
from research.vision import preprocess, transfer


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to train, with rates that fall from the last of the model's layers to the first (BEiT, arXiv 2106.08254)."""

    layer_decay: float = 1.0
    layers: int = 0

    def tx(self) -> optax.GradientTransformation:
        """The optimiser; what a method adds to a layer has that layer's factor."""
        if not 0 < self.layer_decay <= 1:
            raise FlagError(f"layer_decay={self.layer_decay} must be above 0 and at most 1")
        if self.layer_decay == 1:
            return super().tx()

        def scale(updates: Any, _: Any = None) -> Any:
            body = {k: v for k, v in updates.items() if k in ("params", "peft")}
            factors = {k: transfer.layer_decay(v, self.layer_decay, self.layers) for k, v in body.items()}
            return updates | jax.tree.map(jnp.multiply, body, factors)

        return optax.chain(super().tx(), optax.stateless(scale))


class Data(NamedTuple):
    """Parts of uint8 images of any one size; the model's own comes on the device."""

    train: Images
    validation: Images
    test: Images
    fingerprint: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(
    source: str, config: VitConfig, share: float, classes: str | None = None, shots: int | None = None, seed: int = 0
) -> Data:
    """A source of `research.data.images`, or `smoke`.

    Args:
        config: whose size and channels the images of a folder or the hub get.
        share: of the training part that is held out for validation, by content.
        classes: those to keep, such as "0-4" or "bag,shirt"; they are numbered in that order.
        shots: training images of each class; None takes all.
    Raises DataError, and FlagError for classes that there are not.
    """
    train, test = load_parts(source, config)
    if classes is not None:
        chosen = choose(train.classes, classes)
        train, test = images.only(train, chosen), images.only(test, chosen)
    train, validation = images.split(train, share)
    if shots is not None:
        train = images.few_shot(train, shots, seed)
    return Data(train, validation, test, fingerprint(train, validation, test))


def load_parts(source: str, config: VitConfig) -> tuple[Images, Images]:
    """The training and the test part."""
    if source == "smoke":
        return smoke(240, 0), smoke(80, 1)
    if config.channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, and the model wants {config.channels}.")
    return images.load(source, config.image_size, config.channels)


def smoke(rows: int, seed: int, side: int = 12) -> Images:
    """Drawn figures on noise, uint8 [N, 12, 12, 1]: a bar down, a bar across, a square and a diagonal, at any place."""
    rng, names = np.random.default_rng(seed), ("down", "across", "square", "diagonal")
    pixels, labels = rng.integers(0, 60, (rows, side, side, 1)), np.arange(rows, dtype=np.int32) % len(names)
    long, half = side - 4, side // 3
    for image, label in zip(pixels[..., 0], labels, strict=True):
        if label == 3:
            image[np.arange(side), (np.arange(side) + rng.integers(-2, 3)) % side] = 220
            continue
        high, wide = ((long, 2), (2, long), (half, half))[label]
        top, left = rng.integers(0, side - high + 1), rng.integers(0, side - wide + 1)
        image[top : top + high, left : left + wide] = 220
    return Images(pixels.astype(np.uint8), labels, names, tuple(names[i] for i in labels))


def choose(names: Sequence[str], text: str) -> list[int]:
    """The numbers of "bag,shirt", "3,5" or "0-4". FlagError for a class that there is not, or one named twice."""
    found: list[int] = []
    for item in (part.strip() for part in text.split(",")):
        first, dash, last = item.partition("-")
        if item in names:
            found.append(list(names).index(item))
        elif item.isdigit() and int(item) < len(names):
            found.append(int(item))
        elif dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < len(names):
            found += range(int(first), int(last) + 1)
        else:
            hint = did_you_mean(item, names)
            raise FlagError(f"--classes: no class {item!r} among {len(names)} (0-{len(names) - 1}).{hint}")
    if len(set(found)) < max(2, len(found)):
        raise FlagError(f"--classes={text} must name two classes or more, each once.")
    return found


def matching(data: Images, classes: Sequence[str]) -> Images:
    """The rows of the given classes, numbered in their order. DataError where one is missing."""
    if missing := [name for name in classes if name not in data.classes]:
        raise DataError(f"the model knows {', '.join(classes)}; the data has no {missing[0]!r}.")
    return images.only(data, [data.classes.index(name) for name in classes])


def fingerprint(*parts: Images) -> str:
    """The SHA-256 of pixels, labels and class names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.images.shape} {part.classes}".encode())
        digest.update(np.ascontiguousarray(part.images))
        digest.update(np.ascontiguousarray(part.labels))
    return digest.hexdigest()


def statistics(data: Images, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255, one of each channel, to 4 digits."""
    pixels = data.images[:10000].astype(np.float32) / 255
    pixels = np.asarray(preprocess.channels(jnp.asarray(pixels), channels))
    of = lambda x: tuple(round(float(v), 4) for v in x)  # noqa: E731
    return of(pixels.mean(axis=(0, 1, 2))), of(np.maximum(pixels.std(axis=(0, 1, 2)), 0.01))


def arrays(data: Images) -> dict[str, np.ndarray]:
    """A part as leaves, for evaluation."""
    return {"images": data.images, "labels": data.labels}


def batches(data: Images, recipe: training.Recipe, seeds: int | Sequence[int]) -> training.Batch:
    """step -> {"images" uint8 [M, B/M, H, W, C], "labels", "weight" [M, B/M], "draw" int32 [M, B/M, 3]: the row's seed,
    epoch and number}, with a leading axis where there are several seeds.
    """
    source = Batches({"row": np.arange(len(data.labels))}, recipe.batch_size, seeds, recipe.micro_batches)
    own = np.asarray(source.seeds)[:, None, None] if source.several else np.asarray(source.seeds[0])

    def batch(step: int) -> dict[str, np.ndarray]:
        found = source.batch(step)
        rows, stream = found["row"], np.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        epochs = (stream // source.rows).reshape(rows.shape[-2:])
        draw = np.stack(np.broadcast_arrays(own, epochs, rows), axis=-1).astype(np.int32)
        return {"images": data.images[rows], "labels": data.labels[rows], "weight": found["weight"], "draw": draw}

    return batch


def pixels(base: VitBase) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """(uint8 [B, H, W, C] -> float [B, S, S, C] in [0, 1], that -> what the model sees)."""
    size, count = base.config.image_size, base.config.channels

    def one(image: jax.Array) -> jax.Array:
        image = preprocess.channels(preprocess.to_float(image), count)
        return preprocess.centre_crop(preprocess.resize(image, size), size)

    return jax.vmap(one), lambda x: preprocess.normalise(x, base.mean, base.std)


# ------------------------------------------------------------------------------------------------------------ training


def loss(base: VitBase, classes: int, chosen: Augment | None = None) -> step.LossFn:
    """`classify.loss` of stored pixels, augmented in training: where there is an rng and the batch has `draw`."""
    sized, normal = pixels(base)
    plain = classify.loss(base.model)

    def fn(variables: Variables, batch: dict, rng: jax.Array | None) -> Loss:
        x, labels = sized(batch["images"]), batch["labels"]
        if chosen and rng is not None and "draw" in batch:
            x, labels = augmented(chosen, batch["draw"], x, labels, classes)
        rest = {"weight": batch["weight"]} if "weight" in batch else {}
        return plain(variables, {"images": normal(x), "labels": labels} | rest, rng)

    return fn


def start(
    base: VitBase,
    spec: str,
    data: Images,
    recipe: Recipe,
    seeds: int | Sequence[int],
    chosen: Augment | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Run:
    """Attaches the method and a head of the data's classes."""
    classes = len(data.classes)
    heads = lambda rng: {"head": classify.init_head(rng, base.config.hidden_size, classes)}  # noqa: E731

    def feed(seed: int) -> training.Batch:
        rows = batches(data, replace(recipe, micro_batches=1), seed)
        return lambda i: {name: leaf[0] for name, leaf in rows(i).items()}

    recipe = replace(recipe, layers=base.config.num_layers)
    return training.start(base, spec, loss(base, classes, chosen), recipe, seeds, heads=heads, feed=feed, mesh=mesh)


def predictor(base: VitBase, method: Method, sites: Sites) -> Callable[[Variables, Images], np.ndarray]:
    """(variables of one run, a part) -> the class numbers of its N rows, [N]."""
    sized, normal = pixels(base)

    @jax.jit
    def predict(variables: Variables, x: jax.Array) -> jax.Array:
        z = classify.logits(base.model, peft.realised(method, variables, sites), {"images": normal(sized(x))})
        return jnp.argmax(z, axis=-1)

    def labels(variables: Variables, data: Images) -> np.ndarray:
        found = [predict(variables, batch["images"]) for batch in eval_batches(arrays(data), 100)]
        return np.concatenate([tree.whole(x) for x in found])[: len(data.labels)]

    return labels


def save_adapter(
    directory: Any, base: VitBase, spec: str, run: Run, state: states.TrainState, classes: Sequence[str], **more: Any
) -> int:
    """Saves what a single run has trained; returns its bytes."""
    named = {"name": base.name, "fingerprint": base.fingerprint}
    variables = state.variables(run.frozen)
    return adapter.save(directory, spec, variables, run.sites, named, task="image", classes=list(classes), **more)


def attach(loaded: adapter.Adapter, base: VitBase, sites: Sites, force: bool = False) -> Variables:
    """The variables of base and adapter. ModelError where they do not fit."""
    classes = loaded.meta["classes"]
    head = jax.eval_shape(lambda: classify.init_head(jax.random.key(0), base.config.hidden_size, len(classes)))
    return adapter.attach(loaded, base.params, sites, base.fingerprint, force, head)


def trained_base(base: VitBase, run: Run, state: states.TrainState, classes: Sequence[str]) -> VitBase:
    """The base that a run of `full` has made, with its head; its layers are stacked, as files have them."""
    variables = jax.tree.map(tree.whole, state.variables(run.frozen))
    return replace(base, params=stack(variables["params"]), head=variables["head"], classes=tuple(classes))


# ------------------------------------------------------------------------------------------------------------- results


def confusion(found: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int [C, C]: how many rows of each true class were taken for each."""
    return np.bincount(labels * classes + found, minlength=classes**2).reshape(classes, classes)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], png: Path) -> None:
    """A confusion matrix as a picture: colour is the share of the true class, numbers are rows."""
    count, share = len(classes), matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(14.0, 2.5 + 0.5 * count)
    figure = plot.figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {np.trace(matrix) / max(1, matrix.sum()):.4f}")
    if count <= 30:  # beyond that neither names nor numbers can be read
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
        for (row, column), number in np.ndenumerate(matrix):
            tone = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, int(number), ha="center", va="center", fontsize=7, color=tone)
    plot.save(figure, png)
