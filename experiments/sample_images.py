"""Draws images from a trained denoiser, with or without an adapter, and measures how like real ones they are.

    python -m experiments.sample_images --model=runs/diffusion/model --guidance=2      # a PNG of every class
    python -m experiments.sample_images --adapter=runs/adapted/adapter --classes=8,9   # the base is the adapter's own
    python -m experiments.sample_images --model=runs/emoji/model --prompt="a red apple" --prompt="a happy cat"
    python -m experiments.sample_images --model=runs/diffusion/model --frechet --count=10000 --sample_steps=18

Differs from `diffusion`, which trains and looks at samples on the way: nothing is trained here. Image n is a function
of the seed, n and what is told of it alone, so that two models, or two samplers, can be compared image by image.
`--frechet` prints the distance to as many real test images beside the ladder: real, noisy and class-wise Gaussian ones.
"""

from pathlib import Path
from typing import Any

from absl import flags
from tabulate import tabulate

from experiments.features import ladder, network, score
from experiments.shared import common
from experiments.shared.denoising import Denoiser, Sampling, attach, drawer, generate, load
from experiments.shared.pictures import choose, evenly, load_images, of_classes, sheet
from research.diffusion import samplers
from research.errors import DataError, FlagError
from research.files import write_bytes
from research.peft import adapter as adapters


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("model", None, "Directory of a trained denoiser. Default: the adapter's own base.")
    flags.DEFINE_string("adapter", None, "Directory of an adapter, such as runs/diffusion/adapter.")
    flags.DEFINE_bool("force", False, "Load an adapter although it was trained on another base.")
    flags.DEFINE_string("classes", None, "Numbers, ranges or names, which take turns. Default: all that were learnt.")
    flags.DEFINE_multi_string("prompt", [], "A caption to draw, of a model that is told captions: a row of the PNG.")
    flags.DEFINE_integer("count", 80, "Images.", lower_bound=1)
    flags.DEFINE_enum("sampler", "heun", sorted(samplers.SAMPLERS), "How images are drawn.")
    flags.DEFINE_integer("sample_steps", 18, "Its steps; heun calls the model twice in each.", lower_bound=1)
    flags.DEFINE_float("guidance", 1.0, "Weight of classifier-free guidance: 1 is none, 0 the unconditional model.")
    flags.DEFINE_list("interval", None, "The times LOW,HIGH of the process where guidance acts. Default: all.")
    flags.DEFINE_float("rescale", 0.0, "Guidance's rescale, from 0 to 1.", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("output", "runs/samples.png", "The PNG, of at most 400 images.")
    flags.DEFINE_bool("frechet", False, "Measure the images; beside the PNG goes a JSON file with the figures.")
    flags.DEFINE_string("data", "fashion-mnist", "With --frechet: the set whose test part they are compared with.")
    flags.DEFINE_integer("size", None, "Side in pixels that a folder's images get.", lower_bound=4)
    flags.DEFINE_string("features", "auto", "With --frechet: packaged, pixels, a directory or auto.")


def main() -> None:
    values = flags.FLAGS
    base, variables, method, new, learnt = restore(values)
    names = base.setting.classes
    if values.prompt and not base.config.text_features:
        raise FlagError(f"--prompt is for a model that is told captions, which {base.name} is not: leave it away.")
    if base.config.text_features and bool(values.prompt) == values.frechet:
        raise FlagError(f"{base.name} draws captions: give --prompt='a red apple', or --frechet for those of --data.")
    if values.prompt and values.classes is not None:
        raise FlagError("--prompt says what is drawn: --classes is not for it.")
    classes = learnt if values.classes is None else choose(values.classes, names)
    if unknown := [c for c in classes if c not in learnt]:
        known = ", ".join(f"{c} {names[c]}" for c in learnt)
        raise FlagError(f"--classes: {unknown[0]} ({names[unknown[0]]}) was not learnt. Valid: {known}.")
    sampling = Sampling(
        values.sampler, values.sample_steps, values.guidance, *interval(values.interval), rescale=values.rescale
    )
    draw, output = drawer(base, sampling, method, new), Path(values.output).expanduser()
    rows: list[dict[str, Any]] = []
    if values.frechet:
        channels = base.config.channels
        train, test = load_images(values.data, values.size, channels)
        if train.classes != names or train.images.shape[1:] != (base.config.image_size,) * 2 + (channels,):
            raise DataError(f"{values.data} has other classes or another size than what the model draws.")
        test = of_classes(test, classes)
        if len(test.labels) < values.count:
            raise DataError(
                "Frechet distance needs as many images on both sides: "
                f"{values.count} samples and {len(test.labels)} real ones: give --count={len(test.labels)} at most."
            )
        real = evenly(test, values.count)
        net = network(values.features, real)
        rows = ladder(net, of_classes(train, classes), real)
    columns = 20 if len(classes) == 1 else len(classes)
    captions: list[str] = []
    if values.frechet:
        count, told = len(real.labels), base.told(real)
    elif base.config.text_features:
        columns, told, captions = asked(base, values.prompt, values.count)
        count = len(told["text"])
    else:
        count, told = values.count, base.told_in_turn(classes, values.count)
    images = generate(draw, variables, told, count, values.seed)
    page = images[: max(1, 400 // columns) * columns]
    write_bytes(output, sheet(page, min(columns, count), captions[: -(-len(page) // columns)]))
    if values.frechet:
        target, _ = net.measure(real.images, real.labels)
        rows.append(score(net, "samples", images, real.labels, target))
        print(f"Frechet distance to N={count} real test images, features {net.name}:\n")
        cells = [[r["images"], f"{r['frechet']:.4g}", "-" if r["consistency"] is None else f"{r['consistency']:.3f}"]
                 for r in rows]  # fmt: skip
        print(
            tabulate(cells, ["images", "Frechet distance", "class consistency"], tablefmt="github", floatfmt="") + "\n"
        )
        about = {"features": net.name, "sampling": common.jsonable(sampling), "seed": values.seed, "rows": rows}
        common.write_json(output.with_suffix(".json"), about)
    print(f"{count} images of {', '.join(values.prompt or [names[c] for c in classes])}: {output}")


def asked(base: Denoiser, prompts: list[str], count: int) -> tuple[int, dict[str, Any], list[str]]:
    """(columns of the PNG, what is told of about `count` images, the captions of its rows)."""
    each = max(1, count // len(prompts))
    columns = min(each, 20)
    each -= each % columns
    rows = [row for prompt in prompts for row in (prompt, *[""] * (each // columns - 1))]
    return columns, {"text": base.read(prompts).repeat(each, axis=0)}, rows


def restore(values: Any) -> tuple[Denoiser, dict, Any, tuple[int, ...], tuple[int, ...]]:
    """(base, variables, method, the adapter's new classes, all that were learnt) of --model and --adapter."""
    if values.adapter is None:
        if values.model is None:
            raise FlagError("give --model=DIRECTORY of a trained denoiser, such as runs/diffusion/model, or --adapter.")
        base = load(values.model)
        return base, {"params": base.params}, None, (), base.setting.trained
    base = load(values.model or adapters.load(values.adapter).meta["base"]["name"])
    loaded, variables, new = attach(base, values.adapter, values.force)
    return base, variables, loaded.method, new, tuple(sorted({*base.setting.trained, *new}))


def interval(given: list[str] | None) -> tuple[float, float]:
    """LOW,HIGH as numbers. Raises FlagError."""
    if given is None:
        return 0.0, float("inf")
    try:
        low, high = map(float, given)
    except ValueError:
        raise FlagError(f"--interval={','.join(given)} is no pair of times. Valid: --interval=0.1,0.7.") from None
    return low, high


if __name__ == "__main__":
    define_flags()
    common.run(main)
