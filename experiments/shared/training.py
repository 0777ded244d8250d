"""What every training script is made of: a method attached to a model, one step, one loop, one folder of results.

    run = start(base, spec, loss, recipe, seeds=0, heads=..., feed=...)     # a state, its frozen part, a step
    result = train(run, batch, recipe, workdir, identity, evaluate=...)     # config, metrics, curve, checkpoints

A script adds data, a loss and what it does with the result. Classification, language models, preferences, diffusion and
vision differ in nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments.shared import common, observing
from research.convert.load import Pretrained, load
from research.data.batches import eval_batches
from research.errors import FlagError, ModelError
from research.nn.param import is_quantised
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.method import Method, PyTree, Sites, Variables, fold
from research.quant.tree import quantise_axes, quantise_tree
from research.train import checkpoint, distributed, loop, optimizer, plot, step
from research.train import mesh as meshes
from research.train import state as states

Batch = Callable[[int], dict[str, np.ndarray]]


class Base(Protocol):
    """What is adapted: `research.convert.load.Pretrained`, or anything with a model and its parameters."""

    name: str
    model: Any
    params: PyTree
    tokenizer: Any
    fingerprint: str


@dataclass(frozen=True)
class Recipe:
    """How to train. learning_rate is the peak; warmup is in steps, or a fraction of them when below 1."""

    learning_rate: float
    steps: int = 300
    batch_size: int = 32
    micro_batches: int = 1
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def tx(self) -> optax.GradientTransformation:
        """The optimiser."""
        shape = {"schedule": self.schedule, "steps": self.steps, "warmup": self.warmup}
        return optimizer.make(self.optimizer, self.learning_rate, weight_decay=self.weight_decay, **shape)


def recipe_flags(**defaults: Any) -> None:
    """The flags of `Recipe`, with the script's own defaults; no --learning_rate where each method has its own."""
    d = defaults
    if "learning_rate" in d:
        flags.DEFINE_float("learning_rate", d["learning_rate"], "Peak learning rate.", lower_bound=0.0)
    flags.DEFINE_integer("steps", d["steps"], "Training steps.", lower_bound=1)
    flags.DEFINE_integer("batch_size", d["batch_size"], "Rows a step.", lower_bound=1)
    flags.DEFINE_integer(
        "micro_batches", d.get("micro_batches", 1), "Parts a batch is computed in, one after the other.", lower_bound=1
    )
    flags.DEFINE_string("optimizer", d.get("optimizer", "adamw"), "optax optimiser by name.")
    flags.DEFINE_string("schedule", d.get("schedule", "linear"), "constant, linear, cosine, wsd or inverse_sqrt.")
    flags.DEFINE_float("warmup", d.get("warmup", 0.06), "Warm-up, in steps or as a fraction of them.")
    flags.DEFINE_float("weight_decay", d.get("weight_decay", 0.01), "Decoupled weight decay, on matrices only.")
    flags.DEFINE_float("clip_norm", d.get("clip_norm", 1.0), "Bound of the trainables' gradient norm.")


