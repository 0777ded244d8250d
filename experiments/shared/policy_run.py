"""The flags of `ppo` and `grpo`, and what they train: a task's own small policy, or a language model under rewards."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import reward_model
from experiments.shared import characters, common, replies, training
from experiments.shared.dry_run import dry_run
from experiments.shared.on_policy import Settings, Task, encode, reference, start, train
from experiments.shared.references import live_bases
from research.convert.load import Pretrained
from research.data import text
from research.errors import DataError, FlagError
from research.files import write_text
from research.peft import adapter as adapters
from research.rl.rewards import RewardFn
from research.train.lock import lock

TASK_NAMES = ", ".join(characters.TASKS)


def define_flags(workdir: str, **defaults: Any) -> None:
    """The flags of `ppo` and `grpo`."""
    d = {"group": 8, "epochs": 1, "kl_coef": 0.0} | defaults
    common.model_flags(None)
    flags.DEFINE_string("task", None, f"A task with answers that can be checked, of a policy of its own: {TASK_NAMES}.")
    flags.DEFINE_string("data", "vader/movie", "With --model: a file with a prompt a line, or sentences to continue.")
    flags.DEFINE_integer("prompt_words", 4, "Words of a sentence that are the prompt.", lower_bound=1)
    flags.DEFINE_multi_string(
        "reward", [], "With --model: a reward model's adapter directory or package.module:function, weighted as 0.5*X."
    )
    flags.DEFINE_string("peft", None, "Method specification. Default: full for a task's own policy, lora for a model.")
    # Adam's first steps are signs of one rollout's noise, and a policy is soon lost: hence the warm-up.
    training.recipe_flags(learning_rate=3e-4, steps=d["steps"], batch_size=d["batch_size"], schedule="wsd",
                          warmup=0.03, weight_decay=0.0)  # fmt: skip
    training.run_flags(workdir, eval_every=d.get("eval_every", 50))
    flags.DEFINE_integer("prompts", 32, "Prompts a rollout.", lower_bound=1)
    flags.DEFINE_integer("group", d["group"], "Completions of each prompt.", lower_bound=1)
    flags.DEFINE_integer("epochs", d["epochs"], "How often a rollout is learnt from.", lower_bound=1)
    flags.DEFINE_integer("max_new", 16, "Tokens of a completion with --model.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Of the samples, and of the log-probabilities.", lower_bound=0.01)
    flags.DEFINE_float("kl_coef", d["kl_coef"], "Price of a nat of KL to the reference.", lower_bound=0.0)
    flags.DEFINE_float("entropy_coef", 0.0, "Worth of a nat of entropy.", lower_bound=0.0)
    flags.DEFINE_float("missing_eos", 0.0, "What a completion without end of text loses.", lower_bound=0.0)
    flags.DEFINE_integer(
        "sft_steps", None, "With --task: steps of supervised learning before. Default: the task's own.", lower_bound=0
    )
    flags.DEFINE_integer("eval_prompts", 200, "Held-out prompts of an evaluation.", lower_bound=1)


def main(values: Any, make: Callable[[dict[str, Any]], Settings]) -> None:
    """Trains as the flags say. make: the flags that both scripts have -> settings."""
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    if (values.task is None) == (values.model is None):
        raise FlagError(f"give either --task ({TASK_NAMES}) or --model, such as --model=smollm2-135m-instruct.")
    shared = ("prompts", "group", "epochs", "temperature", "kl_coef", "entropy_coef", "missing_eos")
    settings = make(common.flag_values(*shared, "max_new"))
    with training.use_mesh(values.mesh) as mesh, lock(workdir):
        if values.task:
            known = characters.task(values.task)
            settings = replace(settings, max_new=known.max_new)
            values.sft_steps = known.sft_steps if values.sft_steps is None else values.sft_steps
        settings.every(recipe), recipe.tx()  # refused before anything is trained or loaded
        base, task = (checkable(values, known, settings, workdir, mesh) if values.task else
                      language(values, settings))  # fmt: skip
        spec = values.peft or ("full" if values.task else "lora")
        learner = start(base, spec, task, settings, recipe, values.seed, mesh)
        known, copied = reference(base, learner.run)
        copies = live_bases(learner.run, base, known["params"])
        print(training.summary(base, spec, learner.run))
        print(f"live base buffers: {copies:.4g}; the reference is the base with the adapters off"
              + (f": {copied} of its leaves train and are kept a second time" if copied else ": no copy"))  # fmt: skip
        if values.dry_run:
            shown = f"prompt: {task.train.texts[0]!r}"
            return print(dry_run(learner.run, learner.batch, recipe, mesh, shown))
        identity = {
            "base": base.fingerprint, "task": task.identity, "peft": spec, "seed": values.seed,
            "recipe": common.jsonable(recipe), "settings": common.jsonable(settings), "dtype": values.dtype,
        }  # fmt: skip
        before = learner.evaluate(learner.run.state)
        print(f"before: reward {before['reward']:.4f} on {len(task.held_out.texts)} held-out prompts", flush=True)
        result = train(
            learner, settings, recipe, workdir, identity, mesh=mesh, eval_every=values.eval_every,
            save_every=values.save_every, label=settings.variant,
        )  # fmt: skip
        after, samples = learner.judge(result.state)
        variables = {k: x for k, x in result.state.variables(learner.run.frozen).items() if k != "rollout"}
        named = {"name": base.name, "fingerprint": base.fingerprint}
        found = {"before": before, "after": after, "live_base_buffers": copies, "seconds": result.seconds}
        size = adapters.save(workdir / "adapter", spec, variables, learner.run.sites, named, task="lm", reward=after)
        common.write_json(workdir / "result.json", found)
        lines = (json.dumps(common.finite(row), ensure_ascii=False) + "\n" for row in samples)
        write_text(workdir / "samples.jsonl", "".join(lines))
    for row in samples[:3]:
        print(f"{row['reward']:7.3f}  {row['prompt']!r} {row['completion']!r}")
    print(f"held-out reward {before['reward']:.4f} -> {after['reward']:.4f} at KL {after['kl_sequence']:.2f}, "
          f"{result.seconds:.0f} s; adapter: {workdir / 'adapter'} ({size:,} bytes)")  # fmt: skip


def checkable(
    values: Any, known: characters.Task, settings: Settings, workdir: Path, mesh: jax.sharding.Mesh | None
) -> tuple[Pretrained, Task]:
    """A task's own policy after supervised learning, and the task."""
    learn, held = characters.split(known.prompts)
    length = max(map(len, known.prompts)) + known.max_new
    base = characters.policy(values.task, known.alphabet, length, seed=values.seed)
    if values.sft_steps and not values.dry_run:
        data = characters.rows(base.tokenizer, learn, [known.answer(p) for p in learn])
        recipe = training.Recipe(2e-3, steps=values.sft_steps, batch_size=min(128, len(learn)), schedule="cosine")
        base = characters.supervised(base, data, recipe, workdir / "sft", values.seed, mesh)
    prompts = [encode(base, texts, settings.max_new) for texts in (learn, some(held, values.eval_prompts))]
    identity = {"task": values.task, "sft_steps": values.sft_steps}
    return base, Task(*prompts, {"right": characters.right(known.answer)}, {}, identity)


