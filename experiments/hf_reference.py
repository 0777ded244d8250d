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

import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import flags

from experiments.shared import common
from experiments.shared.hf_runs import complete, numbers
from research.data import assets, text, tokenize
from research.data.batches import Batches, eval_batches
from research.errors import DataError, FlagError, did_you_mean
from research.train.lock import lock

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
    """Only where this is the script: other scripts' flags have the same names."""
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
    with lock(workdir):
        complete(workdir, settings, rates, seeds, lambda *chosen: run(*chosen, parts, settings))


if __name__ == "__main__":
    define_flags()
    common.run(lambda: execute(flags.FLAGS))
