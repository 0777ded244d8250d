"""One training run of a denoiser, of its own or by a method on a trained one: what `diffusion` and its table share."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.features import network, score
from experiments.shared import common, training
from experiments.shared.denoising import Denoiser, Sampling, drawer, generate, new_rows, with_rows
from experiments.shared.pictures import evenly, sheet, to_float
from experiments.shared.training import Batch, Run
from research.data.batches import Batches, eval_batches
from research.data.images import Images
from research.errors import FlagError
from research.files import write_bytes
from research.peft import adapter as adapters
from research.peft.method import Variables
from research.tasks import diffusion
from research.train import average, metrics, plot
from research.train import state as states

HELD_OUT = 1024  # test images whose loss is looked at
PER_CLASS = 8  # of the grid of samples


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to train, and the decay of the average that is sampled from and saved."""

    ema: float = 0.999

    def __post_init__(self):
        if not 0 <= self.ema < 1:
            raise FlagError(f"--ema={self.ema:g} must lie in [0, 1): 0 keeps the last step's.")

    def tx(self) -> optax.GradientTransformation:
        """The optimiser, with the average of what it leads to."""
        return average.averaged(super().tx(), self.ema)


class Task(NamedTuple):
    """What is learnt from, by which loss.

    `train`, `test`: images of the classes to learn, with the base's class numbers. `new`: those of them that the base
    has not seen. `prior`: the base's own samples, which `share` as much weight as the images keeps in mind.
    `options`: weight, gamma, times and low_discrepancy of the loss.
    """

    base: Denoiser
    train: Images
    test: Images
    classes: tuple[int, ...]
    new: tuple[int, ...]
    prior: Images | None
    share: float
    options: dict[str, Any]


def loss(task: Task) -> Callable:
    """The denoising loss, with the rows of new classes in their places."""
    base, setting = task.base, task.base.setting
    inner = diffusion.loss(
        base.model, setting.make_process(), setting.predict, classes=base.config.num_classes,
        label_dropout=setting.label_dropout, sigma_data=setting.sigma_data, **task.options,
    )  # fmt: skip
    return lambda variables, batch, rng: inner(with_rows(variables, task.new), batch, rng)


