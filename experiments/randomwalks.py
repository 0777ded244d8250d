"""Every way to learn from rewards on one small task: shortest paths on a random graph, from walks that wander.

    python -m experiments.randomwalks                                    # all rows, about 4 minutes on two cores
    python -m experiments.randomwalks --methods=grpo,dpo --peft=lora:rank=4,targets=all

A tiny decoder imitates 1000 random walks (SFT); the others start from it, are its reference's KL away when they end,
and are sampled from every start node. Optimality is 1 for a shortest path and 0 for one that does not arrive: uniform
tokens give 0.007, imitation 0.35. Differs from `ppo` and `grpo`, which train one policy each. The same command goes on
where an interrupted run was: each method has a folder below --workdir. Writes results.md, result.json, config.json and
frontier.png (optimality against KL, with best of n).
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tabulate import tabulate

from experiments.shared import characters, common, on_policy, training
from experiments.shared.dry_run import dry_run
from research.convert.load import Pretrained
from research.data.batches import Batches
from research.errors import FlagError, did_you_mean
from research.files import write_text
from research.peft import tree
from research.rl import pairs, rewards, rollout
from research.rl import randomwalks as walks
from research.tasks import alignment
from research.tasks.preference import Options
from research.train.lock import lock

METHODS = ("best_of_n", "ppo", "grpo", "rloo", "dpo", "kto")
ON_POLICY = {
    "ppo": {"epochs": 4, "value_coef": 1.0},
    "grpo": {},
    "rloo": {},
}
SIZES = (2, 4, 8, 16)  # of best of n


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_list("methods", list(METHODS), f"Rows of the table: {', '.join(METHODS)}.")
    flags.DEFINE_string("peft", "full", "Method specification of all that start from the imitator.")
    flags.DEFINE_integer("graph", 1000, "Seed of the graph.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("width", 64, "Width of the decoder, a multiple of 16.", lower_bound=16)
    flags.DEFINE_integer("layers", 2, "Its layers.", lower_bound=1)
    flags.DEFINE_integer("sft_steps", 500, "Steps of imitation.", lower_bound=1)
    training.recipe_flags(learning_rate=1e-3, steps=200, batch_size=160, schedule="linear", warmup=0.0,
                          weight_decay=0.0)  # fmt: skip
    flags.DEFINE_integer("group", 16, "Completions of each of the 20 starts in a rollout.", lower_bound=2)
    flags.DEFINE_float("kl_coef", 0.0, "Price of a nat of KL, of the methods on policy.", lower_bound=0.0)
    flags.DEFINE_float("missing_eos", 0.5, "What a walk that never says it is over loses on policy.", lower_bound=0.0)
    flags.DEFINE_float("beta", 0.5, "Of DPO and KTO.", lower_bound=1e-6)
    flags.DEFINE_integer("samples", 256, "Walks from each start that a row is judged by.", lower_bound=16)
    training.run_flags("runs/randomwalks", eval_every=50, save_every=100)


def main() -> None:
    values = flags.FLAGS
    if unknown := [name for name in values.methods if name not in METHODS]:
        raise FlagError(f"no method {unknown[0]!r}.{did_you_mean(unknown[0], METHODS)}")
    if values.width % 16:
        raise FlagError(f"width={values.width} is no multiple of 16. Valid: {max(16, values.width // 16 * 16)}.")
    if values.samples % values.group or values.samples % 4:
        raise FlagError(f"samples={values.samples}: a multiple of 4 and of group={values.group}.")
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh) as mesh, lock(workdir):
        Table(values, recipe, workdir, mesh).run()


class Table:
    """The rows, made one after the other."""

    def __init__(self, values: Any, recipe: training.Recipe, workdir: Path, mesh: Any):
        self.values, self.recipe, self.workdir, self.mesh = values, recipe, workdir, mesh
        self.graph = walks.build(values.graph)
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        values, began = self.values, time.perf_counter()
        fresh = characters.policy("walks", walks.NAMES, walks.LONGEST + 1, values.width, values.layers, values.seed)
        starts, rest = zip(*((w[0], w[1:]) for w in self.graph.walks), strict=True)
        data = characters.rows(fresh.tokenizer, starts, rest)
        imitate = replace(self.recipe, learning_rate=2e-3, steps=values.sft_steps, batch_size=128, micro_batches=1,
                          schedule="cosine")  # fmt: skip
        if values.dry_run:
            learner = self.learner(fresh, values.methods[0])
            return print(dry_run(learner.run, learner.batch, self.recipe, self.mesh, f"walk: {self.graph.walks[0]!r}"))
        base = characters.supervised(fresh, data, imitate, self.workdir / "sft", values.seed, self.mesh)
        common.write_config(self.workdir)
        pool = self.add("sft", base, {"params": base.params})
        for name in values.methods:
            if name == "best_of_n":
                self.best_of_n()
                continue
            learner = self.learner(base, name, pool)
            result = self.train(learner, base, name)
            self.add(name, base, on_policy.policy_variables(learner.run, result.state, head=False), result.seconds)
        self.write(time.perf_counter() - began)

    # ------------------------------------------------------------------------------------------------ one method

    def settings(self, name: str) -> on_policy.Settings:
        more = ON_POLICY.get(name, {})
        return on_policy.Settings(
            name if name in ON_POLICY else "grpo", prompts=walks.NODES - 1, group=self.values.group,
            max_new=walks.LONGEST, kl_coef=self.values.kl_coef, missing_eos=self.values.missing_eos, **more,
        )  # fmt: skip

    def recipe_of(self, name: str) -> training.Recipe:
        """RLOO weighs no token by how much likelier it has become: a rollout is one step."""
        return replace(self.recipe, batch_size=self.settings(name).rows) if name == "rloo" else self.recipe

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Optimality of each walk."""
        return [walks.optimality(self.graph, p + c) for p, c in zip(prompts, completions, strict=True)]

    def learner(self, base: Pretrained, name: str, pool: rollout.Sampled | None = None) -> on_policy.Learner:
        """A run that starts at the imitator."""
        values, starts = self.values, list(walks.NAMES[1:])
        if name in ON_POLICY or pool is None:
            settings = self.settings(name)
            known = on_policy.encode(base, starts, settings.max_new)
            held = on_policy.encode(base, starts * values.group, settings.max_new)
            task = on_policy.Task(known, held, {"optimality": self.reward}, {}, {"graph": values.graph})
            return on_policy.start(base, values.peft, task, settings, self.recipe_of(name), values.seed, self.mesh)
        options = Options(beta=values.beta)
        make = self.preferred if name == "dpo" else self.judged
        loss = {
            "dpo": lambda: alignment.preference_loss(base.model, "dpo", options, "initial_adapter"),
            "kto": lambda: alignment.kto_loss(base.model, options, "initial_adapter"),
        }[name]()
        kept = lambda rng: {"reference": {"params": base.params}}  # noqa: E731
        run = training.start(base, values.peft, loss, self.recipe, values.seed, heads=kept, mesh=self.mesh)
        return on_policy.Learner(run, make(pool), None, None)

    def train(self, learner: on_policy.Learner, base: Pretrained, name: str) -> Any:
        values, where, recipe = self.values, self.workdir / name, self.recipe_of(name)
        identity = {"base": base.fingerprint, "method": name, "peft": values.peft, "seed": values.seed,
                    "recipe": common.jsonable(recipe), "graph": values.graph}  # fmt: skip
        options = {"label": name, "save_every": values.save_every, "mesh": self.mesh}
        if name in ON_POLICY:
            settings = self.settings(name)
            identity["settings"] = common.jsonable(settings)
            options["eval_every"] = values.eval_every
            return on_policy.train(learner, settings, recipe, where, identity, **options)
        identity |= {"beta": values.beta, "samples": values.samples}
        curve = ("loss", "rewards/margins", "rewards/accuracies", "kl")
        return training.train(learner.run, learner.batch, recipe, where, identity, curve=curve, **options)

    def preferred(self, pool: rollout.Sampled) -> training.Batch:
        """The best and the worst of every four walks of the imitator from one start."""
        four = self.scores.reshape(-1, 4)
        best, worst, differ = pairs.best_and_worst(four)
        at = 4 * np.arange(len(four))
        sides = {"chosen": (at + best)[differ], "rejected": (at + worst)[differ]}
        leaves = {k: np.asarray(getattr(pool, k)) for k in ("tokens", "mask", "completion")}
        flat = {f"{side}/{k}": leaf[rows] for side, rows in sides.items() for k, leaf in leaves.items()}
        return self.nested(flat)

    def judged(self, pool: rollout.Sampled) -> training.Batch:
        """All walks of the imitator: desirable is one above its start's mean."""
        per_start = self.scores.reshape(walks.NODES - 1, -1)
        leaves = {k: np.asarray(getattr(pool, k)) for k in ("tokens", "mask", "completion")}
        good = (per_start > per_start.mean(axis=1, keepdims=True)).reshape(-1)
        batch = self.nested(leaves | {"desirable": good})

        def mismatched(step: int) -> dict[str, Any]:
            rows = batch(step)
            other = pairs.rotate(rows["tokens"].shape[1])
            swap = lambda x: np.concatenate([x[:, :, :1], x[:, other, 1:]], axis=2)  # noqa: E731  (a prompt is one node)
            return rows | {"mismatched": {k: swap(rows[k]) for k in leaves}}

        return mismatched

    def nested(self, flat: dict[str, np.ndarray]) -> training.Batch:
        size = min(self.recipe.batch_size, len(next(iter(flat.values()))))
        batches = Batches(flat, size, self.values.seed, self.recipe.micro_batches)
        return lambda step: tree.unflatten(batches.batch(step))

    # ------------------------------------------------------------------------------------------------- what it is worth

    def add(self, name: str, base: Pretrained, variables: dict, seconds: float | None = None) -> rollout.Sampled:
        """Judges a policy by `samples` walks from each start."""
        settings, starts = self.settings(name), walks.NODES - 1
        prompts = on_policy.encode(base, [c for c in walks.NAMES[1:] for _ in range(settings.group)], settings.max_new)
        draw, known, rng = on_policy.sampler(base, settings), {"params": base.params}, jax.random.key(self.values.seed)
        rounds = [
            draw(variables, known, prompts.tokens, prompts.mask, jax.random.fold_in(rng, i))
            for i in range(self.values.samples // settings.group)
        ]  # of the shape that rollouts have, which is compiled already
        joined = [np.concatenate([np.asarray(x).reshape(starts, settings.group, -1) for x in leaves], axis=1)
                  for leaves in zip(*(r[:-1] for r in rounds), strict=True)]  # fmt: skip
        sampled = rollout.Sampled(*(x.reshape(-1, x.shape[-1]) for x in joined), rounds[0].gap)
        written = rollout.texts(sampled, lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True))
        begun = np.repeat(list(walks.NAMES[1:]), self.values.samples)
        score = np.asarray(self.reward(begun.tolist(), written), np.float32)
        if name == "sft":
            self.scores = score
        ratio = (sampled.old - sampled.reference).sum(axis=1)
        self.rows[name] = {"optimality": float(score.mean()), "error": float(score.std() / len(score) ** 0.5),
                           "kl": float(ratio.mean()), "seconds": seconds}  # fmt: skip
        print(f"{name}: optimality {score.mean():.3f}, KL {ratio.mean():.2f}", flush=True)
        return sampled

    def best_of_n(self) -> None:
        """Expected best of n of the imitator's walks, without a step of training."""
        per_start = self.scores.reshape(walks.NODES - 1, -1)
        for n in SIZES:
            best = float(rewards.expected_best(per_start, n).mean())
            self.rows[f"best of {n}"] = {"optimality": best, "error": None, "kl": rewards.best_of_kl(n), "seconds": 0.0}

    def write(self, seconds: float) -> None:
        exact = walks.expected(self.graph, walks.imitation(self.graph))
        uniform = np.full((walks.NODES, walks.NODES), 1 / walks.NODES)
        ends = {"uniform tokens": walks.expected(self.graph, uniform), "imitation, exactly": exact}
        shown = [[name, value, None, None, None] for name, value in ends.items()]
        shown += [[name, r["optimality"], r["error"], r["kl"], r["seconds"]] for name, r in self.rows.items()]
        shown += [["shortest paths", 1.0, None, None, None]]
        table = tabulate(shown, ["policy", "optimality", "± (walks)", "KL to sft", "s"], "github", floatfmt=".3f")
        note = f"Optimality over 20 starts, {self.values.samples} walks each; {seconds:.0f} s in all."
        write_text(self.workdir / "results.md", f"{table}\n\n{note}\n")
        common.write_json(self.workdir / "result.json", {"rows": self.rows, "bounds": ends, "seconds": seconds})
        line = [(r["kl"], r["optimality"]) for name, r in self.rows.items() if name.startswith(("best", "sft"))]
        points = {k: [(r["kl"], r["optimality"])] for k, r in self.rows.items() if not k.startswith("best")}
        on_policy.frontier(points, self.workdir / "frontier.png", line if len(line) > 1 else None)
        print(f"{table}\n\n{note}")


if __name__ == "__main__":
    define_flags()
    common.run(main)
