"""How fast a model decodes greedily, alone or beside `transformers` and torch on the same weights.

    python -m experiments.decode_speed                                               # SmolLM2, batches of 1, 8 and 32
    python -m experiments.decode_speed --adapter=runs/sft/adapter --prompt=512
    python -m experiments.decode_speed --reference_python=/path/to/venv/bin/python   # by turns with `hf_decode`

Tokens a second of all rows together after the first; the time to the first token, prompt included; the time to compile,
which the persistent cache saves the next time. Prompts are random tokens and nothing stops before --tokens. Differs
from `time_step`, which times training. Writes table.md and result.json under --workdir.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tabulate import tabulate

from experiments.generate import DEFAULT_MODEL, adapted
from experiments.shared import beside, common
from experiments.shared.classification import check_length
from experiments.shared.replies import load_model
from research.convert.export import export_hf
from research.convert.load import Pretrained
from research.errors import FlagError
from research.files import write_text
from research.generate.decode import generate
from research.peft import adapter as adapters

HEADINGS = ("rows", "tokens/s", "first token ms", "compile s")
BESIDE = ("torch tokens/s", "torch first token ms", "ratio")


class Speed(NamedTuple):
    """tokens a second of all rows after the first token; milliseconds to that one; seconds of compiling."""

    tokens: float
    first: float
    compiling: float | None = None


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(DEFAULT_MODEL)
    flags.DEFINE_string("adapter", None, "Adapter directory.")
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Rows that are decoded together.")
    flags.DEFINE_integer("prompt", 16, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("tokens", 64, "Tokens a row gets.", lower_bound=2)
    flags.DEFINE_integer("rounds", 3, "Timed rounds; the median counts.", lower_bound=1)
    flags.DEFINE_string("reference_python", None, "Python of an environment with torch and transformers.")
    flags.DEFINE_string("workdir", "runs/decode_speed", "Where table.md and result.json go.")


def main() -> None:
    values = flags.FLAGS
    sizes = [int(size) for size in values.batch_sizes if size.isdecimal() and int(size) > 0]
    if not sizes or len(sizes) < len(values.batch_sizes):
        raise FlagError(f"--batch_sizes={','.join(values.batch_sizes)}: it takes whole numbers above 0, such as 1,8.")
    if values.reference_python and (values.adapter or values.quantise or values.dtype != "float32"):
        raise FlagError("--reference_python times the base in fp32: leave out --adapter, --quantise and --dtype.")
    base = load_model(values.model, values.quantise, **common.model_options())
    variables = adapted(base, adapters.load(values.adapter) if values.adapter else None, force=False)
    check_length(base, variables.get("peft", {}), values.prompt + values.tokens)
    # A program from the cache would hide what compiling costs.
    jax.config.update("jax_enable_compilation_cache", False)
    times = [timer(base, variables, size, values.prompt, values.tokens) for size in sizes]
    rounds, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        if values.reference_python:
            export_hf(Path(scratch) / "base", base.config, base.params, base.tokenizer)
        for _ in range(values.rounds):
            rounds.append([measure() for measure in times])
            if values.reference_python:
                theirs.append(reference(values.reference_python, Path(scratch) / "base", values))
    ours = [median(column) for column in zip(*rounds, strict=True)]
    rows = [(size, *map(rounded, speed)) for size, speed in zip(sizes, ours, strict=True)]
    if theirs:
        other = [median(column) for column in zip(*theirs, strict=True)]
        each = zip(rows, ours, other, strict=True)
        rows = [(*row, rounded(b.tokens), rounded(b.first), f"{a.tokens / b.tokens:.2f}") for row, a, b in each]
    headings = HEADINGS + (BESIDE if theirs else ())
    where = f"{base.name}, {values.adapter or 'no adapter'}, {values.prompt} + {values.tokens} tokens, {values.dtype}, "
    where += f"{jax.default_backend()}, {beside.threads()} of {os.cpu_count()} cores, median of {values.rounds}"
    table = tabulate(rows, headings, "github", disable_numparse=True)
    workdir = Path(values.workdir).expanduser()
    write_text(workdir / "table.md", f"{where}\n\n{table}\n")
    result = {"measured": where, "rows": [dict(zip(headings, row, strict=True)) for row in rows]}
    common.write_json(workdir / "result.json", result)
    print(f"{where}\n{table}")


def timer(base: Pretrained, variables: dict, rows: int, prompt: int, new: int) -> Any:
    """Compiles decoding; each call of what is returned measures one round of it."""
    drawn = np.random.default_rng(0).integers(3, base.config.vocab_size, (rows, prompt), np.int32)
    given = (variables, jnp.asarray(drawn), jnp.ones((rows, prompt), jnp.int32))

    def program(count: int) -> Any:
        run = lambda v, tokens, mask: generate(base.model, v, tokens, mask, jax.random.key(0), max_new=count)  # noqa: E731
        return jax.jit(run).lower(*given).compile()

    def seconds(compiled: Any) -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        return time.perf_counter() - began

    began = time.perf_counter()
    whole = program(new)
    compiling = time.perf_counter() - began
    short = program(1)

    def measure() -> Speed:
        seconds(short)  # what ran in between has the caches
        first = seconds(short)
        return Speed(rows * (new - 1) / (seconds(whole) - first), 1e3 * first, compiling)

    return measure


def reference(python: str, directory: Path, values: Any) -> list[Speed]:
    """A round of `hf_decode` under another Python, a speed for each batch size."""
    options = {
        "batch_sizes": ",".join(values.batch_sizes),
        "prompt": values.prompt,
        "tokens": values.tokens,
        "rounds": 1,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    found = beside.lines(python, "hf_decode", f"--model={directory}", *given)
    return [Speed(*map(float, line.split()[1:])) for line in found[-len(values.batch_sizes) :]]


def median(speeds: list[Speed]) -> Speed:
    """Of each figure apart."""
    columns = zip(*speeds, strict=True)
    return Speed(*(None if None in column else statistics.median(column) for column in columns))


def rounded(value: float) -> str:
    """Three digits at least."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    define_flags()
    common.run(main)
