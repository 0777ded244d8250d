"""What a way of learning from rewards buys for its KL: movie sentences that are continued so as to turn out well.

    python -m experiments.pretrain                                              # the policy's base
    python -m experiments.reward_model                                          # the reward
    python -m experiments.classify --data=vader/amazon --workdir=runs/judge     # the judge, who read other texts
    python -m experiments.sentiment                                             # five methods, three seeds each

The controlled-sentiment figure of the DPO paper (arXiv 2305.18290, section 6.1) from packaged parts. The policy reads
the movie sentences first (SFT) and is the reference of all that follows. Every method starts there, learns from the
reward how to go on after a sentence's opening words, and is judged on openings of sentences that nobody trained on: by
the reward and by a classifier that had no part in it. PPO, GRPO and RLOO sample as they learn; DPO and KTO learn from
samples of the SFT policy, and best of n picks among them. Differs from `randomwalks`, whose reward is exact and whose
policy is tiny, and from `ppo` and `grpo`, which train one policy each. The same command goes on where an interrupted
run was: each method and seed has a folder. Writes results.md, result.json, config.json, samples.jsonl and frontier.png
(share judged positive against KL) under --workdir.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tabulate import tabulate

from experiments import preference, reward_model
from experiments.shared import characters, classification, common, on_policy, policy_run, references, replies, training
from experiments.shared.dry_run import dry_run
from research.convert.load import Pretrained
from research.data import text, tokenize
from research.data.batches import Batches, eval_batches
from research.errors import FlagError, did_you_mean
from research.files import write_text
from research.rl import pairs, rewards, rollout
from research.tasks import classify
from research.tasks.preference import Options
from research.train.lock import lock

METHODS = ("best_of_n", "ppo", "grpo", "rloo", "dpo", "kto")
ON_POLICY = {"ppo": {"epochs": 2, "group": 1}, "grpo": {}, "rloo": {}}
SIZES = (1, 2, 4, 8, 16)  # of best of n
NEAR = 10.0  # nats of KL up to which a policy counts as near its reference
JUDGED = ("reward", "positive", "kl_sequence", "completion_length", "terminated")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("runs/pretrain/model")
    flags.DEFINE_string("data", "vader/movie", "Labelled sentences; the opening words of some are the prompts.")
    flags.DEFINE_string("reward", "runs/reward_model/adapter", "Adapter directory of a reward model.")
    flags.DEFINE_string("judge", "runs/judge/adapter", "Adapter directory of a classifier; its last class is the good.")
    flags.DEFINE_list("methods", list(METHODS), f"Rows of the table: {', '.join(METHODS)}.")
    flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=1)
    flags.DEFINE_string("peft", "lora:rank=16,targets=all", "Method specification of all that start from SFT.")
    flags.DEFINE_integer(
        "sft_steps", 300, "Steps of reading the sentences; 0 for a base that knows them.", lower_bound=0
    )
    flags.DEFINE_float("sft_rate", 5e-4, "Learning rate of that.", lower_bound=0.0)
    training.recipe_flags(learning_rate=1e-3, steps=250, batch_size=64, schedule="wsd", warmup=0.05,
                          weight_decay=0.0)  # fmt: skip
    flags.DEFINE_integer("prompt_words", 4, "Words of a sentence that are the prompt.", lower_bound=1)
    flags.DEFINE_integer("max_new", 24, "Tokens of a continuation.", lower_bound=1)
    flags.DEFINE_integer("group", 8, "Continuations of a prompt, of the methods that compare them.", lower_bound=2)
    flags.DEFINE_float("kl_coef", 0.05, "What a nat of KL costs of PPO's and RLOO's reward.", lower_bound=0.0)
    flags.DEFINE_float("kl_loss", 0.2, "Weight of a token's KL in GRPO's loss, whose rewards are in deviations.",
                       lower_bound=0.0)  # fmt: skip
    flags.DEFINE_float("missing_eos", 0.3, "What a continuation without an end is worth less.", lower_bound=0.0)
    flags.DEFINE_float("beta", 0.2, "Of DPO and KTO.", lower_bound=1e-6)
    flags.DEFINE_integer("pairs", 4, "DPO's of a group, by rank from both ends; half a group uses all.", lower_bound=1)
    flags.DEFINE_integer("pool", 2048, "Prompts that DPO and KTO have samples of, --group each.", lower_bound=1)
    flags.DEFINE_integer("eval_prompts", 512, "Held-out prompts a policy is judged on.", lower_bound=2)
    training.run_flags("runs/sentiment", eval_every=50, save_every=100)


def main() -> None:
    values = flags.FLAGS
    if unknown := [name for name in values.methods if name not in METHODS]:
        raise FlagError(f"no method {unknown[0]!r}.{did_you_mean(unknown[0], METHODS)}")
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    if recipe.batch_size % values.group:
        raise FlagError(f"batch_size={recipe.batch_size} is no multiple of group={values.group}.")
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh) as mesh, lock(workdir):
        Table(values, recipe, workdir, mesh).run()


def load_judge(directory: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> the probability [N] of a classifier's last class. ModelError where the adapter is none."""
    base, variables, loaded = classification.classifier(directory)
    length = loaded.meta["max_length"]
    each = jax.jit(lambda v, b: jax.nn.softmax(classify.logits(base.model, v, b))[:, -1])

    def probability(texts: Sequence[str]) -> np.ndarray:
        found = tokenize.encode(base.tokenizer, texts, length)
        parts = [each(variables, {k: b[k] for k in ("tokens", "mask")}) for b in eval_batches(found, 64, 16)]
        return np.concatenate(jax.device_get(parts))[: len(texts)]

    return probability


