"""Trains a language model on plain text: a fresh GPT-2 or LLaMA, or any method on a base.

    python -m experiments.pretrain                                     # 10M parameters on Jane Austen, from nothing
    python -m experiments.pretrain --data=poems --vocab_size=2048 --dropout=0.2 --steps=400 --workdir=runs/poems
    python -m experiments.pretrain --init=runs/pretrain/model --data=notes.txt --peft=lora --workdir=runs/notes
    python -m experiments.pretrain --mode=evaluate --init=smollm2-135m-instruct --quantise=nf4     # perplexity
    python -m experiments.generate --model=runs/pretrain/model --prompt="It is a truth" --temperature=0.8

A fresh model gets a BPE tokenizer trained on the training part. Tokens lie memory-mapped under --workdir; a batch is
random windows of them. The step of the best validation loss is kept, and its nats and bits a byte are printed beside
gzip's and a 5-gram byte model's. Differs from `sft`, which learns the answers of conversations: here every token is
learnt. The same command goes on where an interrupted run was. Writes config.json, metrics.jsonl, curve.png,
checkpoints, text, samples.txt, result.json and model, a directory that --model takes (with --peft=full), or adapter
under --workdir.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tabulate import tabulate

from experiments.shared import common, replies, training
from experiments.shared.classification import check, check_length
from experiments.shared.dry_run import dry_run
from experiments.shared.plain_text import ORDER, Text, prepare, summary
from research.convert.export import export_hf
from research.convert.fingerprint import fingerprint
from research.convert.load import Pretrained
from research.data import shards
from research.errors import FlagError, ModelError
from research.files import write_text
from research.generate.decode import generate
from research.generate.sampling import Sampling
from research.models.gpt2 import Gpt2Config
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import tree
from research.tasks import lm
from research.train import distributed
from research.train import state as states
from research.train.lock import lock

PROMPT, SAMPLES = 16, 3  # tokens of the test part that a sample goes on from, and how many
HELD_OUT = ("validation", "test")
FRESH = ("family", "layers", "hidden_size", "heads", "dropout", "vocab_size")  # flags that a base has no use for
GIVEN = ("quantise", "untie")  # and those that a fresh model has none for


@dataclasses.dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to train, and the tokens of a row, of which all but the first are predicted."""

    max_length: int = 256


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(None)
    flags.DEFINE_alias("init", "model")
    flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "Train, or score what --init names as it is.")
    flags.DEFINE_integer("eval_rows", 0, "--mode=evaluate: rows of a part, evenly spread; 0 for all.", lower_bound=0)
    flags.DEFINE_string("data", "austen", "austen, poems, wiki, or a text file; blank lines divide its documents.")
    flags.DEFINE_string("peft", "full", "Method specification; a fresh model trains in full.")
    flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama"], "Of a fresh model.")
    flags.DEFINE_integer("layers", 5, "Of a fresh model.", lower_bound=1)
    flags.DEFINE_integer("hidden_size", 384, "Of a fresh model.", lower_bound=1)
    flags.DEFINE_integer("heads", 6, "Of a fresh model.", lower_bound=1)
    flags.DEFINE_float("dropout", 0.0, "Of a fresh GPT-2.", lower_bound=0.0, upper_bound=0.9)
    flags.DEFINE_integer("vocab_size", 4096, "Most tokens of a fresh tokenizer.", lower_bound=257)
    flags.DEFINE_integer("max_length", 256, "Tokens a row, and a fresh model's positions.", lower_bound=2 * PROMPT)
    training.recipe_flags(
        learning_rate=1e-3, steps=1600, batch_size=4, schedule="cosine", warmup=0.05, weight_decay=0.1
    )
    training.run_flags("runs/pretrain", eval_every=400, save_every=200)


