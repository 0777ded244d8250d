"""The same sentences, split, steps and batches with Hugging Face PEFT and torch, in an environment of its own.

torch is no dependency of the project. In a fresh environment, then from the root of this repository:

    pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0 absl-py numpy tqdm filelock safetensors
    python -m experiments.hf_reference --workdir=hf_reference   # 12 runs of 300 steps: about 45 minutes on 2 cores
    python -m experiments.hf_reference --time_only              # seconds of a LoRA step

Rows come from `research.data`, so token numbers and the order of batches are those of our own runs with the same seed;
the initial head and the dropout masks are torch's. Where a method has several learning rates, the first seed tries
each, the one with the best validation accuracy stays, and the other seeds run with it. The test part chooses nothing.

`--workdir` gets results.json (every run, with its predictions, for paired tests) and results.csv (a row a method),
written after each run; a second call goes on with the runs that are missing.
"""

import csv
import importlib.metadata
import io
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import common
from research.data import assets, text, tokenize
from research.data.batches import Batches, eval_batches
from research.errors import DataError, FlagError, did_you_mean
from research.files import write_text

MODEL, DATA = "minilm-l6", "vader/movie"
INSTALL = next(line.strip() for line in __doc__.splitlines() if "pip install" in line)
RATES = {  # tried when --learning_rates is empty
    "full": (1e-4,),
    "lora": (5e-4, 1e-3, 2e-3),
    "houlsby": (5e-4, 1e-3),
    "ia3": (5e-3, 1e-2),
    "bitfit": (1e-3, 2e-3),
}
WARMUP, WEIGHT_DECAY, CLIP = 0.06, 0.01, 1.0
EVAL_ROWS = 128  # a forward pass at evaluation
COLUMNS = ("method", "learning_rate", "tried", "seeds", "accuracies", "mean", "std", "validation", "trainable", "head")
COLUMNS += (
    "seconds_per_step",
    "steps",
    "batch_size",
    "max_length",
    "threads",
    "python",
    "torch",
    "peft",
    "transformers",
)


def build(method: str, seed: int):
    """Returns the BertForSequenceClassification of two classes with `method`'s parts trainable, all else frozen.

    MiniLM's pooler is kept; the classifier starts at N(0, 0.02) and zeros. Dropout 0.1 as in the model's config.
    """
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(assets.fetch(MODEL), num_labels=2)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    if method == "full":
        return model
    if method == "lora":
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
        return peft.get_peft_model(model, config)
    if method == "ia3":
        feed_forward = r".*layer\.\d+\.output\.dense"
        targets = rf".*\.(key|value)|{feed_forward}"
        config = peft.IA3Config(
            target_modules=targets, feedforward_modules=feed_forward, modules_to_save=["classifier"]
        )
        return peft.get_peft_model(model, config)
    if method == "houlsby":
        insert_adapters(model, width=64)
    trained = {"houlsby": (".adapter.", "LayerNorm"), "bitfit": ("bias",)}[method]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("classifier") or any(part in name for part in trained)
    return model


def insert_adapters(model, width: int) -> None:
    """Puts Houlsby's adapters (arXiv 1902.00751) behind dense and dropout of both sublayers, before the residual sum.

    PEFT has no bottleneck adapters. Initial weights as in the paper's code: normal of std 1e-3 cut at two of it.
    """
    import torch

    class Adapter(torch.nn.Module):
        def __init__(self, features: int):
            super().__init__()
            self.down, self.up = torch.nn.Linear(features, width), torch.nn.Linear(width, features)
            for layer in (self.down, self.up):
                torch.nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
                torch.nn.init.zeros_(layer.bias)

        def forward(self, x):
            return x + self.up(torch.nn.functional.gelu(self.down(x)))

    for layer in model.bert.encoder.layer:
        for output in (layer.attention.output, layer.output):
            chain = torch.nn.Sequential()
            chain.add_module("dropout", output.dropout)
            chain.add_module("adapter", Adapter(output.dense.out_features))
            output.dropout = chain


def optimizer(model, learning_rate: float, steps: int):
    """Returns (AdamW, scheduler): warm-up over 6 % of the steps, then down to 0; decay on matrices alone.

    (IA)3's vectors have two dimensions in PEFT, one of them of size 1: not matrices.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrix = [min(parameter.shape) > 1 and parameter.ndim > 1 for parameter in trained]
    groups = [
        {"params": [p for p, m in zip(trained, matrix, strict=True) if m == wanted], "weight_decay": decay}
        for wanted, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate)
    return adamw, get_linear_schedule_with_warmup(adamw, round(WARMUP * steps), steps)


def train(model, batches: Iterator[Mapping[str, np.ndarray]], learning_rate: float, steps: int) -> list[float]:
    """Trains in place on batches of tokens, mask [B, T] and labels [B]; returns the seconds of each step.

    Raises DataError when the loss is no longer finite.
    """
    import torch
    from tqdm import tqdm

    adamw, scheduler = optimizer(model, learning_rate, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    seconds = []
    with tqdm(total=steps, unit="step", disable=None, leave=False) as bar:
        for batch in batches:
            start = time.perf_counter()
            labels = torch.from_numpy(batch["labels"]).long()
            loss = model(**inputs(batch), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            adamw.step()
            scheduler.step()
            adamw.zero_grad()
            value = loss.item()
            seconds.append(time.perf_counter() - start)
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at step {len(seconds)}: lower learning_rate={learning_rate:g}")
            bar.set_postfix(loss=f"{value:.3f}")
            bar.update()
    return seconds


def predict(model, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the predicted class of every row, [N], without dropout."""
    import torch

    model.eval()
    found = []
    with torch.inference_mode():
        for batch in eval_batches(arrays, EVAL_ROWS):
            logits = model(**inputs(batch)).logits.numpy()
            found.append(logits.argmax(axis=-1)[batch["weight"] > 0])
    return np.concatenate(found)


