"""Fine-tunes one PEFT method on labelled sentences, evaluates it and saves its adapter; or evaluates and uses an
adapter.

    python -m experiments.classify --peft=lora:rank=8 --learning_rate=2e-3       # trains, saves WORKDIR/adapter
    python -m experiments.classify --adapter=runs/classify/adapter               # evaluates it on the test part
    echo "A quiet triumph." | python -m experiments.classify --adapter=runs/classify/adapter --mode=predict

Differs from `peft_table`, which compares many methods over several seeds in one program: here is one run, evaluated
while it trains, whose adapter is for use. The same command goes on where an interrupted run was. Writes config.json,
metrics.jsonl, curve.png, checkpoints, adapter and result.json under --workdir.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.shared import common, training
from experiments.shared.classification import (
    Recipe,
    batches,
    check,
    check_length,
    classifier,
    load_data,
    save_adapter,
    start,
)
from experiments.shared.dry_run import dry_run
from research.convert.load import Pretrained
from research.data import tokenize
from research.data.batches import eval_batches
from research.errors import DataError, FlagError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.tasks import classify
from research.train import state as states
from research.train import step
from research.train.lock import lock

DEFAULT_MODEL = "minilm-l6"


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(None)
    flags.DEFINE_string("data", "vader/movie", "Packaged set, file with text and label columns, or hub id.")
    flags.DEFINE_string("peft", "lora", "Method specification, such as lora:rank=8,targets=attn/(q|v) or lora+bitfit.")
    training.recipe_flags(learning_rate=1e-3, steps=300, batch_size=32)
    flags.DEFINE_integer("max_length", 48, "Tokens a row is cut to.", lower_bound=3)
    training.run_flags("runs/classify")
    flags.DEFINE_string("adapter", None, "An adapter directory to evaluate or to predict with, instead of training.")
    flags.DEFINE_enum(
        "mode", None, ["train", "evaluate", "predict"], "What to do. Default: evaluate with --adapter, else train."
    )
    flags.DEFINE_bool("force", False, "Load an adapter although it was trained on another base.")


def main() -> None:
    values = flags.FLAGS
    given = values.adapter is not None
    mode = values.mode or ("evaluate" if given else "train")
    if given and not values.adapter.strip():
        raise FlagError("--adapter is empty: it takes an adapter directory.")
    if mode == "train":
        if given:
            raise FlagError("--adapter is for --mode=evaluate or --mode=predict; training starts from --peft.")
        return train(values)
    if not given:
        raise FlagError(f"--mode={mode} needs --adapter=DIRECTORY, such as {values.workdir}/adapter.")
    base, variables, loaded = restore(values)
    return predict(base, variables, loaded) if mode == "predict" else evaluate(base, variables, loaded, values.data)


def train(values: Any) -> None:
    """Trains, evaluates, saves the adapter."""
    recipe = Recipe(**common.flag_values(*Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        options = common.model_options()
        base = training.load_base(values.model or DEFAULT_MODEL, values.quantise, mesh, **options)
        check_length(base, check(base, values.peft), recipe.max_length)
        data = load_data(values.data, base.tokenizer, recipe.max_length)
        run = start(base, values.peft, len(data.class_names), data.train, recipe, values.seed, mesh)
        print(f"{training.summary(base, values.peft, run)}, and a head")
        batch = batches(data.train, recipe, values.seed)
        if values.dry_run:
            first = base.tokenizer.decode(data.train["tokens"][0], skip_special_tokens=True)
            shown = f"label {data.class_names[data.train['labels'][0]]!r}: {first}"
            return print(dry_run(run, batch, recipe, mesh, shown))
        identity = {
            "base": base.fingerprint, "data": data.fingerprint, "peft": values.peft, "seed": values.seed,
            "recipe": common.jsonable(recipe), "dtype": values.dtype,
        }  # fmt: skip
        identity |= {} if values.quantise is None else {"quantise": values.quantise}
        trainable, total = training.counts(run)
        result = training.train(
            run, batch, recipe, workdir, identity, mesh=mesh, evaluate=training.evaluator(run, data.validation),
            eval_every=values.eval_every, save_every=values.save_every, label="classify",
            curve=("loss", "eval/loss", "eval/accuracy"),
        )  # fmt: skip
        scores = training.evaluator(run, data.test)(result.state)
        where, found = workdir / "adapter", {"seed": values.seed, "accuracy": scores["accuracy"]}
        size = save_adapter(where, base, values.peft, run, result.state, data, recipe, **found)
        found = {"test": scores, "trainable": trainable, "total": total, "seconds": result.seconds}
        common.write_json(workdir / "result.json", found)
    print(f"test accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.4f} over {int(scores['weight'])} sentences")
    print(f"adapter: {where} ({size:,} bytes)")


def restore(values: Any) -> tuple[Pretrained, dict, adapters.Adapter]:
    """The base that an adapter names (or --model), and the variables of both."""
    options = common.model_options()
    base, variables, loaded = classifier(values.adapter, values.model, values.quantise, values.force, **options)
    check_length(base, variables["peft"], loaded.meta["max_length"])
    return base, variables, loaded


def evaluate(base: Pretrained, variables: dict, loaded: adapters.Adapter, source: str) -> None:
    """Prints the test accuracy of an adapter."""
    data = load_data(source, base.tokenizer, loaded.meta["max_length"])
    if list(data.class_names) != loaded.meta["classes"]:
        raise DataError(
            f"{source} has classes {', '.join(data.class_names)}; "
            f"the adapter knows {', '.join(loaded.meta['classes'])}."
        )
    trainable, extra, frozen = states.split(variables, peft.mask(loaded.method, variables))
    state = states.TrainState(jnp.zeros((), jnp.int32), trainable, extra, (), jax.random.key(0))
    scores = step.make_eval(classify.loss(base.model))(state, frozen, eval_batches(data.test, 64))
    print(f"test accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.4f} over {int(scores['weight'])} sentences")


def predict(base: Pretrained, variables: dict, loaded: adapters.Adapter, rows: int = 32) -> None:
    """Reads lines from stdin and prints one JSON object a line: label, probability, text."""
    length, classes = loaded.meta["max_length"], loaded.meta["classes"]
    probabilities = jax.jit(lambda v, b: jax.nn.softmax(classify.logits(base.model, v, b)))
    if sys.stdin.isatty():
        print("one sentence a line, Ctrl-D to end", file=sys.stderr)
        rows = 1

    def flush(texts: list[str]) -> None:
        full = texts + [texts[-1]] * (rows - len(texts))  # one shape, one compilation
        found = jax.device_get(
            probabilities(variables, jax.tree.map(jnp.asarray, tokenize.encode(base.tokenizer, full, length)))
        )
        for text, p in zip(texts, found, strict=False):
            best = int(p.argmax())
            print(
                json.dumps(
                    {"label": classes[best], "probability": round(float(p[best]), 4), "text": text}, ensure_ascii=False
                ),
                flush=True,
            )

    waiting: list[str] = []
    number = 0
    for number, line in enumerate(sys.stdin.buffer, 1):  # bytes: an error is of this line, and of no block around it
        try:
            text, fault = line.decode().strip(), "an empty line has no label"
        except UnicodeDecodeError:
            text, fault = "", "the line is not UTF-8"
        if text:
            waiting.append(text)
        if waiting and (not text or len(waiting) == rows):
            flush(waiting)
            waiting = []
        if not text:
            raise DataError(f"stdin:{number}: {fault}.")
    if waiting:
        flush(waiting)
    if not number:
        raise DataError("no line on stdin: it takes one sentence a line.")


if __name__ == "__main__":
    define_flags()
    common.run(main)