def main() -> None:
    values = flags.FLAGS
    recipe = Recipe(**common.flag_values(*Recipe.__dataclass_fields__))
    check_flags(values)
    workdir = Path(values.workdir).expanduser()
    with (
        training.use_mesh(values.mesh, several=True) as mesh,
        lock(workdir),
        text_folder(workdir, values.dry_run or values.mode == "evaluate") as folder,
    ):
        base = None if values.model is None else given_base(values)
        text = distributed.after_first(lambda: prepare(values.data, folder, values.vocab_size, base))
        base = base or fresh_base(values, text.tokenizer)
        spec = "lora" if values.mode == "evaluate" else values.peft  # a fresh one is the base itself
        check_length(base, check(base, spec), recipe.max_length)
        if values.mode == "evaluate":
            run = start(base, spec, text, recipe, values.seed, mesh)
            scores = {p: evaluator(run, text.parts[p], recipe, values.eval_rows)(run.state) for p in HELD_OUT}
            tokens = ", ".join(f"{int(s['weight']):,} {part}" for part, s in scores.items())
            return print(f"{summary(text)}\nscored tokens: {tokens}\n\n{table(scores, text.baselines)}")
        batch = windows(text, recipe, values.seed)
        run = start(base, values.peft, text, recipe, values.seed, mesh)
        print(training.summary(base, values.peft, run))
        print(f"{summary(text)}; {recipe.steps / batch.steps_per_epoch:.1f} epochs", flush=True)
        if values.dry_run:
            first = base.tokenizer.decode(batch.batch(0)["tokens"][0, 0])
            return print(dry_run(run, batch.batch, recipe, mesh, f"a row: {first!r}"))
        identity = {
            "base": base.fingerprint, "data": text.fingerprint, "peft": values.peft, "seed": values.seed,
            "recipe": common.jsonable(recipe), "dtype": values.dtype,
        }  # fmt: skip
        identity |= {} if values.quantise is None else {"quantise": values.quantise}
        result = training.train(
            run, batch.batch, recipe, workdir, identity, mesh=mesh,
            evaluate=evaluator(run, text.parts["validation"], recipe), eval_every=values.eval_every,
            save_every=values.save_every, label="pretrain", best_metric="loss", best_mode="min",
        )  # fmt: skip
        best = result.state.replace(trainable=result.best["trainable"], extra=result.best["extra"])
        scores = {part: evaluator(run, text.parts[part], recipe)(best) for part in HELD_OUT}
        samples = sample(base, run, best, text, recipe, values.seed)
        write_text(workdir / "samples.txt", "\n\n".join(samples) + "\n")
        where = keep(base, values.peft, run, best, workdir, scores)
        found = {"scores": scores, "baselines": text.baselines, "best_step": int(result.best["step"])}
        found |= {"seconds": result.seconds, "step_ms": result.step_ms}
        common.write_json(workdir / "result.json", found)
    print("\n\n".join(["", *samples, table(scores, text.baselines)]))
    print(f"\nbest validation loss at step {found['best_step']} of {recipe.steps}, {result.step_ms:.0f} ms a step")
    print(f"written: {where}")


def check_flags(values: Any) -> None:
    """FlagError for flags that say nothing here, and for a fresh model that does not exist."""
    fresh = values.model is None
    named = [name for name in (GIVEN if fresh else FRESH) if flags.FLAGS[name].present]
    if named:
        what = "a base: give --init=DIRECTORY" if fresh else "a fresh model: leave it out beside --init"
        raise FlagError(f"--{named[0]} is for {what}.")
    if fresh and values.mode == "evaluate":
        raise FlagError("--mode=evaluate scores a base: give --init=DIRECTORY, such as runs/pretrain/model.")
    if fresh and values.peft.strip() != "full":
        raise FlagError(f"--peft={values.peft} adapts a base: give --init=DIRECTORY, such as runs/pretrain/model.")
    if fresh and values.hidden_size % values.heads:
        peft.divides("heads", values.heads, values.hidden_size)


@contextlib.contextmanager
def text_folder(workdir: Path, temporary: bool) -> Iterator[Path]:
    """Where tokenizer and tokens are kept: a dry run leaves none."""
    if not temporary or jax.process_count() > 1:
        yield workdir / "text"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --------------------------------------------------------------------------------------------------------------- model


def given_base(values: Any) -> Pretrained:
    """The base that --init names. ModelError where it predicts no next token or can't end a document."""
    options = common.model_options()
    base = replies.load_model(values.model, values.quantise, **options)
    if base.tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {values.model} has no end-of-text token, which divides documents.")
    return base


