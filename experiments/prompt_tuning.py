"""Prompt tuning on dialogues: virtual tokens that start from a text, and what the start and their number are worth.

    python -m experiments.prompt_tuning                # trains 20 virtual tokens from 下面是一段人与机器人的对话。
    python -m experiments.generate --adapter=runs/prompt_tuning/adapter --chat --prompt=考试有哪些技巧？ --top_p=0.9
    python -m experiments.prompt_tuning --mode=table   # random, vocabulary, topic words, text; 1, 5, 20, 100 tokens

The base is frozen and nothing is added to it but rows before the sequence, which the second command, a new process,
loads from their adapter directory. Differs from `sft`, which trains any method in every language: here is one method,
and --mode=table compares its starts by held-out loss in nats a token. The same command goes on where an interrupted run
or table was. Writes config.json, before.json, metrics.jsonl, curve.png, checkpoints, adapter and result.json under
--workdir; a table does so for each row under WORKDIR/table, and table.md, table.csv, table.png.
"""

import csv
import io
import shlex
from pathlib import Path
from typing import Any

from absl import flags
from tabulate import tabulate

from experiments.shared import common, language, replies, training
from experiments.shared.dry_run import dry_run
from research.errors import FlagError
from research.files import write_text
from research.generate.sampling import Sampling
from research.peft.prompt import STARTS
from research.train import plot
from research.train.lock import lock

TEXT = "下面是一段人与机器人的对话。"
TOPICS = "学习|健康|科技|历史|写作|生活|工作|文化"
COLUMNS = ("start", "tokens", "trainable", "before", "after", "seconds")
HEADINGS = ("start", "virtual tokens", "trainable", "loss at step 0", "loss at the end", "train s")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("smollm2-135m-instruct")
    flags.FLAGS.set_default("remat", "dots")  # 8 x 128 tokens of the default take 1.2 GiB so, 2.7 without
    flags.DEFINE_enum("mode", "train", ["train", "table"], "Train one prompt, or compare starts and lengths.")
    language.data_flags("alpaca/zh", template="plain/zh", max_length=192)
    flags.DEFINE_enum("start", "text", STARTS, "Where the virtual tokens start.")
    flags.DEFINE_integer("length", 20, "Virtual tokens.", lower_bound=1)
    flags.DEFINE_string("text", TEXT, "The text of --start=text, repeated or cut to --length tokens.")
    flags.DEFINE_string("topics", TOPICS, "Topic words of --start=labels, apart by |.")
    flags.DEFINE_multi_enum("starts", list(STARTS), STARTS, "The table's starts, of --length tokens each.")
    flags.DEFINE_multi_integer(
        "lengths", [1, 5, 20, 100], "The table's numbers of tokens from the text.", lower_bound=1
    )
    training.recipe_flags(learning_rate=1e-2, steps=120, batch_size=4, weight_decay=0.0)
    flags.DEFINE_string("ask", "考试有哪些技巧？", "A question to answer before and after; empty for none.")
    flags.DEFINE_integer("max_new", 64, "Most tokens of the answer.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "Of the answer's sampling; 0 takes the most likely token.")
    flags.DEFINE_float("top_p", 0.9, "Draw from the fewest tokens of that probability together; 1 for all.")
    training.run_flags("runs/prompt_tuning", eval_every=60, save_every=40)


def main() -> None:
    values = flags.FLAGS
    recipe = language.Recipe(**common.flag_values(*language.Recipe.__dataclass_fields__))
    sampling = Sampling(values.temperature, top_p=values.top_p)
    workdir = Path(values.workdir).expanduser() / ("table" if values.mode == "table" else "")
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        options = common.model_options()
        base = replies.load_model(values.model, values.quantise, mesh, **options)
        chat = replies.chat_of(base, values.template)
        data = language.load_data(values.data, chat, recipe, values.eval_rows)
        print("\n".join(data.notes), flush=True)
        setup = language.Setup(base, chat, data, recipe, mesh)
        if values.mode == "table":
            return table(setup, values, workdir)
        one = spec(values, values.start, values.length)
        run = language.start(base, one, data, recipe, values.seed, mesh)
        print(training.summary(base, one, run), flush=True)
        if values.dry_run:
            batch = language.batches(data, recipe, values.seed)
            return print(dry_run(run, batch, recipe, mesh, language.picture(chat, data)))
        asked = language.Question("ask", ({"role": "user", "content": values.ask},), "")
        result = language.tune(setup, run, one, workdir, values, [asked] if values.ask else [], sampling)
    for sample in result["samples"]:
        print(f"\n{sample['question']}\n  before: {sample['before']}\n  after: {sample['after']}")
    print(f"\nbefore {language.told(result['before'])}\nafter  {language.told(result['after'])}")
    where, ask = workdir / "adapter", values.ask or "TEXT"
    given = [f"--adapter={where}", "--chat", f"--prompt={ask}", f"--temperature={values.temperature:g}"]
    command = shlex.join([*given, f"--top_p={values.top_p:g}"])
    print(f"adapter: {where} ({result['adapter_bytes']:,} bytes); ask it in a new process with")
    print(f"  python -m experiments.generate {command}")


def spec(values: Any, start: str, length: int) -> str:
    """The method's specification."""
    more = {"text": f",text={values.text}", "labels": f",labels={values.topics}"}.get(start, "")
    return f"prompt:length={length},start={start}{more}"


def table(setup: language.Setup, values: Any, folder: Path) -> None:
    """Trains each row, or reads it, and writes the table after each."""
    if values.dry_run:
        raise FlagError("--dry_run is for one run: leave out --mode=table.")
    base, _, data, recipe, mesh = setup
    todo = [(start, values.length) for start in values.starts] + [("text", length) for length in values.lengths]
    todo = list(dict.fromkeys(todo))
    runs = {row: spec(values, *row) for row in todo}
    for one in runs.values():  # all are asked before one trains
        language.fits(base, one, recipe)
    common.write_config(folder)
    bare = language.base_losses(base, data, recipe.batch_size)["loss"]
    rows = [{"start": "no prompt", "tokens": 0, "trainable": 0, "before": bare, "after": bare, "seconds": None}]
    print(f"without a prompt: {bare:.4f} nats a held-out token", flush=True)
    heading = (
        f"{base.name} on {values.data}, {recipe.steps} steps of {recipe.batch_size} rows of {recipe.max_length} "
        f"tokens, seed {values.seed}: nats a held-out token of the answers."
    )
    for place, ((start, length), one) in enumerate(runs.items(), 1):
        print(f"[{place}/{len(runs)}] {start}, {length} virtual tokens", flush=True)
        where = folder / f"{start}-{length}"
        run = language.start(base, one, data, recipe, values.seed, mesh)
        found = language.tune(setup, run, one, where, values, [])
        rows.append(
            {
                "start": start, "tokens": length, "trainable": found["trainable"], "before": found["before"]["loss"],
                "after": found["after"]["loss"], "seconds": found["seconds"],
            }
        )  # fmt: skip
        write(rows, folder, heading)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"table.md, table.csv and table.png are in {folder}")


