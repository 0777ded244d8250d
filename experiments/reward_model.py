"""Trains a reward model with any PEFT method: a score whose differences are the log-odds of a preference.

    python -m experiments.reward_model                                     # soft pairs of movie sentences, MiniLM
    python -m experiments.reward_model --model=smollm2-135m-instruct --batch_size=16 --learning_rate=5e-4
    python -m experiments.reward_model --data=dpo/en --model=smollm2-135m-instruct --max_length=512 --batch_size=8

Bradley-Terry with a margin, soft targets and centring. Of a set that people have rated ("vader/movie", ...) pairs of
texts are drawn, and the target is the chance that a rater of the first scores it above what a rater of the second gives
that; the accuracy on pairs of held-out texts stands beside the raters' own agreement. Of published pairs ("dpo/en", a
file, a hub id; a row may have `margin` and `probability`) prompt and answer are scored together. The head is saved so
that scores of training texts have mean 0 and standard deviation 1. Differs from `preference`, which tunes the language
model itself. The same command goes on where an interrupted run was. Writes config.json, metrics.jsonl, curve.png,
checkpoints, adapter and result.json under --workdir; `best_of_n --reward=WORKDIR/adapter` uses it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.shared import classification, common, preferences, training
from experiments.shared.dry_run import dry_run
from experiments.shared.preferences import Data, Encoder, Leaves
from research.convert.load import Pretrained
from research.data import pairs, text
from research.data.batches import Batches, eval_batches
from research.data.instructions import Dropped
from research.errors import ModelError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import tree
from research.rl.rewards import RewardFn
from research.tasks import reward
from research.tasks.loss import Loss
from research.train.lock import lock

DEFAULT_MODEL = "minilm-l6"
CLEAR = 0.5  # of |2 P - 1|: three of four pairs of raters agree
CURVE = ("loss", "eval/loss", "rewards/accuracies", "eval/rewards/accuracies", "rewards/margins")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(DEFAULT_MODEL)
    flags.DEFINE_string("data", "vader/movie", "A rated set (vader/movie, ...), dpo/en, dpo/zh, a file or a hub id.")
    flags.DEFINE_integer("pairs", 4000, "Pairs drawn of a rated set, to train on.", lower_bound=1)
    flags.DEFINE_integer("held_out", 1000, "Pairs drawn of each held-out part of a rated set.", lower_bound=1)
    flags.DEFINE_bool("soft", True, "The raters' chances as targets; else who wins, ties left out.")
    flags.DEFINE_string("template", None, "Of published pairs: own, text, chatml, plain, plain/zh. Default as in text.")
    flags.DEFINE_string("peft", "lora", "Method specification, such as lora:rank=8 or lora+bitfit.")
    flags.DEFINE_float("margin", 0.0, "Added to each pair's own margin: by how much the chosen one must lead.")
    flags.DEFINE_float("centre", 0.01, "Weight of (R_w + R_l)^2, which fixes the free constant.", lower_bound=0.0)
    flags.DEFINE_integer("max_length", 48, "Tokens a row is cut to.", lower_bound=3)
    training.recipe_flags(learning_rate=1e-3, steps=300, batch_size=32)
    training.run_flags("runs/reward_model")


# ------------------------------------------------------------------------------------------------- data


def load_data(source: str, encoder: Encoder, max_length: int, counts: tuple[int, int], seed: int, soft: bool) -> Data:
    """{chosen,rejected}_{tokens,mask}, margin, target [N]. counts: pairs drawn to train and to hold out."""
    if source not in preferences.RATED:
        found = preferences.load_pairs(source, encoder, max_length, weighed=True)
        own = lambda leaves: {k: v for k, v in leaves.items() if not k.endswith("completion")}  # noqa: E731
        return found._replace(parts={part: own(leaves) for part, leaves in found.parts.items()})
    drawn = {part: soft_pairs(source, counts[part != "train"], seed, part) for part in text.PARTS}
    longest = 0
    parts, dropped = {}, 0
    for part, found in drawn.items():
        sides = [ended(encoder, words, max_length) for words in found.texts]
        longest = max(longest, *(len(side[1]) for side in sides))
        chance, at = found.probability, np.arange(len(found.first))
        if not soft:
            at = np.flatnonzero(chance != 0.5)
            dropped += len(chance) - len(at)
            chance = (chance > 0.5).astype(np.float32)
        leaves = {"target": chance[at], "margin": np.zeros(len(at), np.float32)}
        for name, which in (("chosen", found.first[at]), ("rejected", found.second[at])):
            filled = preferences.fill([sides[i] for i in which], max_length)
            leaves |= preferences.prefixed(name, {k: filled[k] for k in ("tokens", "mask")})
        parts[part] = leaves
    width = min(max_length, -(-longest // 16) * 16)
    parts = {p: {k: v[:, :width] if v.ndim > 1 else v for k, v in leaves.items()} for p, leaves in parts.items()}
    notes = (f"{source}: {dropped} pairs left out: a tie",) if dropped else ()
    one = drawn["train"]
    shown = f"{one.texts[one.first[0]]}\n{one.texts[one.second[0]]}\nP(first beats second) = {one.probability[0]:.3f}"
    return Data(parts, notes, shown)


def soft_pairs(source: str, count: int, seed: int, part: str) -> pairs.SoftPairs:
    """As `research.data.pairs.soft_pairs`; of the bundled sentences the class is the only rating."""
    if source != "smoke":
        return pairs.soft_pairs(source, count, seed, part)
    found = getattr(text.load(source), part)
    return pairs.pair_up(
        [(t, np.asarray([label])) for t, label in zip(found.texts, found.labels, strict=True)], count, seed
    )


def ended(encoder: Encoder, words: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A text in at most `width` tokens, of which the last ends it: that one is scored."""
    nothing, tokens = encoder.whole(words)
    return nothing, tokens if len(tokens) <= width else np.append(tokens[: width - 1], tokens[-1])


