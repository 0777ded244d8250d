"""The images that a denoiser learns from: sets and their classes, rows in an even order, and a sheet to look at."""

import io
from collections.abc import Sequence

import numpy as np

from research.data import images as image_data
from research.data.images import Images
from research.errors import DataError, FlagError, did_you_mean

SMOKE_CLASSES = ("horizontal", "vertical", "square", "cross")


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


def in_turn(classes: Sequence[int], count: int) -> np.ndarray:
    """`count` labels, the classes taking turns."""
    return np.asarray(classes, np.int32)[np.arange(count) % len(classes)]


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 -> fp32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


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