class Table:
    """The rows, made one after the other."""

    def __init__(self, values: Any, recipe: training.Recipe, workdir: Path, mesh: Any):
        self.values, self.recipe, self.workdir, self.mesh = values, recipe, workdir, mesh
        self.reward, self.judge = reward_model.load_reward(values.reward), load_judge(values.judge)
        self.splits = text.load(values.data)
        self.runs: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.pools: dict[int, tuple[rollout.Sampled, np.ndarray]] = {}

    def run(self) -> None:
        values, began = self.values, time.perf_counter()
        options = common.model_options()
        self.base = replies.load_model(values.model, values.quantise, **options)
        classification.check(self.base, values.peft)
        learn, held = policy_run.prompt_texts(values.data, values.prompt_words)
        held = policy_run.some(held, values.eval_prompts)
        self.learn, self.held = (on_policy.encode(self.base, part, values.max_new) for part in (learn, held))
        if values.dry_run:
            learner = self.learner(next((m for m in values.methods if m in ON_POLICY), "grpo"), 0)
            return print(dry_run(learner.run, learner.batch, self.recipe, self.mesh, f"prompt: {learn[0]!r}"))
        common.write_config(self.workdir)
        self.base = self.read_sentences()
        test = self.splits.test
        right = float(((self.judge(test.texts) > 0.5) == (test.labels == test.labels.max())).mean())
        print(f"the judge is right about {100 * right:.1f} % of {len(test)} held-out sentences as they were written")
        sft, rows = self.judged({"params": self.base.params}, {"params": self.base.params})
        self.note("sft", 0, sft, rows, 0.0)
        for name in values.methods:
            if name == "best_of_n":
                self.best_of_n()
                continue
            for seed in range(values.seeds):
                self.train(name, seed)
        self.write(right, time.perf_counter() - began)

    def read_sentences(self) -> Pretrained:
        """The base after SFT on whole sentences of the training part."""
        values, reads = self.values, replies.closing(self.base.tokenizer)
        if not values.sft_steps:
            return self.base
        most = self.learn.tokens.shape[1] + values.max_new
        texts = [t for t in self.splits.train.texts if 0 < len(reads(t)["input_ids"]) < most]
        data = characters.rows(reads, [""] * len(texts), texts)
        recipe = replace(self.recipe, learning_rate=values.sft_rate, steps=values.sft_steps, schedule="cosine",
                         batch_size=min(64, len(texts)), micro_batches=1)  # fmt: skip
        print(f"SFT on {len(texts)} of {len(self.splits.train)} sentences, which have less than {most} tokens")
        return characters.supervised(self.base, data, recipe, self.workdir / "sft", values.seed, self.mesh)

    # ------------------------------------------------------------------------------------------------ one method

    def settings(self, name: str) -> on_policy.Settings:
        more = {"group": self.values.group} | ON_POLICY.get(name, {})
        prompts = self.recipe.batch_size // more["group"]
        same = common.flag_values("max_new", "missing_eos")
        found = on_policy.Settings(name if name in ON_POLICY else "grpo", prompts=prompts, **same, **more)
        return replace(found, kl_coef=self.values.kl_coef if found.kl_in_reward else self.values.kl_loss)

    def learner(self, name: str, seed: int) -> on_policy.Learner:
        """A run that starts at the SFT policy."""
        values, base = self.values, self.base
        if name in ON_POLICY:
            task = on_policy.Task(self.learn, self.held, {"reward": self.reward}, {}, {})
            return on_policy.start(base, values.peft, task, self.settings(name), self.recipe, seed, self.mesh)
        data = (self.preferred if name == "dpo" else self.liked)(seed)
        goal = preference.Objective(name, Options(beta=values.beta), "base")
        loss = goal.loss(base.model, on_policy.logit_chunk(base))
        options = {"reference": goal.reference, "mesh": self.mesh}
        run = references.start(base, values.peft, loss, self.recipe, seed, data, **options)
        size = min(self.recipe.batch_size // (2 if name == "dpo" else 1), len(next(iter(data.values()))))
        return on_policy.Learner(run, Batches(data, size, seed, self.recipe.micro_batches).batch)

    def train(self, name: str, seed: int) -> None:
        """A method from one seed, judged at its evaluations and at the end."""
        values, where = self.values, self.workdir / f"{name}-{seed}"
        learner = self.learner(name, seed)
        known, _ = on_policy.reference(self.base, learner.run)
        judge = lambda state: self.judged(on_policy.policy_variables(learner.run, state, head=False), known)  # noqa: E731
        learner = learner._replace(evaluate=lambda state, stop=None: judge(state)[0])
        identity = {"base": self.base.fingerprint, "method": name, "peft": values.peft, "seed": seed,
                    "recipe": common.jsonable(self.recipe), "reward": values.reward, "judge": values.judge,
                    **common.flag_values("data", "prompt_words", "max_new", "group", "eval_prompts")}  # fmt: skip
        options = {"label": f"{name} {seed}", "mesh": self.mesh, **common.flag_values("save_every", "eval_every")}
        if name in ON_POLICY:
            settings = self.settings(name)
            identity["settings"] = common.jsonable(settings)
            result = on_policy.train(learner, settings, self.recipe, where, identity, **options)
        else:
            identity |= common.flag_values("beta", "pairs", "pool", "missing_eos")
            curve = ("loss", "eval/reward", "eval/positive", "eval/kl_sequence")
            options |= {"curve": curve, "evaluate": learner.evaluate}
            result = training.train(learner.run, learner.batch, self.recipe, where, identity, **options)
        found, rows = judge(result.state)
        way = [{k: row[f"eval/{k}"] for k in JUDGED} for row in result.history if "eval/positive" in row]
        self.note(name, seed, found, rows, result.seconds, way)

    def sampled(self, prompts: on_policy.Prompts, variables: dict, known: dict, rng: jax.Array) -> rollout.Sampled:
        """A continuation of each prompt, in draws of one shape; the last is filled up and cut."""
        size, count = self.recipe.batch_size, len(prompts.texts)
        draw = on_policy.sampler(self.base, self.settings("grpo"))
        parts = []
        for i, first in enumerate(range(0, count, size)):
            rows = np.arange(first, first + size) % count
            drawn = draw(variables, known, prompts.tokens[rows], prompts.mask[rows], jax.random.fold_in(rng, i))
            parts.append([np.asarray(x)[: count - first] for x in drawn[:-1]])
        return rollout.Sampled(*(np.concatenate(x) for x in zip(*parts, strict=True)), np.float32(0))

    def texts(self, sampled: rollout.Sampled) -> list[str]:
        return rollout.texts(sampled, lambda ids: self.base.tokenizer.decode(ids, skip_special_tokens=True))

    def scored(self, prompts: Sequence[str], written: Sequence[str]) -> np.ndarray:
        """The reward of each; a continuation without words has that of the worst."""
        found = rewards.score({"reward": self.reward}, prompts, written).total
        return np.where(np.isfinite(found), found, np.nanmin(found))

    def pool(self, seed: int) -> tuple[rollout.Sampled, np.ndarray]:
        """`group` samples of the SFT policy for each of `pool` prompts, and their rewards [pool, group], less the price
        of what does not end. Methods of the same seed share it.
        """
        if seed in self.pools:
            return self.pools[seed]
        values, own = self.values, {"params": self.base.params}
        order = np.random.Philox(key=seed).random_raw(len(self.learn.texts)).argsort()
        prompts = self.learn.take(np.repeat(order[: values.pool], values.group))
        sampled = self.sampled(prompts, own, own, jax.random.key(seed))
        score = self.scored(prompts.texts, self.texts(sampled)) - values.missing_eos * ~sampled.ended
        self.pools[seed] = sampled, score.reshape(-1, values.group)
        return self.pools[seed]

    def preferred(self, seed: int) -> dict[str, np.ndarray]:
        """The best of every group with its worst, the second best with the second worst, and so on."""
        sampled, score = self.pool(seed)
        best, worst, differ = pairs.ranked(score, self.values.pairs)
        first = self.values.group * np.arange(len(score))[:, None]
        sides = {"chosen": (first + best)[differ], "rejected": (first + worst)[differ]}
        leaves = {k: getattr(sampled, k) for k in ("tokens", "mask", "completion")}
        return {f"{side}_{k}": leaf[rows] for side, rows in sides.items() for k, leaf in leaves.items()}

    def liked(self, seed: int) -> dict[str, np.ndarray]:
        """Every sample, liked where it is above the mean of its group, and its prompt with another's continuation."""
        sampled, score = self.pool(seed)
        leaves = {k: getattr(sampled, k) for k in ("tokens", "mask", "completion")}
        good = (score > score.mean(axis=1, keepdims=True)).reshape(-1)
        width, other = self.learn.tokens.shape[1], pairs.rotate(len(good))
        swap = lambda x: np.concatenate([x[:, :width], x[other, width:]], axis=1)  # noqa: E731
        return leaves | {"desirable": good} | {f"mismatched_{k}": swap(leaf) for k, leaf in leaves.items()}

    # ------------------------------------------------------------------------------------------------- what it is worth

    def judged(self, variables: dict, known: dict) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """By one continuation of each held-out prompt, always with the same random numbers."""
        sampled = self.sampled(self.held, variables, known, jax.random.key(self.values.seed))
        written, prompts = self.texts(sampled), self.held.texts
        score = self.scored(prompts, written)
        positive = self.judge([p + w for p, w in zip(prompts, written, strict=True)])
        found = {
            "reward": score.mean(), "positive": (positive > 0.5).mean(),
            "kl_sequence": (sampled.old - sampled.reference).sum(axis=1).mean(),
            "completion_length": sampled.completion.sum(axis=1).mean(), "terminated": sampled.ended.mean(),
        }  # fmt: skip
        shown = zip(prompts, written, score.tolist(), positive.tolist(), strict=True)
        rows = [{"prompt": p, "completion": c, "reward": r, "positive": j} for p, c, r, j in shown]
        return {name: float(value) for name, value in found.items()}, rows

    def note(self, name: str, seed: int, found: dict, rows: list, seconds: float, way: Sequence[dict] = ()) -> None:
        """Keeps a finished run and prints a line of it."""
        near = max((w["positive"] for w in way if w["kl_sequence"] <= NEAR), default=None)
        self.runs.append({"method": name, "seed": seed, **found, "near": near, "seconds": seconds, "way": list(way)})
        self.samples += [{"method": name, "seed": seed} | row for row in rows]
        print(f"{name} {seed}: judged positive {found['positive']:.3f}, reward {found['reward']:.3f}, "
              f"KL {found['kl_sequence']:.2f}", flush=True)  # fmt: skip

    def best_of_n(self) -> None:
        """Of the SFT policy's samples the one of the best reward, exactly, without a step of training."""
        own, most = {"params": self.base.params}, max(SIZES)
        many = self.held.take(np.repeat(np.arange(len(self.held.texts)), most))
        written = self.texts(self.sampled(many, own, own, jax.random.key(self.values.seed + 1)))
        score = self.scored(many.texts, written).reshape(-1, most)
        positive = self.judge([p + w for p, w in zip(many.texts, written, strict=True)]).reshape(-1, most) > 0.5
        for n in SIZES:
            found = {"reward": rewards.expected_best(score, n), "positive": rewards.expected_best(score, n, positive)}
            known = {"kl_sequence": rewards.best_of_kl(n)} | {k: float(x.mean()) for k, x in found.items()}
            self.runs.append({"method": f"best of {n}", "seed": 0, **known, "near": None, "seconds": 0.0, "way": []})

    def write(self, right: float, seconds: float) -> None:
        """The table, a row a method with means and deviations over its seeds, and the figure."""
        names = list(dict.fromkeys(run["method"] for run in self.runs))
        shown = []
        for name in names:
            runs = [run for run in self.runs if run["method"] == name]
            spread = lambda key: spell([run[key] for run in runs if run[key] is not None])  # noqa: E731, B023
            shown.append([name, *map(spread, ("positive", "reward", "kl_sequence", "near", "seconds"))])
        heads = ["policy", "judged positive", "reward", "KL to SFT", f"best at KL <= {NEAR:.0f}", "train s"]
        table = tabulate(shown, heads, "github", disable_numparse=True)
        note = f"{len(self.held.texts)} held-out openings, one continuation each. The judge is right about " \
               f"{100 * right:.1f} % of held-out sentences. {seconds:.0f} s in all."  # fmt: skip
        write_text(self.workdir / "results.md", f"{table}\n\n{note}\n")
        common.write_json(self.workdir / "result.json", {"runs": self.runs, "judge": right, "seconds": seconds})
        lines = (json.dumps(common.finite(row), ensure_ascii=False) + "\n" for row in self.samples)
        write_text(self.workdir / "samples.jsonl", "".join(lines))
        points = {name: [(w["kl_sequence"], w["positive"]) for r in self.runs if r["method"] == name for w in r["way"]]
                  for name in names if not name.startswith(("best", "sft"))}  # fmt: skip
        line = [(r["kl_sequence"], r["positive"]) for r in self.runs if r["method"].startswith("best of ")]
        on_policy.frontier(points, self.workdir / "frontier.png", line or None, "share judged positive")
        print(f"{table}\n\n{note}")


def spell(values: Sequence[float]) -> str:
    """Mean ± deviation of several values, the value of one, nothing of none."""
    if not values:
        return ""
    mean = float(np.mean(values))
    digits = 3 if abs(mean) < 10 else 1 if abs(mean) < 100 else 0
    return f"{mean:.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    define_flags()
    common.run(main)