def agreement(source: str, found: pairs.SoftPairs) -> dict[str, float]:
    """How far people agree on pairs: `rater`, how often a rater of each text orders them as most do (ties count half);
    `halves`, how often one half of the raters orders a pair as the other half does. Pairs without an order don't count.
    """
    decided = found.probability != 0.5
    one = float(np.maximum(found.probability, 1 - found.probability)[decided].mean())
    if source not in text.VADER:
        return {"rater": one}
    scores = {t.strip().lower(): s for t, s in reversed(text.ratings(source))}  # of two ratings the first counts
    each = [scores[t.strip().lower()] for t in found.texts]
    half = lambda i, j, k: np.sign(pairs.preference(each[i][k::2], each[j][k::2]) - 0.5)  # noqa: E731
    both = np.asarray([(half(i, j, 0), half(i, j, 1)) for i, j in zip(found.first, found.second, strict=True)])
    told = both.all(axis=1)
    return {"rater": one, "halves": float((both[told, 0] == both[told, 1]).mean())}


# ------------------------------------------------------------------------------------------------- training


def objective(model: Any, margin: float, centre: float) -> Callable[[dict, dict, jax.Array | None], Loss]:
    """Of flat batches."""
    inner = reward.loss(model, centre)

    def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
        nested = preferences.nest(batch)
        return inner(variables, nested | {"margin": nested["margin"] + margin}, rng)

    return fn


def main() -> None:
    values = flags.FLAGS
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        options = common.model_options()
        base = training.load_base(values.model, values.quantise, mesh, **options)
        added = classification.check(base, values.peft)
        rated = values.data in preferences.RATED
        encoder = Encoder(base.tokenizer, "text" if rated else values.template)
        counts = (values.pairs, values.held_out)
        data = load_data(values.data, encoder, values.max_length, counts, values.seed, values.soft)
        classification.check_length(base, added, values.max_length)
        train = data.parts["train"]
        batch = Batches(train, recipe.batch_size, values.seed, recipe.micro_batches).batch

        def feed(seed: int) -> training.Batch:
            rows = Batches(train, recipe.batch_size, seed).batch
            return lambda i: {name: leaf[0] for name, leaf in rows(i).items()}

        heads = lambda rng: {"head": reward.init_head(rng, base.config.hidden_size)}  # noqa: E731
        loss = objective(base.model, values.margin, values.centre)
        run = training.start(base, values.peft, loss, recipe, values.seed, heads=heads, feed=feed, mesh=mesh)
        print(f"{training.summary(base, values.peft, run)}, and a head")
        sizes = ", ".join(f"{len(leaves['target'])} {part}" for part, leaves in data.parts.items())
        print("\n".join([*data.notes, f"{sizes} pairs of rows of {data.width} tokens"]))
        if values.dry_run:
            return print(dry_run(run, batch, recipe, mesh, data.shown))
        identity = {
            "base": base.fingerprint, "data": data.fingerprint, "peft": values.peft, "seed": values.seed,
            "recipe": common.jsonable(recipe), "dtype": values.dtype, "margin": values.margin, "centre": values.centre,
        }  # fmt: skip
        identity |= {} if values.quantise is None else {"quantise": values.quantise}
        result = training.train(
            run, batch, recipe, workdir, identity, mesh=mesh,
            evaluate=training.evaluator(run, data.parts["validation"]), eval_every=values.eval_every,
            save_every=values.save_every, label="reward", curve=CURVE,
        )  # fmt: skip
        test = data.parts["test"]
        found = {"test": training.evaluator(run, test)(result.state), "seconds": result.seconds}
        clear = np.abs(2 * test["target"] - 1) >= CLEAR
        if rated and clear.any():
            of = training.evaluator(run, {name: leaf[clear] for name, leaf in test.items()})(result.state)
            found |= {"clear": of["rewards/accuracies"], "clear_share": float(clear.mean())}
            found["people"] = agreement(values.data, soft_pairs(values.data, values.held_out, values.seed, "test"))
        trainable, total = training.counts(run)
        variables, spread = normalised(base, run, result.state.variables(run.frozen), train)
        origin = {"name": base.name, "fingerprint": base.fingerprint}
        meta = {"max_length": values.max_length, "template": encoder.template, "data": values.data, "rated": rated}
        where = workdir / "adapter"
        size = adapters.save(where, values.peft, variables, run.sites, origin, task="reward", seed=values.seed, **meta)
        common.write_json(workdir / "result.json", found | {"trainable": trainable, "total": total, "scores": spread})
    print(summary(found))
    print(f"scores of training texts were {spread['mean']:.3f} ± {spread['std']:.3f}; the adapter's are 0 ± 1")
    print(f"adapter: {where} ({size:,} bytes)")


