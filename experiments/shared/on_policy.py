"""What `ppo` and `grpo` share: a policy samples, is scored, and learns from it, through the one trainer.

    learner = start(base, spec, task, settings, recipe, seed)     # a run whose state holds a rollout
    training.train(learner.run, learner.batch, ..., prepare=learner.prepare, evaluate=learner.evaluate)

A rollout of `prompts` times `group` rows is drawn before every `settings.every(recipe)`-th step by `prepare`, from the
state and the step alone, and kept in the state; the steps between learn from it by row numbers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import training
from research.convert.load import Pretrained
from research.data import tokenize
from research.data.batches import Batches
from research.errors import DataError, FlagError, ModelError
from research.peft import method as peft
from research.peft import tree
from research.rl import rewards, rollout, value
from research.rl.kl import Adaptive, Fixed
from research.rl.rewards import RewardFn
from research.tasks import policy
from research.train import mesh as meshes
from research.train import metrics, plot
from research.train import state as states

CURVE = ("reward", "eval/reward", "kl_sequence", "entropy", "clip_fraction")


@dataclass(frozen=True)
class Settings:
    """How a rollout is drawn and credited. A rollout has prompts * group rows, each learnt from `epochs` times.

    kl_target: nats a completion, for an adaptive coefficient (arXiv 1909.08593) that starts at kl_coef.
    """

    variant: str
    prompts: int = 16
    group: int = 8
    epochs: int = 1
    max_new: int = 16
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_target: float | None = None
    kl_horizon: int = 10_000
    entropy_coef: float = 0.0
    missing_eos: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    value_clip: float = 0.2

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def kl_in_reward(self) -> bool:
        return policy.variant(self.variant).advantage in rollout.KL_IN_REWARD

    @property
    def formula(self) -> policy.Variant:
        """The variant; where the KL is part of the reward it is not part of the loss."""
        found = policy.variant(self.variant)
        in_loss = 0.0 if self.kl_in_reward else self.kl_coef
        length = self.max_new if self.variant == "dr_grpo" else found.length
        return replace(found, kl_coef=in_loss, entropy_coef=self.entropy_coef, length=length)

    @property
    def controller(self) -> Fixed | Adaptive:
        if self.kl_target is None:
            return Fixed(self.kl_coef)
        if not self.kl_in_reward:
            raise FlagError(f"kl_target={self.kl_target}: {self.variant} has a fixed kl_coef, in its loss.")
        return Adaptive(self.kl_coef, self.kl_target, self.kl_horizon)

    def every(self, recipe: training.Recipe) -> int:
        """Steps a rollout. Raises FlagError: rows that the batch size does not divide, a group of one."""
        if self.rows % recipe.batch_size:
            raise FlagError(
                f"batch_size={recipe.batch_size} does not divide the {self.rows} rows of a rollout "
                f"({self.prompts} prompts times {self.group} completions). Valid: {self.rows}, and what divides it."
            )
        if self.group < 2 and self.formula.advantage not in ("gae", "global"):
            raise FlagError(f"group={self.group}: {self.variant} compares completions of a prompt, so at least 2.")
        return self.epochs * self.rows // recipe.batch_size


class Prompts(NamedTuple):
    """texts [N]; tokens, mask int32 [N, P], padded on the left."""

    texts: tuple[str, ...]
    tokens: np.ndarray
    mask: np.ndarray

    def take(self, rows: np.ndarray) -> "Prompts":
        return Prompts(tuple(self.texts[i] for i in rows), self.tokens[rows], self.mask[rows])


class Task(NamedTuple):
    """Prompts to learn from and to evaluate on, and what a completion is worth."""

    train: Prompts
    held_out: Prompts
    functions: dict[str, RewardFn]
    weights: dict[str, float]
    identity: dict[str, Any]


class Learner(NamedTuple):
    """A run whose state holds a rollout, and what `training.train` takes with it. judge: state -> means over held-out
    prompts, and rows {"prompt", "completion", "reward"}; evaluate gives the means alone.
    """

    run: training.Run
    batch: training.Batch
    prepare: Callable[[int, states.TrainState], states.TrainState] | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    judge: Callable[[states.TrainState], tuple[dict[str, float], list[dict[str, Any]]]] | None = None


def encode(base: Pretrained, texts: Sequence[str], max_new: int, max_length: int = 64) -> Prompts:
    """Tokens of prompts. One that leaves no room for `max_new` more, or has more than `max_length` tokens, is left out
    and counted. Raises DataError where none is left.
    """
    room = min(max_length, base.config.max_positions - max_new)
    sizes = [len(ids) for ids in base.tokenizer(list(texts))["input_ids"]]
    kept = [t for t, size in zip(texts, sizes, strict=True) if 0 < size <= room]
    if not kept:
        raise DataError(
            f"none of {len(texts)} prompts leaves room: at most {room} tokens fit before {max_new} new ones."
        )
    if len(kept) < len(texts):
        print(f"{len(texts) - len(kept)} of {len(texts)} prompts are left out: empty, or over {room} tokens")
    longest = max(size for size in sizes if 0 < size <= room)
    found = tokenize.encode(base.tokenizer, kept, longest, padding_side="left")
    return Prompts(tuple(kept), found["tokens"], found["mask"])


def sampler(base: Pretrained, settings: Settings, temperature: float | None = None) -> Callable[..., rollout.Sampled]:
    """The jitted sampler of a base: its end of text stops a row."""
    reads = base.tokenizer
    return rollout.sampler(
        base.model, max_new=settings.max_new, stop=() if reads.eos_token_id is None else (reads.eos_token_id,),
        pad=reads.pad_token_id or 0, temperature=settings.temperature if temperature is None else temperature,
        chunk=logit_chunk(base),
    )  # fmt: skip


def logit_chunk(base: Pretrained) -> int | None:
    """Of a large vocabulary a few positions' logits live at a time."""
    return 16 if base.config.vocab_size > 4096 else None