def inputs(batch: Mapping[str, np.ndarray]) -> dict:
    """The model's arguments for a batch."""
    import torch

    return {
        name: torch.from_numpy(batch[leaf]).long()
        for name, leaf in (("input_ids", "tokens"), ("attention_mask", "mask"))
    }


def run(
    method: str, learning_rate: float, seed: int, parts: Mapping[str, Mapping[str, np.ndarray]], settings: Mapping
) -> dict:
    """Trains once and evaluates at the end; returns the run's record for results.json."""
    model = build(method, seed)
    batches = Batches(parts["train"], settings["batch_size"], seed)
    stream = ({name: leaf[0] for name, leaf in batch.items()} for batch in batches.stream(0, settings["steps"]))
    seconds = train(model, stream, learning_rate, settings["steps"])
    predictions = {part: predict(model, parts[part]) for part in ("validation", "test")}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = sum(size for name, size in sizes.items() if "classifier" in name)
    return {
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        **{part: float(np.mean(found == parts[part]["labels"])) for part, found in predictions.items()},
        "trainable": sum(sizes.values()) - head,
        "head": head,
        "seconds_per_step": statistics.median(seconds),
        "seconds": sum(seconds),
        "test_predictions": "".join(map(str, predictions["test"])),
    }


def load_parts(max_length: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Returns {part: {"tokens", "mask" [N, max_length], "labels" [N]}} and each part's fingerprint."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.fetch(MODEL))
    splits = text.load(DATA)
    found = {part: getattr(splits, part) for part in ("train", "validation", "test")}
    arrays = {
        part: tokenize.encode(tokenizer, ex.texts, max_length) | {"labels": ex.labels} for part, ex in found.items()
    }
    return arrays, {part: examples.fingerprint for part, examples in found.items()}


def best_rate(runs: Sequence[Mapping], method: str, rates: Sequence[float], seed: int) -> float | None:
    """Returns the rate of `seed`'s run with the best validation accuracy (the lower rate of equals).

    None while a rate has not been tried. A single rate needs no trial.
    """
    if len(rates) == 1:
        return rates[0]
    tried = {r["learning_rate"]: r["validation"] for r in runs if r["method"] == method and r["seed"] == seed}
    if any(rate not in tried for rate in rates):
        return None
    return max(sorted(rates), key=lambda rate: tried[rate])


def missing(
    runs: Sequence[Mapping], method: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, int] | None:
    """Returns the next (rate, seed) to run for a method, or None when it is complete."""
    done = {(r["learning_rate"], r["seed"]) for r in runs if r["method"] == method}
    rate = best_rate(runs, method, rates, seeds[0])
    wanted = [(each, seeds[0]) for each in rates] if rate is None else [(rate, seed) for seed in seeds]
    return next((pair for pair in wanted if pair not in done), None)


def summary(
    runs: Sequence[Mapping], methods: Sequence[str], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> list[dict]:
    """Returns a row for every method that has test accuracies at its chosen rate. std is the sample's (n - 1)."""
    rows = []
    for method in methods:
        rate = best_rate(runs, method, rates[method], seeds[0])
        chosen = [r for r in runs if r["method"] == method and r["learning_rate"] == rate and r["seed"] in seeds]
        if not chosen:
            continue
        accuracies = [r["test"] for r in chosen]
        rows.append(
            {
                "method": method,
                "learning_rate": rate,
                "tried": " ".join(f"{each:g}" for each in rates[method]),
                "seeds": " ".join(str(r["seed"]) for r in chosen),
                "accuracies": " ".join(f"{each:.4f}" for each in accuracies),
                "mean": round(statistics.mean(accuracies), 4),
                "std": round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else "",
                "validation": round(statistics.mean(r["validation"] for r in chosen), 4),
                "trainable": chosen[0]["trainable"],
                "head": chosen[0]["head"],
                "seconds_per_step": round(statistics.median(r["seconds_per_step"] for r in chosen), 3),
            }
        )
    return rows


def save(workdir: Path, settings: Mapping, runs: Sequence[Mapping], rows: Sequence[Mapping]) -> None:
    """Writes results.json and results.csv, each atomically."""
    common.write_json(workdir / "results.json", {"settings": settings, "summary": rows, "runs": runs})
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**settings, **settings["versions"], **row} for row in rows)
    write_text(workdir / "results.csv", table.getvalue())


