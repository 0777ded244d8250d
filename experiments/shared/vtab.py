"""The tasks of the vision table: VTAB-1k (arXiv 1910.04867), and a few of its shape that need no hub, on a CPU.

    VTAB     19 tasks in three groups, 1,000 training images each, all test images, accuracy
    SMALL    the same shape from the packaged sets: two of natural images, three that are drawn from Fashion-MNIST's

`load(name, ...)` gives a task's 1,000 training rows and its test part. VTAB takes the first 1,000 rows of TensorFlow
Datasets' own order; the hub's files have another, so ours are 1,000 drawn by --seed: means agree, rows do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.shared import images as pieces
from research.data import images, rows
from research.data.batches import permutation
from research.data.images import Images
from research.errors import DataError, FlagError, did_you_mean
from research.models.vit import VitConfig

GROUPS = ("natural", "specialised", "structured")
TRAIN = 1000  # training images of a task; its last fifth is for tuning


@dataclass(frozen=True)
class Task:
    """group: of GROUPS. source: for `research.data.images.load`, or a hub id with columns of its own. classes: how many
    there are, or which of the source's ("5-9"). draw: what makes the task's images of the source's, by name.
    """

    group: str
    source: str
    classes: int | str | None = None
    train: str = "train"
    test: str = "test"
    draw: str | None = None
    rows: int | None = None  # of the test part; None: all
    metric: str = "accuracy"


def _hub(group: str, name: str, classes: int) -> Task:
    return Task(group, f"clip-benchmark/wds_{name}", classes)


VTAB = {
    "cifar100": _hub("natural", "vtab-cifar100", 100),
    "caltech101": _hub("natural", "vtab-caltech101", 102),
    "dtd": _hub("natural", "vtab-dtd", 47),
    "flowers102": _hub("natural", "vtab-flowers", 102),
    "pets": _hub("natural", "vtab-pets", 37),
    "svhn": _hub("natural", "vtab-svhn", 10),
    "sun397": _hub("natural", "sun397", 397),
    "camelyon": _hub("specialised", "vtab-pcam", 2),
    "eurosat": _hub("specialised", "vtab-eurosat", 10),
    "resisc45": _hub("specialised", "vtab-resisc45", 45),
    "retinopathy": _hub("specialised", "vtab-diabetic_retinopathy", 5),
    "clevr-count": _hub("structured", "vtab-clevr_count_all", 8),
    "clevr-distance": _hub("structured", "vtab-clevr_closest_object_distance", 6),
    "dmlab": _hub("structured", "vtab-dmlab", 6),
    "kitti-distance": _hub("structured", "vtab-kitti_closest_vehicle_distance", 4),
    "dsprites-location": _hub("structured", "vtab-dsprites_label_x_position", 16),
    "dsprites-orientation": _hub("structured", "vtab-dsprites_label_orientation", 16),
    "smallnorb-azimuth": _hub("structured", "vtab-smallnorb_label_azimuth", 18),
    "smallnorb-elevation": _hub("structured", "vtab-smallnorb_label_elevation", 9),
}
SMALL = {
    "fashion-new": Task("natural", "fashion-mnist", "5-9", rows=2000),
    "mnist": Task("natural", "mnist-5k"),
    "rotation": Task("structured", "fashion-mnist", draw="rotation", rows=2000),
    "location": Task("structured", "fashion-mnist", draw="location", rows=2000),
    "count": Task("structured", "fashion-mnist", draw="count", rows=2000),
}
SMOKE = {
    "smoke": Task("natural", "smoke"),
    "smoke-count": Task("structured", "smoke", draw="count"),
}
TASKS = VTAB | SMALL | SMOKE


def parse(text: str) -> list[str]:
    """Names of tasks; "vtab" and "small" are all of those. FlagError names the nearest."""
    known, found = {"vtab": list(VTAB), "small": list(SMALL)}, []
    for name in (part.strip() for part in text.split(",")):
        if name not in known and name not in TASKS:
            raise FlagError(f"--tasks: no task {name!r}.{did_you_mean(name, [*known, *TASKS])}")
        found += known.get(name, [name])
    if len(set(found)) < len(found):
        raise FlagError("--tasks names a task twice.")
    return found


def load(name: str, config: VitConfig, seed: int = 0) -> tuple[Images, Images]:
    """The training rows and the test part of a task. DataError where its data can't be had."""
    task = TASKS[name]
    if task.source.startswith("clip-benchmark/"):
        return tuple(_read(task, split, config, seed) for split in (task.train, task.test))
    train, test = pieces.load_parts(task.source, config)
    if isinstance(task.classes, str):
        chosen = pieces.choose(train.classes, task.classes)
        train, test = images.only(train, chosen), images.only(test, chosen)
    train, test = sample(train, TRAIN, seed), sample(test, task.rows, seed)
    if task.draw is None:
        return train, test
    return DRAWN[task.draw](train, seed), DRAWN[task.draw](test, seed + 1)