def score(
    base: Pretrained, task: Task, prompts: Sequence[str], sampled: rollout.Sampled, when: str
) -> tuple[rewards.Rewards, list[str]]:
    """What R completions are worth, and their texts. A completion that could not be scored has NaN, which is said;
    DataError where none could.
    """
    written = rollout.texts(sampled, lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True))
    found = rewards.score(task.functions, prompts, written, task.weights)
    if not np.isfinite(found.total).any():
        raise DataError(f"{when}: no reward function gave a number for any of {len(written)} completions.")
    for name, count in found.unscored.items():
        if count:
            metrics.say(f"{when}: reward {name!r} gave no number for {count} of {len(written)} completions")
    return found, written


def reference(base: Pretrained, run: training.Run) -> tuple[dict[str, Any], int]:
    """The base with its adapters off, on the run's own frozen buffers; and how many of its leaves train, of which it
    needs the copies that `base` still holds.
    """
    copied = len(jax.tree.leaves(base.params)) - len(jax.tree.leaves(run.frozen["params"]))
    return {"params": tree.combine(run.frozen["params"], base.params)}, copied


def policy_variables(run: training.Run, state: states.TrainState, head: bool = True) -> dict[str, Any]:
    """What the policy is applied with, realised; with its value head, if it has one and `head`. Empty collections are
    left out: a policy that trains the base itself has the program of its reference.
    """
    kept = {k: x for k, x in state.variables(run.frozen).items() if k in ("params", "peft") + ("head",) * head}
    found = peft.realised(run.method, kept, run.sites)
    return {k: x for k, x in found.items() if jax.tree.leaves(x)}