def fresh_base(values: Any, tokenizer: Any) -> Pretrained:
    """A random model: N(0, 0.02^2), what ends a sublayer divided by sqrt(2 L) (Radford et al. 2019, section 2.3)."""
    d, heads = values.hidden_size, values.heads
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": d, "num_layers": values.layers, "num_heads": heads,
        "max_positions": values.max_length, "tie_embeddings": True, "dtype": values.dtype, "remat": values.remat,
        "kernel": values.attention,
    }  # fmt: skip
    if values.family == "gpt2":
        rates = {"dropout": values.dropout, "attention_dropout": values.dropout}
        config = Gpt2Config(intermediate_size=4 * d, **rates, **shared)
    else:
        hidden = -(-8 * d // 192) * 64  # 8/3 d, as three kernels are as many parameters as two of 4 d
        config = LlamaConfig(num_kv_heads=heads, head_dim=d // heads, intermediate_size=hidden, **shared)
    model = build(config)

    @jax.jit
    def new(rng: jax.Array) -> Any:
        params = nn.unbox(model.init(rng, jnp.zeros((1, 2), jnp.int32))["params"])
        last = peft.matcher(r"layers/(attn/o|mlp/down)/kernel")
        return tree.map_with_path(lambda path, x: x * (2 * values.layers) ** -0.5 if last(path) else x, params)

    params = new(jax.random.key(values.seed))
    return Pretrained(f"fresh {values.family}", config, model, params, tokenizer, fingerprint(params, config))


def windows(text: Text, recipe: Recipe, seed: int) -> shards.Windows:
    """The training batches: rows of max_length tokens."""
    rows = recipe.batch_size, seed, recipe.micro_batches
    return shards.Windows(text.parts["train"].tokens, recipe.max_length - 1, *rows)


def start(
    base: Pretrained, spec: str, text: Text, recipe: Recipe, seed: int, mesh: jax.sharding.Mesh | None = None
) -> training.Run:
    """Attaches the method."""

    def feed(seed: int) -> Callable[[int], dict[str, np.ndarray]]:
        whole = windows(text, dataclasses.replace(recipe, micro_batches=1), seed)
        return lambda i: {name: leaf[0] for name, leaf in whole.batch(i).items()}

    return training.start(base, spec, lm.loss(base.model), recipe, seed, feed=feed, mesh=mesh)


# ------------------------------------------------------------------------------------------------------------- results


def evaluator(
    run: training.Run, part: shards.Shard, recipe: Recipe, rows: int = 0
) -> Callable[..., dict[str, float] | None]:
    """(state, stop) -> loss in nats a token, perplexity, nats and bits a byte, of `rows` rows or of the whole part.
    Rows do not overlap, so the first tokens of each have little context.
    """
    leaves = shards.consecutive(part.tokens, recipe.max_length - 1)
    count = len(leaves["tokens"])
    if 0 < rows < count:
        leaves = {name: leaf[np.linspace(0, count - 1, rows, dtype=np.int64)] for name, leaf in leaves.items()}
    evaluate = training.evaluator(run, leaves, recipe.batch_size)

    def score(state: states.TrainState, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        means = evaluate(state, stop)
        if means is None:
            return None
        share = means["weight"] / len(part.tokens) if len(leaves["tokens"]) < count else 1.0
        nats = means["loss"] * means["weight"] / (part.bytes * share)
        return means | {"perplexity": math.exp(means["loss"]), "nats_byte": nats, "bits_byte": nats / math.log(2)}

    return score


def sample(
    base: Pretrained, run: training.Run, state: states.TrainState, text: Text, recipe: Recipe, seed: int
) -> list[str]:
    """What the model writes after a few places of the test part, the given words before `|`."""
    tokens = text.parts["test"].tokens
    places = np.linspace(0, max(0, len(tokens) - PROMPT), SAMPLES + 1, dtype=np.int64)[:SAMPLES]
    given = jnp.asarray(tokens[places[:, None] + np.arange(PROMPT)].astype(np.int32))
    eos, room = base.tokenizer.eos_token_id, min(100, recipe.max_length - PROMPT)

    @jax.jit
    def write(variables: Any, rng: jax.Array) -> Any:
        realised = peft.realised(run.method, variables, run.sites)
        mask, sampling = jnp.ones_like(given), Sampling(temperature=0.8, top_p=0.95)
        return generate(base.model, realised, given, mask, rng, max_new=room, sampling=sampling, stop=(eos,), pad=eos)

    out = jax.tree.map(tree.whole, write(state.variables(run.frozen), jax.random.key(seed)))
    new = [row[: int(mask.sum())] for row, mask in zip(out.tokens, out.mask, strict=True)]
    read = lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return [f"{read(before)}|{read(after)}" for before, after in zip(np.asarray(given), new, strict=True)]


def keep(
    base: Pretrained, spec: str, run: training.Run, state: states.TrainState, workdir: Path, scores: dict[str, Any]
) -> Path:
    """Writes a model directory that `load` reads, or the adapter of a method that leaves the base as it is."""
    variables = state.variables(run.frozen)
    if spec.strip() == "full":
        params = jax.tree.map(tree.whole, variables["params"])
        return export_hf(workdir / "model", base.config, params, base.tokenizer)
    named = {"name": base.name, "fingerprint": base.fingerprint}
    adapters.save(workdir / "adapter", spec, variables, run.sites, named, task="lm", scores=scores)
    return workdir / "adapter"


def table(scores: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]]) -> str:
    """The scores beside what has to be beaten."""
    shown = {"loss": "nats a token", "perplexity": "perplexity", "nats_byte": "nats a byte", "bits_byte": "bits a byte"}
    beaten = {"gzip": "gzip's", "ngram": f"a {ORDER}-gram model's"}
    rows = [[part, *(s[x] for x in shown), *(baselines[part][x] for x in beaten)] for part, s in scores.items()]
    return tabulate(rows, ["part", *shown.values(), *beaten.values()], "github", floatfmt=".3f")


if __name__ == "__main__":
    define_flags()
    common.run(main)
