"""The time of a training step on random tokens, alone or beside Hugging Face PEFT's.

    python -m experiments.time_step                                            # LoRA on MiniLM, 32 rows of 48 tokens
    python -m experiments.time_step --peft=houlsby --seeds=3                   # three seeds in one program
    python -m experiments.time_step --reference_python=/path/to/venv/bin/python  # alternates with `hf_reference`

A step is what trains in `peft_table`: dropout, clipping, AdamW; every column is a real token. Compilation and the first
steps do not count. The last line is `seconds_per_step=<float>`, the median, of all seeds together. With several seeds
the line before gives the ratio to as many runs of one seed; with --reference_python (see `hf_reference` for what must
be installed there) the ratio to the same step with torch, in three rounds by turns.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from experiments.shared import beside, common
from experiments.shared.classification import Recipe, batches, check, check_length, start
from research.convert.load import Pretrained, load
from research.errors import FlagError
from research.train import step

WARMUP, ROUNDS = 3, 3
REFERENCE = ("model", "dtype", "remat", "peft", "seeds", "batch_size", "max_length")  # what hf_reference fixes


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("minilm-l6")
    flags.DEFINE_string("peft", "lora", "Method specification, such as lora:rank=8 or lora+bitfit.")
    flags.DEFINE_integer("seeds", 1, "Runs in one program.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Rows a step and seed.", lower_bound=1)
    flags.DEFINE_integer("max_length", 48, "Tokens a row, all of them real.", lower_bound=3)
    flags.DEFINE_integer("steps", 20, "Timed steps (of each round).", lower_bound=1)
    flags.DEFINE_string("reference_python", None, "Python of an environment with torch and peft, to alternate with.")


def main() -> None:
    values = flags.FLAGS
    changed = [name for name in REFERENCE if not values[name].using_default_value]
    if values.reference_python is not None and changed:
        raise FlagError(f"--reference_python times LoRA on 32 rows of 48 tokens only: leave out --{changed[0]}.")
    base = load(values.model, **common.model_options())
    check_length(base, check(base, values.peft), values.max_length)
    recipe = Recipe(1e-3, steps=values.steps, batch_size=values.batch_size, max_length=values.max_length)
    timed = timer(base, values.peft, recipe, range(values.seeds) if values.seeds > 1 else 0)
    print(
        f"{base.name}, {values.peft}, {values.seeds} seed(s), {recipe.batch_size} rows of {recipe.max_length} tokens, "
        f"{jax.default_backend()}, {os.cpu_count()} cores",
        flush=True,
    )
    if values.reference_python is not None:
        pairs = [(timed(), reference(values.reference_python)) for _ in range(ROUNDS)]
        for ours, theirs in pairs:
            print(f"ours {ours:.4f} s, the reference {theirs:.4f} s")
        seconds, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"ratio to the reference {seconds / theirs:.3f}")
    elif values.seeds > 1:
        alone = timer(base, values.peft, recipe, 0)
        pairs = [(timed(), alone()) for _ in range(ROUNDS)]
        seconds, single = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = seconds / (values.seeds * single)
        print(f"one seed alone {single:.4f} s; ratio of the program to {values.seeds} x one {ratio:.3f}")
    else:
        seconds = timed()
    print(f"seconds_per_step={seconds:.4f}")


def timer(base: Pretrained, spec: str, recipe: Recipe, seeds: int | Sequence[int]) -> Callable[[], float]:
    """Compiles the step; each call of what is returned runs `recipe.steps` of them and gives the median seconds."""
    rng, shape = np.random.default_rng(0), (recipe.batch_size, recipe.max_length)
    data = {
        "tokens": rng.integers(1, base.config.vocab_size, shape, np.int32),
        "mask": np.ones(shape, np.int32),
        "labels": rng.integers(0, 2, shape[0], np.int32),
    }
    seeds = seeds if isinstance(seeds, int) else list(seeds)
    run, feed = start(base, spec, 2, data, recipe, seeds), batches(data, recipe, seeds)(0)
    compiled, state = step.compile(run.step, run.state, run.frozen, feed), run.state

    def seconds() -> float:
        nonlocal state
        times = []
        for _ in range(WARMUP + recipe.steps):
            began = time.perf_counter()
            state, metrics = compiled(state, run.frozen, feed)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
        return statistics.median(times[WARMUP:])

    return seconds


def reference(python: str) -> float:
    """Seconds of a step with Hugging Face PEFT and torch, by `hf_reference` under another Python."""
    name, _, value = beside.lines(python, "hf_reference", "--time_only")[-1].partition("=")
    if name != "seconds_per_step":
        raise FlagError(f"--reference_python={python} did not run hf_reference: its last line is no time.")
    return float(value)


if __name__ == "__main__":
    define_flags()
    common.run(main)
