"""--augment of `vision`: a choice of `research.vision.augment`'s functions, and what they make of a batch.

    parse("flip,crop=2,mixup=0.2")  ->  {"flip": 1, "crop": 2, "mixup": 0.2}

What is random about a row depends on its seed, epoch and number, which the batch carries as `draw`, and what mixes a
batch on those of its first row; so a resumed run, another mesh and a second pass over a batch augment alike.
"""

from collections.abc import Callable

import jax

from research.errors import FlagError, did_you_mean
from research.vision import augment

Augment = dict[str, float]

# Of one image, in this order; value: what the flag's number means.
EACH: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "crop": lambda key, image, padding: augment.pad_crop(key, image, int(padding)),
    "flip": lambda key, image, _: augment.flip(key, image),
    "randaugment": lambda key, image, count: augment.rand_augment(key, image, int(count)),
    "erasing": lambda key, image, probability: augment.random_erasing(key, image, probability),
}
MIX = {"mixup": augment.mixup, "cutmix": augment.cutmix}
DEFAULTS = {"crop": 2, "flip": 1, "randaugment": 2, "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1}


def parse(text: str) -> Augment:
    """ "flip,crop=2,mixup=0.2" as {name: number}; "none" is {}. FlagError names the nearest."""
    found: Augment = {}
    for item in (part.strip() for part in text.split(",") if part.strip() not in ("", "none")):
        name, given, number = (part.strip() for part in item.partition("="))
        if name not in DEFAULTS:
            raise FlagError(f"--augment: unknown {name!r}.{did_you_mean(name, DEFAULTS)}")
        try:
            value = float(number) if given else float(DEFAULTS[name])
        except ValueError:
            value = -1.0
        most = 1 if name in ("erasing", "smoothing") else 1000
        whole = name in ("crop", "flip", "randaugment")
        if not 0 < value <= most or (whole and value != int(value)):
            raise FlagError(f"--augment: {item!r} is out of range. Valid: {name}={DEFAULTS[name]:g}.")
        found[name] = value
    return found


def augmented(chosen: Augment, draw: jax.Array, x: jax.Array, labels: jax.Array, classes: int) -> tuple:
    """draw int [B, 3], x float [B, S, S, C] in [0, 1], labels int [B] -> x, labels [B] or, where they are mixed or
    smoothed, [B, classes].
    """
    keys = jax.vmap(lambda d: augment.sample_key(d[0], d[2], d[1]))(draw)
    for place, (name, change) in enumerate(EACH.items()):
        if name in chosen:
            own = jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(keys)
            x = jax.vmap(lambda key, image, f=change, v=chosen[name]: f(key, image, v))(own, x)
    if not chosen.keys() & {"smoothing", *MIX}:
        return x, labels
    smooth = chosen.get("smoothing", 0.0)
    labels = (1 - smooth) * jax.nn.one_hot(labels, classes) + smooth / classes
    ways = [lambda key, x, y, f=f, v=chosen[name]: f(key, x, y, v) for name, f in MIX.items() if name in chosen]
    if ways:
        which, key = jax.random.split(jax.random.fold_in(keys[0], len(EACH)))  # of the batch, by its first row
        x, labels = jax.lax.switch(jax.random.randint(which, (), 0, len(ways)), ways, key, x, labels)
    return x, labels