def start(
    base: Pretrained,
    spec: str,
    task: Task,
    settings: Settings,
    recipe: training.Recipe,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Learner:
    """A method on a base that learns on policy."""
    v, every, width = settings.formula, settings.every(recipe), task.train.tokens.shape[1] + settings.max_new
    if settings.prompts > len(task.train.texts):
        raise FlagError(f"prompts={settings.prompts} a rollout, but there are {len(task.train.texts)}.")
    controller, several = settings.controller, {}
    if len(task.functions) > 1:
        several = {name: "reward_" + re.sub(r"\W+", "_", name) for name in task.functions}

    def heads(rng: jax.Array) -> dict[str, Any]:
        head = {"head": value.init_head(base.config.hidden_size)} if v.advantage == "gae" else {}
        none = rollout.empty(v, settings.rows, width, settings.group, settings.kl_coef)
        none["stats"] |= {metric: jnp.zeros(()) for metric in several.values()}
        return head | {"rollout": none}

    options = {"value_coef": settings.value_coef, "value_clip": settings.value_clip or None}
    options["chunk"] = logit_chunk(base)
    loss = rollout.loss(base.model, v, temperature=settings.temperature, **options)
    run = training.start(base, spec, loss, recipe, seed, heads=heads, mesh=mesh)
    known, _ = reference(base, run)
    draw = sampler(base, settings)
    order = Batches({"prompt": np.arange(len(task.train.texts))}, settings.prompts, seed)

    def place(rows: np.ndarray) -> Any:
        """Shares rows out over the mesh where it divides them."""
        if mesh is None:
            return rows
        shared = meshes.batch_sharding(mesh, micro=False)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.device_put(rows, whole if len(rows) % (mesh.shape["data"] * mesh.shape["fsdp"]) else shared)

    def sample(state: states.TrainState, prompts: Prompts, rng: jax.Array) -> rollout.Sampled:
        return draw(policy_variables(run, state), known, place(prompts.tokens), place(prompts.mask), rng)

    def prepare(step: int, state: states.TrainState) -> states.TrainState:
        if step % every:
            return state
        number = step // every
        prompts = task.train.take(np.repeat(order.batch(number)["prompt"][0], settings.group))
        sampled = sample(state, prompts, jax.random.fold_in(peft.fold(state.rng, "rollout"), step))
        found, _ = score(base, task, prompts.texts, sampled, f"rollout {number + 1}")
        before = state.extra["rollout"]
        coef = float(before["stats"]["kl_coef"])
        if number:  # the coefficient after the rollout before
            coef = replace(controller, coef=coef).update(float(before["stats"]["kl_sequence"]), settings.rows).coef
        rows, stats = rollout.credit(
            v, sampled, jnp.asarray(found.total), settings.group, coef, missing_eos=settings.missing_eos,
            dynamic=settings.variant == "dapo", gamma=settings.gamma, lam=settings.lam,
        )  # fmt: skip
        own = {name: found.each[name][np.isfinite(found.each[name])] for name in several}
        stats |= {several[name]: jnp.float32(x.mean() if x.size else 0.0) for name, x in own.items()}
        new = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), {"rows": rows, "stats": stats}, before)
        return state.replace(extra=state.extra | {"rollout": new})

    def judge(state: states.TrainState) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """By one completion of each held-out prompt, always with the same random numbers."""
        sampled, texts = sample(state, task.held_out, jax.random.key(seed)), task.held_out.texts
        found, written = score(base, task, texts, sampled, "evaluation")
        _, stats = rollout.credit(v, sampled, jnp.asarray(found.total), 1)
        shown = zip(texts, written, found.total.tolist(), strict=True)
        names = ("reward", "kl_sequence", "completion_length", "terminated")
        return {k: float(stats[k]) for k in names}, [dict(prompt=p, completion=c, reward=r) for p, c, r in shown]

    rows = Batches({"rows": np.arange(settings.rows, dtype=np.int32)}, recipe.batch_size, seed, recipe.micro_batches)
    batch = rollout.row_batches(rows.batch, every)
    return Learner(run, batch, prepare, lambda state, stop=None: judge(state)[0], judge)


def train(
    learner: Learner,
    settings: Settings,
    recipe: training.Recipe,
    workdir: Path,
    identity: dict[str, Any],
    **options: Any,
) -> Any:
    """`training.train` of a learner, and frontier.png: the reward of each rollout against its KL.

    Raises ModelError where a first step after sampling did not have ratio 1 and nothing clipped.
    """
    options = {"curve": CURVE, "unit": "rows"} | options
    result = training.train(
        learner.run, learner.batch, recipe, workdir, identity, prepare=learner.prepare, evaluate=learner.evaluate,
        **options,
    )  # fmt: skip
    every = settings.every(recipe)
    first = [row for row in result.history if "ratio_mean" in row and (row["step"] - 1) % every == 0]
    if bad := [row["step"] for row in first if row["ratio_mean"] != 1 or row["clip_fraction"] != 0]:
        raise ModelError(f"step {bad[0]}: the policy that learns is not the one that sampled.")
    points = [(row["kl_sequence"], row["reward"]) for row in first]
    frontier({settings.variant: points}, workdir / "frontier.png")
    return result


def frontier(
    series: dict[str, Sequence[tuple[float, float]]], png: Path, line: Sequence | None = None, gain: str = "reward"
) -> None:
    """Draws `gain` against KL in nats a completion: a series a name, and `line` (best of n) as a dashed one."""
    figure = plot.figure(6.5, 4.2)
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linestyle="none", label=name)
    if line:
        axes.plot(*zip(*line, strict=True), "k--", marker=".", linewidth=1, label="best of n (bound of its KL)")
    axes.set(xlabel="KL(policy || reference), nats a completion", ylabel=gain)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plot.save(figure, png)