def resume(workdir: Path, settings: Mapping) -> list[dict]:
    """Returns the runs of an earlier call, if any. Raises FlagError when they were made with other settings."""
    path = workdir / "results.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        earlier, runs = found["settings"], found["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a results file of this script: {error}") from error
    changed = [name for name in settings if earlier.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise FlagError(f"{path} has {name}={earlier.get(name)}, not {settings[name]}: give another --workdir")
    return runs


def versions() -> dict[str, str]:
    """Versions of what the figures depend on. Raises FlagError when a package is absent."""
    try:
        found = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    except importlib.metadata.PackageNotFoundError as error:
        raise FlagError(f"{error.name} is not installed here: {INSTALL}") from error
    return {"python": platform.python_version(), **found}


def time_step(steps: int = 20, warmup: int = 3) -> float:
    """Returns the median seconds of a LoRA step on 32 rows of exactly 48 tokens, dropout on."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(1000, 30000, (32, 48)),
        "mask": np.ones((32, 48), np.int64),
        "labels": rng.integers(0, 2, 32),
    }
    total = steps + warmup
    return statistics.median(train(build("lora", 0), (batch for _ in range(total)), 1e-3, total)[warmup:])


def define_flags() -> None:
    """Here rather than at import, so that tests can import several scripts whose flags share names."""
    flags.DEFINE_list("methods", ["full", "lora", "houlsby"], f"Methods, in order: {', '.join(RATES)}.")
    flags.DEFINE_list(
        "learning_rates", [], "Rates to try with the first seed, for every method. Default: each method's own."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds: of the batches' order, the head, the added parts and dropout.")
    flags.DEFINE_integer("steps", 300, "Training steps of a run.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Rows a step.", lower_bound=1)
    flags.DEFINE_integer("max_length", 48, "Tokens a row.", lower_bound=3, upper_bound=512)
    flags.DEFINE_integer("threads", 2, "Torch's threads.", lower_bound=1)
    flags.DEFINE_string("workdir", "hf_reference", "Folder of results.json and results.csv.")
    flags.DEFINE_bool("time_only", False, "Print the median seconds of a LoRA step (32 rows of 48 tokens) and stop.")


def numbers(name: str, values: Sequence[str], kind: type) -> list:
    """Parses a flag's list. Raises FlagError for what is no finite number of `kind`, 0 or more, or occurs twice."""
    try:
        found = [kind(value) for value in values]
    except ValueError as error:
        raise FlagError(f"--{name}: {error}") from error
    if any(not 0 <= value < math.inf for value in found) or len(set(found)) < len(found):
        raise FlagError(f"--{name}={','.join(values)}: expected distinct finite numbers, 0 or more")
    return found


def execute(args) -> None:
    """Runs what is missing and prints a line a run and a method. `args` has the flags' values."""
    for method in args.methods:
        if method not in RATES:
            raise FlagError(f"unknown method {method!r}.{did_you_mean(method, RATES)}")
    rates, seeds = numbers("learning_rates", args.learning_rates, float), numbers("seeds", args.seeds, int)
    if not seeds or not args.methods:
        raise FlagError("--seeds and --methods need at least one entry")
    rates = {method: rates or list(RATES[method]) for method in args.methods}
    found = versions()
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.time_only:
        seconds = time_step()
        print(
            f"LoRA r=8 q,v, 32 rows of 48 tokens, {args.threads} threads, torch {found['torch']}, peft {found['peft']}"
        )
        print(f"seconds_per_step={seconds:.4f}")
        return
    parts, fingerprints = load_parts(args.max_length)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "max_length", "threads")}
    settings |= {"model": MODEL, "data": DATA, "rows": {part: len(leaf["labels"]) for part, leaf in parts.items()}}
    settings |= {"fingerprints": fingerprints, "versions": found}
    workdir = Path(args.workdir).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    runs = resume(workdir, settings)
    for method in args.methods:
        while pair := missing(runs, method, rates[method], seeds):
            record = run(method, *pair, parts, settings)
            runs.append(record)
            save(workdir, settings, runs, summary(runs, args.methods, rates, seeds))
            print(
                f"{method} rate {pair[0]:g} seed {pair[1]}: validation {record['validation']:.4f}, "
                f"test {record['test']:.4f}, {record['seconds_per_step']:.3f} s/step, {record['seconds']:.0f} s",
                flush=True,
            )
    rows = summary(runs, args.methods, rates, seeds)
    save(workdir, settings, runs, rows)
    for row in rows:
        accuracy = f"{row['mean']} ± {row['std'] or '-'} ({row['accuracies']})"
        print(f"{row['method']}: test {accuracy} at rate {row['learning_rate']:g}")


if __name__ == "__main__":
    define_flags()
    common.run(lambda: execute(flags.FLAGS))