def run_flags(workdir: str, **defaults: int) -> None:
    """--seed, --eval_every, --save_every, --mesh, the processes, --dry_run, --workdir; what is kept and watched."""
    d = {"eval_every": 100, "save_every": 100} | defaults
    flags.DEFINE_integer("seed", 0, "Of what is added, dropout and data order.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("eval_every", d["eval_every"], "Steps between evaluations; 0 for the end only.", lower_bound=0)
    flags.DEFINE_integer("save_every", d["save_every"], "Steps between checkpoints; 0 for the end only.", lower_bound=0)
    flags.DEFINE_string("mesh", None, "Axes and sizes over all devices, such as data:2,fsdp:4. Default: one device.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where neither SLURM nor a TPU pod tells it.")
    flags.DEFINE_integer("processes", None, "Processes of the run, each of which is given the same command.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_bool("dry_run", False, "Compile, say what it would take and what a batch looks like, and stop.")
    flags.DEFINE_string("workdir", workdir, "Where everything is written.")
    flags.DEFINE_integer("keep", 2, "Newest checkpoints that are kept.", lower_bound=1)
    flags.DEFINE_integer("keep_best", 0, "Checkpoints of the best evaluations kept besides.", lower_bound=0)
    flags.DEFINE_integer("skip_nonfinite", 0, "Batches left out for a loss that is not finite.", lower_bound=0)
    flags.DEFINE_multi_enum("track", [], ["tensorboard", "wandb"], "Where metrics go besides metrics.jsonl.")
    flags.DEFINE_integer("profile", 0, "Steps to trace into WORKDIR/profile, for TensorBoard.", lower_bound=0)
    flags.DEFINE_float("peak_tflops", None, "A device's peak. Default: the chip's, if it is known.", lower_bound=0.0)


def load_base(
    name: str, quantise: str | None = None, mesh: jax.sharding.Mesh | None = None, **options: Any
) -> Pretrained:
    """`load` of a model that reads text, its layers' kernels quantised if asked for, its parameters straight into their
    shards where there is a mesh. The fingerprint stays the float base's: an adapter fits both.

    Raises ModelError for a model without a tokenizer.
    """
    places = None if mesh is None else lambda axes, shapes: meshes.shardings(axes, shapes, mesh)
    base = load(name, places=places, **options)
    if base.tokenizer is None:
        raise ModelError(f"{name} comes without a tokenizer, so it can't read sentences: its directory needs one.")
    return base if quantise is None else dataclasses.replace(base, params=quantise_tree(base.params, quantise))


class Run(NamedTuple):
    """A method on a base, ready to train. `state` has a leading seed axis where several seeds were given; `mask` is the
    first one's. `axes`: the logical axes of all variables.
    """

    method: Method
    sites: Sites
    mask: Any
    state: states.TrainState
    frozen: Variables
    step: step.Step
    evaluate: Callable[..., dict[str, Any] | None]
    axes: PyTree


def start(
    base: Base,
    spec: str,
    loss: step.LossFn,
    recipe: Recipe,
    seeds: int | Sequence[int] = 0,
    *,
    heads: Callable[[jax.Array], Variables] | None = None,
    feed: Callable[[int], Batch] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Run:
    """Attaches the method and, where the task has them, heads.

    Args:
        loss: of realised variables.
        seeds: a sequence makes one program of as many runs: own adapters, heads, optimiser states and data order, one
            base.
        heads: rng -> collections of the task's own, which always train.
        feed: seed -> (step -> batch [B, ...]), for a method that fits to data.
        mesh: where the state and the base are sharded; of one run only.
    """
    method = registry.parse(spec, tokenizer=base.tokenizer, run_steps=recipe.steps)
    sites = peft.sites(base.model)
    several, tx = not isinstance(seeds, int), recipe.tx()
    seeds = list(seeds) if several else [seeds]

    @jax.jit
    def new(rng: jax.Array) -> Variables:
        added = {} if heads is None else heads(fold(rng, "head"))
        return {"peft": peft.init(method, fold(rng, "peft"), sites)} | added

    def fitted(seed: int) -> Variables:
        rng = jax.random.key(seed)
        variables = {"params": base.params} | new(rng)
        if method.fit is None:
            return variables
        if feed is None:
            raise FlagError(f"{spec} starts from data, which this script does not give it.")
        found = method.fit(fold(rng, "fit"), variables, realising(method, sites, loss), feed(seed))
        return found | {"params": base.params}

    runs = [fitted(seed) for seed in seeds]
    masks = [peft.mask(method, run) for run in runs]
    mask, elements = states.split_masks(masks)

    @jax.jit
    def begin(params: Any, added: Variables, elements: Any, rng: jax.Array) -> states.TrainState:
        trainable, extra, _ = states.split({"params": params} | added, mask)
        return states.create(trainable, tx, fold(rng, "train"), extra, elements)

    added = [{k: v for k, v in run.items() if k != "params"} for run in runs]
    rngs = [jax.random.key(seed) for seed in seeds]
    if several:
        stacked = [jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (added, elements, rngs)]
        state = jax.jit(jax.vmap(begin, in_axes=(None, 0, 0, 0)))(base.params, *stacked)
    else:
        state = begin(base.params, added[0], elements[0], rngs[0])
    frozen = states.split(runs[0], mask)[2]
    realise = None if method.realise is None else lambda v: method.realise(v, sites)
    hooks = {"realise": realise, "penalty": method.penalty, "update": method.update, "rates": method.rates}
    one = step.make_step(method.task(loss) if method.task else loss, tx, clip_norm=recipe.clip_norm, **hooks)
    axes = {"params": base_axes(base), "peft": peft.init_axes(method, sites)}
    axes |= {name: jax.tree.map(lambda _: None, leaves) for name, leaves in added[0].items() if name != "peft"}
    if mesh is not None:
        state = meshes.load(state, meshes.state_shardings(axes, state, mesh))
        frozen = meshes.load(frozen, meshes.shardings(axes, frozen, mesh))
    evaluate = step.make_eval(loss, realise=realise, seeds=several)
    return Run(method, sites, masks[0], state, frozen, step.over_seeds(one) if several else one, evaluate, axes)


def base_axes(base: Base) -> PyTree:
    """The logical axes of the base's parameters, quantised or not."""
    axes, leaves = peft.base(base.model)[1], jax.tree.leaves(base.params, is_leaf=is_quantised)
    kinds = {type(leaf).__name__.lower() for leaf in leaves if is_quantised(leaf)}
    return quantise_axes(axes, kinds.pop()) if kinds else axes


def realising(method: Method, sites: Sites, loss: step.LossFn) -> step.LossFn:
    """The loss of variables that are not realised yet."""
    return lambda variables, batch, rng: loss(peft.realised(method, variables, sites), batch, rng)


def one_process() -> None:
    """FlagError where there are several, for what can't run so."""
    if jax.process_count() > 1:
        raise FlagError(
            f"this runs in one process, not in {jax.process_count()}. Valid with --processes: training of classify, "
            "sft, prompt_tuning, pretrain, preference, reward_model, vision and diffusion."
        )


@contextmanager
def use_mesh(spec: str | None, several: bool = False) -> Iterator[jax.sharding.Mesh | None]:
    """The mesh that --mesh names, for everything inside; without one, None, or one axis over all processes' devices.

    several: whether the script can run in several processes; FlagError where it can't and does.
    """
    if not several:
        one_process()
    if spec is None and jax.process_count() == 1:
        yield None
        return
    spec = spec or ""
    with meshes.use(meshes.make_mesh(spec)) as mesh:
        yield mesh


def evaluator(run: Run, data: dict[str, np.ndarray], batch_size: int = 64) -> Callable[..., dict[str, Any] | None]:
    """(state, stop) -> means over all rows of a part."""
    return lambda state, stop=None: run.evaluate(state, run.frozen, eval_batches(data, batch_size), stop)


def compile_step(run: Run, batch: Batch, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, Callable]:
    """The compiled step, and a function that takes numpy batches: with a mesh it shares their rows out."""
    if mesh is None:
        compiled = step.compile(run.step, run.state, run.frozen, batch(0))
        return compiled, compiled
    rows = meshes.batch_sharding(mesh)
    places = (meshes.state_shardings(run.axes, run.state, mesh), meshes.shardings(run.axes, run.frozen, mesh), rows)
    compiled = step.compile(run.step, run.state, run.frozen, meshes.place_batch(batch(0), rows), places)
    return compiled, lambda state, frozen, one: compiled(state, frozen, meshes.place_batch(one, rows))


def train(
    run: Run,
    batch: Batch,
    recipe: Recipe,
    workdir: Path,
    identity: dict[str, Any],
    *,
    mesh: jax.sharding.Mesh | None = None,
    curve: Sequence[str] = ("loss", "eval/loss"),
    **options: Any,
) -> loop.Result:
    """Trains a single run, or goes on with it, and leaves config.json, metrics.jsonl, curve.png and checkpoints in
    `workdir`, and what --track and --profile ask for. `options` are those of `loop.fit`. Call it under the folder's
    lock.

    Raises FlagError where the folder holds a run with another identity.
    """
    kept = workdir / "checkpoints"
    observing.check()
    common.refuse_other(saved_identity(kept) or identity, identity, f"{workdir} holds a run")
    common.write_config(workdir)
    print("compiling ...", flush=True)
    compiled, call = compile_step(run, batch, mesh)
    keep = checkpoint.Checkpointer(kept, observing.value("keep", 2), observing.value("keep_best", 0))
    with observing.observed(run, batch(0), compiled, workdir, identity) as seen:
        result = loop.fit(
            call, run.state, run.frozen, batch, steps=recipe.steps, identity=identity, checkpointer=keep,
            **(seen | options),
        )  # fmt: skip
    if distributed.is_main():
        plot.curve(workdir / "metrics.jsonl", workdir / "curve.png", curve)
    return result


def saved_identity(checkpoints: Path) -> dict[str, Any] | None:
    """The identity of the run whose checkpoints these are; None where there is none."""
    checkpointer = checkpoint.Checkpointer(checkpoints)
    newest = checkpointer.latest_step()
    return None if newest is None else checkpointer.meta(newest)["identity"]


def counts(run: Run) -> tuple[int, int]:
    """(trainable, total) of base and added subtree, heads apart; for one run of several."""
    several = run.state.step.ndim > 0
    variables = jax.eval_shape(lambda s: (states.take(s, 0) if several else s).variables(run.frozen), run.state)
    bare = {k: v for k, v in variables.items() if k in ("params", "peft")}
    return tree.count(bare, {k: run.mask[k] for k in bare}), peft.parameters(bare)


def summary(base: Base, spec: str, run: Run) -> str:
    """One line: what trains of what."""
    trainable, total = counts(run)
    return f"{base.name}, {spec}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.3f} %)"