def sample(data: Images, count: int | None, seed: int) -> Images:
    """`count` of the rows, by the seed; all where there are fewer."""
    if count is None or count >= len(data.labels):
        return data
    return data.take(np.sort(permutation(seed, 0, len(data.labels))[:count]))


def _read(task: Task, split: str, config: VitConfig, seed: int) -> Images:
    """One part from the hub: the first column of images, and whole numbers in `cls`. Only what is kept is decoded."""
    parts = rows.hub(task.source, "")
    if split not in parts or "cls" not in parts[split].features:
        raise DataError(f"{task.source}: no part {split!r} with a column 'cls'.")
    part = parts[split]
    column = next((key for key, kind in part.features.items() if type(kind).__name__ == "Image"), None)
    if column is None:
        raise DataError(f"{task.source}: no image column among {', '.join(part.features)}.")
    count = TRAIN if split == task.train else task.rows
    if count is not None and count < len(part):
        part = part.select(np.sort(permutation(seed, 0, len(part))[:count]))
    labels = np.asarray(part["cls"], np.int32)
    if labels.min() < 0 or labels.max() >= task.classes:
        raise DataError(f"{task.source}: a label {labels.max()} among {task.classes} classes.")
    pixels = np.stack([images.to_array(x, config.image_size, config.channels) for x in part[column]])
    names = tuple(str(i) for i in range(task.classes))
    return Images(pixels, labels, names, tuple(names[i] for i in labels))


# ------------------------------------------------------------------------------------------------------ drawn of others


def rotation(data: Images, seed: int) -> Images:
    """Each image turned by a random quarter: 4 classes."""
    labels = np.random.default_rng(seed).integers(0, 4, len(data.labels))
    turned = np.stack([np.rot90(x, k) for x, k in zip(data.images, labels, strict=True)])
    return _labelled(turned, labels, ("0", "90", "180", "270"))


def location(data: Images, seed: int) -> Images:
    """Each image at half its size, at one of 3 x 3 places: 9 classes."""
    labels = np.random.default_rng(seed).integers(0, 9, len(data.labels))
    small, side = _half(data.images), data.images.shape[1]
    canvas = np.zeros_like(data.images)
    for image, patch, label in zip(canvas, small, labels, strict=True):
        top, left = (side - side // 2) // 2 * np.asarray(divmod(label, 3))
        image[top : top + side // 2, left : left + side // 2] = patch
    return _labelled(canvas, labels, tuple(f"row {i} column {j}" for i in range(3) for j in range(3)))


def count(data: Images, seed: int) -> Images:
    """One to four images at half their size, in random quarters of one: 4 classes."""
    rng, small, half = np.random.default_rng(seed), _half(data.images), data.images.shape[1] // 2
    labels, canvas = rng.integers(0, 4, len(data.labels)), np.zeros_like(data.images)
    for row, label in enumerate(labels):
        for number, quarter in enumerate(rng.permutation(4)[: label + 1]):
            top, left = half * np.asarray(divmod(int(quarter), 2))
            canvas[row, top : top + half, left : left + half] = small[(row + number) % len(small)]
    return _labelled(canvas, labels, ("1", "2", "3", "4"))


DRAWN: dict[str, Callable[[Images, int], Images]] = {"rotation": rotation, "location": location, "count": count}


def _half(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C] -> [N, S // 2, S // 2, C], the mean of four."""
    n, side, _, channels = pixels.shape
    even = pixels[:, : side // 2 * 2, : side // 2 * 2].reshape(n, side // 2, 2, side // 2, 2, channels)
    return even.mean(axis=(2, 4)).round().astype(np.uint8)


def _labelled(pixels: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Images:
    return Images(pixels, labels.astype(np.int32), names, tuple(names[i] for i in labels))