def normalised(base: Pretrained, run: training.Run, variables: dict, train: Leaves, most: int = 512) -> tuple:
    """The variables with a head whose scores of training texts have mean 0 and std 1; what they were."""
    each = jax.jit(lambda v, b: reward.scores(base.model, peft.realised(run.method, v, run.sites), b))
    sides = {
        k: np.concatenate([train[f"{s}_{k}"][: most // 2] for s in ("chosen", "rejected")]) for k in ("tokens", "mask")
    }
    batches = list(eval_batches(sides, 64))
    found = np.concatenate([tree.whole(each(variables, b)) for b in batches])[: len(sides["tokens"])]
    head = reward.normalise(jax.tree.map(tree.whole, variables["head"]), found)
    return variables | {"head": head}, {"mean": float(found.mean()), "std": float(found.std())}


def summary(found: dict) -> str:
    """One line: accuracy on held-out pairs, beside people's."""
    test = found["test"]
    line = f"test: pairwise accuracy {test['rewards/accuracies']:.4f}, loss {test['loss']:.4f}"
    line += f" over {int(test['weight'])} pairs"
    if "people" not in found:
        return line
    people = found["people"]
    line += (
        f"; {found['clear']:.4f} of the {100 * found['clear_share']:.0f} % clear ones. One rater of each text agrees "
    )
    line += f"with the majority on {people['rater']:.4f}"
    return line + (f", one half of the raters with the other on {people['halves']:.4f}" if "halves" in people else "")


# ------------------------------------------------------------------------------------------------- use


def load_reward(directory: str, model: str | None = None, force: bool = False, rows: int = 32) -> RewardFn:
    """The reward function (prompts, completions) -> scores of an adapter made here, on its own base and tokenizer.

    A model of rated texts scores prompt and completion as one text, another as question and answer. None for a
    completion without words, or whose prompt leaves no room.

    Raises ModelError: no reward adapter, or one of another base (unless `force`).
    """
    loaded = adapters.load(directory)
    if loaded.meta.get("task") != "reward":
        raise ModelError(f"adapter {directory} is for task {loaded.meta.get('task')!r}, not 'reward'.")
    base = training.load_base(model or loaded.meta["base"]["name"])
    sites, width = peft.sites(base.model), loaded.meta["max_length"]
    shapes = jax.eval_shape(lambda: reward.init_head(jax.random.key(0), base.config.hidden_size))
    attached = adapters.attach(loaded, base.params, sites, base.fingerprint, force, shapes)
    variables, encoder = peft.realised(loaded.method, attached, sites), Encoder(base.tokenizer, loaded.meta["template"])
    each = jax.jit(lambda v, b: reward.scores(base.model, v, {k: b[k] for k in ("tokens", "mask")}))

    def encoded(prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray] | None:
        if not completion.strip():
            return None
        if loaded.meta["rated"]:
            return ended(encoder, prompt + completion, width)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        try:
            return preferences.cut(encoder.answered(turns), width)
        except Dropped:
            return None

    def scored(prompts: list[str], completions: list[str]) -> Sequence[float | None]:
        sides = [encoded(p, c) for p, c in zip(prompts, completions, strict=True)]
        there = [side for side in sides if side is not None]
        if not there:
            return [None] * len(sides)
        found = [np.asarray(each(variables, b)) for b in eval_batches(preferences.fill(there, width), rows, 16)]
        numbers = iter(np.concatenate(found).tolist())
        return [None if side is None else next(numbers) for side in sides]

    return scored


if __name__ == "__main__":
    define_flags()
    common.run(main)