def batches(task: Task, recipe: Recipe, seed: int) -> Batch:
    """step -> {"images" fp32 [M, B/M, H, W, C], "weight"} and what the model is told of them: half of a batch is prior
    images, if there are any.

    Raises FlagError where the batch can't be divided so.
    """

    def rows(data: Images, count: int) -> Batches:
        again = -(-count // len(data.labels))  # five images fill a batch too
        arrays = {"images": data.images} | task.base.told(data)
        repeated = {name: np.tile(leaf, (again, *[1] * (leaf.ndim - 1))) for name, leaf in arrays.items()}
        return Batches(repeated, count, seed, recipe.micro_batches)

    def floats(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch | {"images": to_float(batch["images"])}

    if task.prior is None:
        own = rows(task.train, recipe.batch_size)
        return lambda step: floats(own.batch(step))
    half = recipe.batch_size // 2
    if not half:
        raise FlagError("--batch_size=1 has no room for a prior image: take 2 or more, or --prior=0.")
    own, prior = rows(task.train, recipe.batch_size - half), rows(task.prior, half)

    def mixed(step: int) -> dict[str, np.ndarray]:
        first, second = own.batch(step), prior.batch(step)
        both = {name: np.concatenate([first[name], second[name]], axis=1) for name in first}
        is_prior = np.arange(both["images"].shape[1]) >= first["images"].shape[1]
        both["weight"] = np.tile(diffusion.prior_weights(is_prior, task.share), (recipe.micro_batches, 1))
        return floats(both)

    return mixed


def start(task: Task, spec: str, recipe: Recipe, seed: int, mesh: jax.sharding.Mesh | None = None) -> Run:
    """Attaches the method, and the rows of new classes as the task's head."""
    heads = None
    if task.new:
        heads = lambda rng: {"head": new_rows(task.base, len(task.new), rng)}  # noqa: E731

    def feed(seed: int) -> Batch:
        one = batches(task, recipe, seed)
        return lambda i: {name: leaf[0] for name, leaf in one(i).items()}

    return training.start(task.base, spec, loss(task), recipe, seed, heads=heads, feed=feed, mesh=mesh)


def identity(task: Task, spec: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What makes a run this one."""
    prior = None if task.prior is None else {"share": task.share, "images": _digest(task.prior)}
    return {
        "base": task.base.fingerprint, "setting": common.jsonable(task.base.setting), "data": _digest(task.train),
        "prior": prior, "peft": spec, "seed": seed, "recipe": common.jsonable(recipe), "loss": task.options,
    }  # fmt: skip


def _digest(data: Images) -> str:
    about = "\n".join(data.captions).encode()
    return hashlib.sha256(data.images.tobytes() + data.labels.tobytes() + about).hexdigest()


class Watch:
    """What is done between steps, with the averaged parameters: the loss of held-out images at fixed times and noise, a
    grid of samples as PNG, and the Frechet distance of `count` samples.

    Called by the loop as `evaluate(state, stop)`.
    """

    def __init__(self, task: Task, run: Run, recipe: Recipe, sampling: Sampling, workdir: Path, count: int, net: str):
        self.task, self.run, self.recipe, self.workdir = task, run, recipe, workdir
        held = evenly(task.test, HELD_OUT)
        self.held = {"images": to_float(held.images)} | task.base.told(held)
        self.draw = drawer(task.base, sampling, run.method, task.new)
        self.shown = self.looked_at()
        self.real = evenly(task.test, count) if count else None
        if count:
            self.told = task.base.told(self.real)
            self.net = network(net, task.train)
            self.target = self.net.measure(self.real.images, self.real.labels)[0]
        rows = metrics.read(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
        before = [row["eval/minutes"] for row in rows if "eval/minutes" in row]
        self.began = time.perf_counter() - 60 * max(before, default=0.0)  # the clock of a resumed run goes on

    def looked_at(self) -> dict[str, np.ndarray]:
        """What is told of the images of the grid, PER_CLASS of each class: captions are those of test images."""
        task, count = self.task, PER_CLASS * len(self.task.classes)
        if task.base.config.text_features:
            some = evenly(task.test, count)
            return task.base.told(some.take(np.arange(count) % len(some.labels)))
        return task.base.told_in_turn(task.classes, count)

    def __call__(self, state: states.TrainState, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
        averaged = average.read(state, self.recipe.ema)
        means = self.run.evaluate(averaged, self.run.frozen, eval_batches(self.held, 128), stop)
        if means is None or (stop and stop()):
            return None
        variables = averaged.variables(self.run.frozen)
        count = PER_CLASS * len(self.task.classes)
        page = sheet(generate(self.draw, variables, self.shown, count), len(self.task.classes))
        write_bytes(self.workdir / "samples" / f"step{int(state.step):06d}.png", page)
        if self.real is not None:
            images = generate(self.draw, variables, self.told, len(self.real.labels), seed=1, batch=count)
            found = score(self.net, "samples", images, self.real.labels, self.target)
            means |= {k: found[k] for k in ("frechet", "consistency") if found[k] is not None}
        return means | {"minutes": (time.perf_counter() - self.began) / 60}


def train(
    task: Task, spec: str, recipe: Recipe, seed: int, run: Run, workdir: Path, watch: Watch, **options: Any
) -> tuple[states.TrainState, Any]:
    """Trains, or goes on; returns (the state with the average for its trainables, the loop's result)."""
    result = training.train(
        run, batches(task, recipe, seed), recipe, workdir, identity(task, spec, recipe, seed), evaluate=watch,
        curve=("loss", "eval/loss", "eval/frechet", "eval/consistency"), **options,
    )  # fmt: skip
    return average.read(result.state, recipe.ema), result


def save_adapter(directory: Path, task: Task, spec: str, run: Run, variables: Variables) -> int:
    """Saves what a run on a base has trained; returns its bytes."""
    base = task.base
    return adapters.save(
        directory, spec, variables, run.sites, {"name": base.name, "fingerprint": base.fingerprint}, task="diffusion",
        new=list(task.new), learnt=list(task.classes), classes=list(base.setting.classes),
    )  # fmt: skip


def distance_curve(workdir: Path) -> None:
    """Draws the Frechet distances that were measured against the minutes they took, where there are some."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if row.get("eval/frechet") is not None]
    if not rows:
        return
    figure = plot.figure(5, 3.5)
    axes = figure.add_subplot()
    axes.semilogy([row["eval/minutes"] for row in rows], [row["eval/frechet"] for row in rows], marker=".")
    axes.set(xlabel="minutes", ylabel="Frechet distance")
    axes.grid(alpha=0.3, which="both")
    plot.save(figure, workdir / "distance.png")