def some(texts: Sequence[str], count: int) -> Sequence[str]:
    """At most `count` of them, from everywhere in the list."""
    return texts[:: max(1, len(texts) // count)][:count]


def language(values: Any, settings: Settings) -> tuple[Pretrained, Task]:
    """A language model, prompts, and the reward functions that --reward names."""
    if not values.reward:
        raise FlagError("--model needs --reward: a reward model's adapter directory, or package.module:function.")
    functions, weights = {}, {}
    for spec in values.reward:
        weight, star, name = spec.rpartition("*")
        try:
            weights[name] = float(weight) if star else 1.0
        except ValueError:
            raise FlagError(f"--reward={spec}: {weight!r} is no number.") from None
        functions[name] = reward_function(name)
    options = common.model_options()
    base = replies.load_model(values.model, values.quantise, **options)
    learn, held = prompt_texts(values.data, values.prompt_words)
    prompts = [encode(base, texts, settings.max_new) for texts in (learn, some(held, values.eval_prompts))]
    identity = {"data": values.data, "prompt_words": values.prompt_words, "rewards": weights}
    return base, Task(*prompts, functions, weights, identity)


def prompt_texts(source: str, words: int) -> tuple[list[str], list[str]]:
    """(train, held out): the lines of a .txt file, or the opening words of a labelled source's sentences."""
    if not source.endswith(".txt"):
        splits = text.load(source)
        opening = lambda part: list(dict.fromkeys(" ".join(t.split()[:words]) for t in part.texts))  # noqa: E731
        return opening(splits.train), opening(splits.test)
    try:
        lines = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}.") from None
    learn, held = characters.split([line for line in dict.fromkeys(lines) if line.strip()])
    if not learn or not held:
        raise DataError(f"{source} has {len(learn) + len(held)} prompts: too few to hold some out.")
    return learn, held


def reward_function(name: str) -> RewardFn:
    """A reward model's adapter directory, or package.module:function."""
    if ":" not in name or Path(name).exists():
        return reward_model.load_reward(name)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FlagError(f"--reward={name}: {error}.") from None
    if not callable(found):
        raise FlagError(f"--reward={name} is no function.")
    return found
