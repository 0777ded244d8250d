"""Instruction tuning: a PEFT method on conversations, of which only the answers are learnt.

    python -m experiments.sft                                       # SmolLM2, LoRA on all linears, English and Chinese
    python -m experiments.sft --data=talks.jsonl --template=chatml --peft=dora:targets=all --steps=500
    python -m experiments.sft --dry_run                             # memory, a batch, and what is learnt of it
    python -m experiments.generate --adapter=runs/sft/adapter --interactive      # talk to what was trained

Reads alpaca, messages, ShareGPT and prompt/completion rows, and says which were left out and why. Conversations go
through the chat template, share rows in which each sees itself alone, and are cut as --truncation says. The loss is in
nats a token of the answers, their closing token included. Held-out loss of each language and a few answers are taken
before and after. Differs from `prompt_tuning`, which trains virtual tokens only and compares where they start. The same
command goes on where an interrupted run was. Writes config.json, before.json, metrics.jsonl, curve.png, checkpoints,
adapter and result.json under --workdir.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments.shared import common, language, replies, training
from experiments.shared.dry_run import dry_run
from research.train.lock import lock


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags("smollm2-135m-instruct")
    flags.FLAGS.set_default("remat", "dots")  # 8 x 128 tokens of the default take 1.2 GiB so, 2.7 without
    language.data_flags("alpaca", template=None, max_length=256)
    flags.DEFINE_string("peft", "lora:rank=8,targets=all", "Method specification, such as dora:targets=all or prefix.")
    training.recipe_flags(learning_rate=5e-4, steps=180, batch_size=4)
    flags.DEFINE_integer("samples", 2, "Held-out questions a language to answer before and after.", lower_bound=0)
    flags.DEFINE_integer("max_new", 64, "Most tokens of such an answer.", lower_bound=1)
    training.run_flags("runs/sft", eval_every=90, save_every=30)


def main() -> None:
    values = flags.FLAGS
    recipe = language.Recipe(**common.flag_values(*language.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        options = common.model_options()
        base = replies.load_model(values.model, values.quantise, mesh, **options)
        chat = replies.chat_of(base, values.template)
        data = language.load_data(values.data, chat, recipe, values.eval_rows)
        print("\n".join(data.notes), flush=True)
        run = language.start(base, values.peft, data, recipe, values.seed, mesh)
        print(training.summary(base, values.peft, run), flush=True)
        if values.dry_run:
            batch = language.batches(data, recipe, values.seed)
            return print(dry_run(run, batch, recipe, mesh, language.picture(chat, data)))
        setup = language.Setup(base, chat, data, recipe, mesh)
        questions = language.held_out(data, chat, recipe, values.samples)
        report(language.tune(setup, run, values.peft, workdir, values, questions), workdir)


def report(result: dict[str, Any], workdir: Path) -> None:
    """The samples, and the summary."""
    for sample in result["samples"]:
        print(f"\n[{sample['language']}] {sample['question']}")
        for name in ("before", "after", "reference"):
            print(f"  {name}: {sample[name]}")
    print(f"\nbefore {language.told(result['before'])}")
    print(f"after  {language.told(result['after'])}")
    where = workdir / "adapter"
    print(f"adapter: {where} ({result['adapter_bytes']:,} bytes), trained in {result['seconds']:.0f} s; try it with")
    print(f"  python -m experiments.generate --adapter={where} --interactive")


if __name__ == "__main__":
    define_flags()
    common.run(main)