def write(rows: list[dict[str, Any]], folder: Path, heading: str) -> None:
    """Writes table.md, table.csv and table.png atomically."""
    text = io.StringIO()
    out = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    write_text(folder / "table.csv", text.getvalue())
    cells = [[row[name] for name in COLUMNS] for row in rows]
    shown = tabulate(cells, HEADINGS, tablefmt="github", floatfmt=("", "", "", ".4f", ".4f", ".0f"), intfmt=",",
                     missingval="-")  # fmt: skip
    write_text(folder / "table.md", f"{heading}\n\n{shown}\n")
    draw(rows, folder / "table.png")


def draw(rows: list[dict[str, Any]], png: Path) -> None:
    """The loss of each start at the commonest length, and of the text start by length."""
    figure = plot.figure(8.4, 3.4)
    starts, lengths = figure.subplots(1, 2)
    bare, trained = rows[0]["after"], rows[1:]
    same = [row for row in trained if row["tokens"] == trained[0]["tokens"]]
    starts.bar([row["start"] for row in same], [row["after"] for row in same], color="C0")
    starts.set(title=f"{trained[0]['tokens']} virtual tokens", xlabel="start", ylabel="nats a held-out token")
    low = min(row["after"] for row in rows)
    starts.set_ylim(low - 0.3 * max(0.05, bare - low), None)
    texts = sorted((row["tokens"], row["after"]) for row in trained if row["start"] == "text")
    if texts:
        lengths.plot(*zip(*texts, strict=True), marker="o")
    lengths.set(title="start from the text", xlabel="virtual tokens", xscale="log")
    for axes in (starts, lengths):
        axes.axhline(bare, color="grey", linestyle=":", label="no prompt")
        axes.grid(alpha=0.3)
        axes.legend()
    plot.save(figure, png)


if __name__ == "__main__":
    define_flags()
    common.run(main)
