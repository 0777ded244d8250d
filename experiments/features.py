"""Trains the feature network of the Frechet distance: a small classifier, whose classes also tell whether a sample
shows what it was asked for.

    python -m experiments.features                                   # Fashion-MNIST; writes runs/features/model
    python -m experiments.features --data=photos --size=32           # for a folder of images by class
    python -m experiments.diffusion --features=runs/features/model

Differs from `vision`, which compares ways to adapt a ViT: this network is small, quick and for measuring alone. A
distance depends on it, so that its hash is a part of its name, and it is made once. `--features` elsewhere takes
such a directory, `packaged` (the one for Fashion-MNIST in this folder), or `pixels`, which needs no network.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.shared import common, own_model, training
from experiments.shared.dry_run import dry_run
from experiments.shared.pictures import choose, evenly, load_images, of_classes, to_float
from research.convert.fingerprint import fingerprint
from research.data.batches import Batches, eval_batches
from research.data.images import FASHION, Images
from research.diffusion import frechet
from research.diffusion.features import Features, FeaturesConfig
from research.errors import DataError, ModelError
from research.peft import tree
from research.tasks.loss import Loss, cross_entropy
from research.train.lock import lock

PACKAGED = Path(__file__).parent / "fashion_mnist_features"
NOISE = 0.1  # of the ladder's noisy images, whose pixels are in [0, 1]
MOST_PIXELS = 4096  # that a Gaussian of them is made for: its covariance has their square
HELD_OUT = 2000  # test images looked at while it trains


class Network(NamedTuple):
    """`name` carries the weights' hash. `read`: uint8 [B, H, W, C] -> features [B, F], classes int [B] or None."""

    name: str
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]

    def measure(self, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> tuple[frechet.Moments, float | None]:
        """Moments of uint8 [N, H, W, C], and the share of them that the network sees as their labels [N]."""
        parts = [self.read(images[i : i + batch]) for i in range(0, len(images), batch)]
        moments = frechet.moments(np.concatenate([features for features, _ in parts]), self.name)
        if parts[0][1] is None:
            return moments, None
        return moments, float((np.concatenate([classes for _, classes in parts]) == labels).mean())


def network(name: str, data: Images) -> Network:
    """The feature network for such images: a directory, "packaged", "pixels", or "auto", which is the packaged one for
    the images that it learnt from and pixels for others. Its classes count where they are the images' own.

    Raises ModelError where it does not fit.
    """
    shape = data.images.shape[1:]
    if name == "auto":
        name = "packaged" if data.classes == FASHION and shape == (28, 28, 1) and PACKAGED.is_dir() else "pixels"
    if name == "pixels":
        return Network(frechet.network_name("pixels", {}), _pixels)
    found = own_model.load(PACKAGED if name == "packaged" else name, "features")
    c = found.config
    if (c.image_size, c.image_size, c.channels) != shape:
        wants = f"{c.image_size}x{c.image_size}x{c.channels}"
        raise ModelError(f"feature network {name} reads images of {wants}, not {'x'.join(map(str, shape))}.")
    apply, knows = jax.jit(lambda x: found.model.apply({"params": found.params}, x)), found.record.get("classes")

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        features, logits = jax.device_get(apply(to_float(images)))
        return features, logits.argmax(axis=-1) if knows == list(data.classes) else None

    leaves = {path: np.asarray(x) for path, x in tree.paths(found.params).items()}
    return Network(frechet.network_name("features", leaves), read)


def _pixels(images: np.ndarray) -> tuple[np.ndarray, None]:
    """Means over squares of a seventh of the side: no weights, little power."""
    side = max(1, images.shape[1] // 7)
    cut = images[:, : images.shape[1] // side * side, : images.shape[2] // side * side] / 255.0
    blocks = cut.reshape(len(cut), cut.shape[1] // side, side, cut.shape[2] // side, side, -1).mean((2, 4))
    return blocks.reshape(len(cut), -1), None


def gaussians(data: Images, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """What the pixels' mean and covariance know of each class: uint8 [N, H, W, C], an image of each label [N].

    Raises DataError for a class with fewer than two images.
    """
    rng, found = np.random.default_rng(seed), np.zeros((len(labels), *data.images.shape[1:]), np.uint8)
    for label in np.unique(labels):
        own = data.images[data.labels == label].reshape(-1, found[0].size).astype(np.float32)
        if len(own) < 2:
            raise DataError(f"class {data.classes[label]!r} has {len(own)} training images: a Gaussian needs two.")
        values, vectors = np.linalg.eigh(np.cov(own.T))
        root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        draws = own.mean(0) + rng.normal(size=(int((labels == label).sum()), len(root))).astype(np.float32) @ root.T
        found[labels == label] = np.clip(np.round(draws), 0, 255).astype(np.uint8).reshape(-1, *found.shape[1:])
    return found


def ladder(net: Network, train: Images, real: Images) -> list[dict[str, Any]]:
    """What the distance is of images whose quality is known, against the N real ones: as many other real images, the
    real ones with noise, and class-wise Gaussians of pixels, which a model has to beat.
    """
    rng, (target, own) = np.random.default_rng(0), net.measure(real.images, real.labels)
    noisy = real.images + 255 * NOISE * rng.normal(size=real.images.shape)
    others = evenly(train, len(real.labels))
    rungs = {
        "real (training part)": (others.images, others.labels),
        f"real + noise {NOISE:g}": (np.clip(np.round(noisy), 0, 255).astype(np.uint8), real.labels),
    }
    if real.images[0].size <= MOST_PIXELS:
        rungs["class-wise Gaussian"] = (gaussians(train, real.labels), real.labels)
    rows = [{"images": "real (these)", "n": len(real.labels), "frechet": 0.0, "consistency": own}]
    return rows + [score(net, name, *rung, target) for name, rung in rungs.items()]


def score(net: Network, name: str, images: np.ndarray, labels: np.ndarray, target: frechet.Moments) -> dict[str, Any]:
    """One row: distance and class consistency of images. Raises DataError where their number is not the target's."""
    moments, consistency = net.measure(images, labels)
    row = {"images": name, "n": len(images), "frechet": frechet.distance(moments, target)}
    return row | {"consistency": consistency}


# ------------------------------------------------------------------------------------------------------------- script


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("data", "fashion-mnist", "Packaged image set, folder of images by class, hub:ID, or smoke.")
    flags.DEFINE_integer("size", None, "Side in pixels that a folder's images get.", lower_bound=4)
    flags.DEFINE_enum("channels", None, ["1", "3"], "Of a folder's images.")
    flags.DEFINE_integer("width", 16, "Channels of the first convolution.", lower_bound=1)
    flags.DEFINE_integer("dimensions", 128, "Features F.", lower_bound=1)
    training.recipe_flags(learning_rate=2e-3, steps=2000, batch_size=128, schedule="cosine", weight_decay=0.05)
    training.run_flags("runs/features", eval_every=500, save_every=500)


def loss(model: Features) -> Callable[..., Loss]:
    """Cross-entropy of {"images" [B, H, W, C], "labels" [B], "weight" [B]}."""

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        _, logits = model.apply({"params": variables["params"]}, batch["images"])
        weight, total = batch["weight"], jnp.sum(batch["weight"])
        right = jnp.sum((jnp.argmax(logits, axis=-1) == batch["labels"]) * weight)
        return Loss(jnp.sum(cross_entropy(logits, batch["labels"]) * weight), total, {"accuracy": (right, total)})

    return fn


class Classifier(NamedTuple):
    """The trainer's `Base`."""

    name: str
    model: Features
    params: Any
    fingerprint: str
    tokenizer: None = None


def main() -> None:
    values = flags.FLAGS
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    train, test = load_images(values.data, values.size, None if values.channels is None else int(values.channels))
    of_classes(train, choose(None, train.classes)), of_classes(test, choose(None, test.classes))  # none is empty
    height, width, channels = train.images.shape[1:]
    if height != width or height < 4:
        raise DataError(f"the images are {height}x{width}: give --size, and they are cut to squares.")
    with training.use_mesh(values.mesh) as mesh, lock(workdir):
        config = FeaturesConfig(height, channels, values.width, values.dimensions, len(train.classes))
        model = Features(config)
        params = own_model.fresh(model, values.seed)
        base = Classifier("features", model, params, fingerprint(params, config))
        run = training.start(base, "full", loss(model), recipe, values.seed, mesh=mesh)
        print(training.summary(base, "full", run))
        rows = Batches({"images": train.images, "labels": train.labels}, recipe.batch_size, values.seed,
                       recipe.micro_batches)  # fmt: skip
        batch = lambda step: (found := rows.batch(step)) | {"images": to_float(found["images"])}  # noqa: E731
        if values.dry_run:
            return print(dry_run(run, batch, recipe, mesh, f"classes {', '.join(train.classes)}"))
        held = evenly(test, HELD_OUT)
        identity = {
            "data": fingerprint({"images": train.images, "labels": train.labels}), "seed": values.seed,
            "recipe": common.jsonable(recipe), "config": common.jsonable(config),
        }  # fmt: skip
        result = training.train(
            run, batch, recipe, workdir, identity, mesh=mesh, label="features", eval_every=values.eval_every,
            save_every=values.save_every, curve=("loss", "eval/loss", "eval/accuracy"),
            evaluate=training.evaluator(run, arrays(held)),
        )  # fmt: skip
        scores = run.evaluate(result.state, run.frozen, eval_batches(arrays(test), 500))
        trained = jax.device_get(result.state.variables(run.frozen)["params"])
        size = own_model.save(
            workdir / "model", "features", config, trained, half=True, classes=train.classes,
            accuracy=scores["accuracy"], data=values.data,
        )  # fmt: skip
    found = network(str(workdir / "model"), train)
    print(f"{found.name}: test accuracy {scores['accuracy']:.4f} over {len(test.labels)} images")
    print(f"feature network: {workdir / 'model'} ({size:,} bytes)")


def arrays(data: Images) -> dict[str, np.ndarray]:
    """The leaves of a part, for evaluation."""
    return {"images": to_float(data.images), "labels": data.labels}


if __name__ == "__main__":
    define_flags()
    common.run(main)
