"""Tunes a language model on preferences, off policy: DPO and its kin, KTO, ORPO, SimPO, with any PEFT method.

    python -m experiments.preference --loss=dpo --peft=lora:rank=8                  # on the packaged English pairs
    python -m experiments.preference --loss=kto --data=kto/en --learning_rate=1e-4
    python -m experiments.preference --loss=ipo --data=pairs.jsonl --adapter=runs/sft/adapter   # goes on with it

The reference is the base itself with the adapters off: the same buffers, which are counted, and no second model. Where
base leaves train (bitfit, layernorm, full) their first values are kept, and it says so; --reference=initial_adapter
keeps the adapter as it starts. Before the first step the loss is held against its closed form (DPO ln 2, IPO
1/(4 beta^2), KTO 0.5). Differs from `reward_model`, which learns a score from such pairs, and from `ppo` and `grpo`,
which need one and sample while they train. The same command goes on where an interrupted run was. Writes config.json,
metrics.jsonl, curve.png, checkpoints, adapter and result.json under --workdir.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.shared import classification, common, preferences, references, training
from experiments.shared.dry_run import dry_run
from experiments.shared.replies import load_model
from research.convert.load import Pretrained
from research.data.batches import Batches
from research.errors import FlagError, ModelError
from research.peft import adapter as adapters
from research.peft import tree
from research.tasks import alignment
from research.tasks.loss import Loss
from research.tasks.preference import LOSSES, REFERENCE_FREE, Options
from research.train.lock import lock

DEFAULT_MODEL = "smollm2-135m-instruct"
ALIASES = {"cdpo": "dpo", "apo": "apo_zero"}
SMOOTHED = ("cdpo", "robust")
BETA = {"simpo": 2.0}  # else 0.1
CURVE = ("loss", "eval/loss", "rewards/accuracies", "eval/rewards/accuracies", "rewards/margins", "rewards/chosen")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    common.model_flags(None)
    flags.DEFINE_enum("loss", "dpo", [*LOSSES, *ALIASES, "kto"], "What is minimised; apo is apo_zero.")
    flags.DEFINE_string("data", "dpo/en", "dpo/en, dpo/zh, kto/en, a .json or .jsonl file, or a hub id.")
    flags.DEFINE_string("template", None, "Chat template: own, text, chatml, plain, plain/zh. Default: own, else text.")
    flags.DEFINE_string("peft", "lora", "Method specification, such as lora:rank=8,targets=attn/(q|v) or bitfit.")
    flags.DEFINE_string("adapter", None, "An adapter directory to go on with, instead of a fresh --peft.")
    flags.DEFINE_enum("reference", None, ["base", "initial_adapter"], "Default: base; with --adapter initial_adapter.")
    flags.DEFINE_float("beta", None, "Strength of the tie to the reference. Default: 0.1; simpo 2.")
    flags.DEFINE_float("label_smoothing", None, "Share of flipped labels, for dpo, cdpo and robust. Default: 0; 0.1.")
    flags.DEFINE_float("gamma", 1.0, "SimPO's margin.")
    flags.DEFINE_bool("length_normalised", False, "IPO on means over tokens instead of sums.")
    flags.DEFINE_string("divergence", "reverse_kl", "Of f-DPO: reverse_kl, forward_kl or js.")
    flags.DEFINE_float("desirable", 1.0, "KTO's weight of liked answers.", lower_bound=0.0)
    flags.DEFINE_float("undesirable", 1.0, "KTO's weight of the others.", lower_bound=0.0)
    flags.DEFINE_integer("max_length", 256, "Tokens a row, prompt and answer, is cut to.", lower_bound=3)
    flags.DEFINE_enum("packing", "none", ["none", "first_fit"], "How pairs share rows, which then are twice as wide.")
    flags.DEFINE_integer("chunk", 64, "Positions whose logits live at a time; 0 for all.", lower_bound=0)
    training.recipe_flags(learning_rate=5e-5, steps=60, batch_size=8, micro_batches=4, warmup=0.1)
    training.run_flags("runs/preference", eval_every=20, save_every=20)
    flags.DEFINE_bool("force", False, "Go on with an adapter although it was trained on another base.")


class Objective(NamedTuple):
    """A loss by the name of --loss, with its options; reference is None where it needs none."""

    flag: str
    options: Options
    reference: str | None

    @property
    def name(self) -> str:
        return ALIASES.get(self.flag, self.flag)

    def loss(self, model: Any, chunk: int | None = None) -> Callable[[dict, dict, jax.Array | None], Loss]:
        """Of realised variables and flat batches."""
        source = "base" if self.reference is None else "initial_adapter"
        if self.name == "kto":
            inner = alignment.kto_loss(model, self.options, source, chunk)
        else:
            inner = alignment.preference_loss(model, self.name, self.options, source, chunk)

        def fn(variables: dict, batch: dict, rng: jax.Array | None) -> Loss:
            if self.reference is not None:
                variables = variables | {"reference": references.referred(variables)}
            out = inner(variables, preferences.nest(batch), rng)
            if self.name != "kto":
                return out
            good, real = batch["desirable"].astype(bool), batch["weight"] > 0
            one_kind = 1.0 - ((good & real).any() & (~good & real).any())
            return out._replace(metrics=out.metrics | {"one_kind": (one_kind * out.weight, out.weight)})

        return fn

    def at_start(self, data: dict[str, np.ndarray]) -> float | None:
        """The loss of a policy that is its reference, exactly; None where there is no reference."""
        b, two = self.options.beta, math.log(2)
        if self.name == "kto":
            each = np.where(data["desirable"], self.options.desirable, self.options.undesirable)
            return 0.5 * float(each.mean())
        known = {"dpo": two, "robust": two, "ipo": 1 / (4 * b * b), "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0}
        return (known | {"nca": 2 * two, "bco_pair": 2 * two, "sppo_hard": 1 / (2 * b * b)}).get(self.name)


def objective(values: Any) -> Objective:
    """What the flags ask for. FlagError: options of another loss."""
    name, smoothing = values.loss, values.label_smoothing
    if smoothing and name not in ("dpo", *SMOOTHED):
        raise FlagError(f"--label_smoothing is for dpo, cdpo and robust, not for --loss={name}.")
    if values.divergence != "reverse_kl" and ALIASES.get(name, name) not in ("dpo", "robust"):
        raise FlagError(f"--divergence is for dpo, cdpo and robust, not for --loss={name}.")
    if values.packing != "none" and name == "kto":
        raise FlagError("--packing is for pairs, not for --loss=kto.")
    if values.reference and name in REFERENCE_FREE:
        raise FlagError(f"--loss={name} has no reference: leave --reference out.")
    options = Options(
        beta=BETA.get(name, 0.1) if values.beta is None else values.beta,
        label_smoothing=(0.1 if name in SMOOTHED else 0.0) if smoothing is None else smoothing,
        **common.flag_values("gamma", "length_normalised", "divergence", "desirable", "undesirable"),
    )
    default = "base" if values.adapter is None else "initial_adapter"
    return Objective(name, options, None if name in REFERENCE_FREE else values.reference or default)


def main() -> None:
    values = flags.FLAGS
    goal = objective(values)
    recipe = training.Recipe(**common.flag_values(*training.Recipe.__dataclass_fields__))
    workdir = Path(values.workdir).expanduser()
    loaded = None if values.adapter is None else adapters.load(values.adapter)
    if loaded is not None and values["peft"].present and values.peft != loaded.meta["spec"]:
        raise FlagError(f"--adapter is of method {loaded.meta['spec']}: leave --peft out.")
    spec = values.peft if loaded is None else loaded.meta["spec"]
    with training.use_mesh(values.mesh, several=True) as mesh, lock(workdir):
        options = common.model_options()
        name = values.model or (DEFAULT_MODEL if loaded is None else loaded.meta["base"]["name"])
        base = load_model(name, values.quantise, mesh=mesh, **options)
        added = classification.check(base, spec)
        encoder = preferences.Encoder(base.tokenizer, values.template or (loaded and loaded.meta.get("template")))
        read = preferences.load_judged if goal.name == "kto" else preferences.load_pairs
        data = read(values.data, encoder, values.max_length)
        classification.check_length(base, added, data.width)
        data = data if values.packing == "none" else data.packed()
        loss = goal.loss(base.model, values.chunk or None)
        run = references.start(
            base, spec, loss, recipe, values.seed, data.parts["train"],
            reference=goal.reference, loaded=loaded, force=values.force, mesh=mesh,
        )  # fmt: skip
        print(training.summary(base, spec, run))
        for note in data.notes:
            print(note)
        print(rows_line(data, encoder))
        copies = report_reference(run, base, goal)
        batch = Batches(data.parts["train"], recipe.batch_size, values.seed, recipe.micro_batches).batch
        if values.dry_run:
            return print(dry_run(run, batch, recipe, mesh, data.shown))
        identity = {
            "base": base.fingerprint, "data": data.fingerprint, "peft": spec, "seed": values.seed,
            "recipe": common.jsonable(recipe), "dtype": values.dtype, "loss": goal.flag,
            "options": common.jsonable(goal.options), "reference": goal.reference,
            "adapter": None if loaded is None else loaded.meta["sha256"],
        }  # fmt: skip
        identity |= {} if values.quantise is None else {"quantise": values.quantise}
        evaluate = training.evaluator(run, data.parts["validation"], min(32, 2 * recipe.batch_size))
        before = evaluate(run.state)
        check_start(goal, run, before, data.parts["validation"], values.dtype, fresh=loaded is None)
        trainable, total = training.counts(run)
        result = training.train(
            run, batch, recipe, workdir, identity, mesh=mesh, evaluate=evaluate, eval_every=values.eval_every,
            save_every=values.save_every, label=goal.flag, curve=CURVE,
        )  # fmt: skip
        after = training.evaluator(run, data.parts["test"], min(32, 2 * recipe.batch_size))(result.state)
        where, meta = workdir / "adapter", {"loss": goal.flag, "template": encoder.name, "seed": values.seed}
        origin = {"name": base.name, "fingerprint": base.fingerprint}
        variables = {k: v for k, v in result.state.variables(run.frozen).items() if k != "reference"}
        size = adapters.save(where, spec, variables, run.sites, origin, task="preference", **meta)
        found = {"start": before, "test": after, "live_base_buffers": copies, "seconds": result.seconds}
        common.write_json(workdir / "result.json", found | {"trainable": trainable, "total": total})
    print(f"test: loss {after['loss']:.4f}{rewards(after)} over {int(after['weight'])} rows")
    print(f"adapter: {where} ({size:,} bytes)")


def rows_line(data: preferences.Data, encoder: preferences.Encoder) -> str:
    """What is learnt from."""
    train = data.parts["train"]
    sizes = ", ".join(f"{len(next(iter(leaves.values())))} {part}" for part, leaves in data.parts.items())
    line = f"{sizes} rows of {data.width} tokens, template {encoder.template}"
    if "desirable" not in train:
        return line
    liked = int(train["desirable"].sum())
    line += f"; {liked} of {len(train['desirable'])} answers to train on are liked"
    return line + ("" if 0 < liked < len(train["desirable"]) else ": all of one kind, so no difference is learnt")


def report_reference(run: training.Run, base: Pretrained, goal: Objective) -> float:
    """Prints what the reference is and what it costs; returns how often the base is in memory."""
    copies = references.live_bases(run, base)
    line = f"live base buffers: {copies:.4g}"
    if goal.reference is None:
        print(f"{line}; {goal.flag} has no reference")
        return copies
    kept = run.frozen["reference"]
    what = {"base": "the base with the adapters off", "initial_adapter": "the adapter as it starts"}[goal.reference]
    size = tree.nbytes(kept)
    print(f"{line}; the reference is {what}" + (f", for which {size:,} bytes are kept" if size else ": no copy"))
    if leaves := len(jax.tree.leaves(kept["params"])):
        print(f"{leaves} base leaves train, so without the adapter is not the base: their first values are kept")
    return copies


def check_start(goal: Objective, run: training.Run, found: dict, data: dict, dtype: str, fresh: bool) -> None:
    """Prints the loss before the first step beside its closed form. ModelError where they should agree and don't."""
    line, want = f"step 0: loss {found['loss']:.6f}{rewards(found)}", goal.at_start(data)
    if want is None:
        return print(line)
    if goal.reference == "base" and not (fresh and run.method.identity):
        return print(f"{line}; the policy starts apart from its reference, where it would be {want:.6f}")
    near = 1e-4 if dtype == "float32" else 2e-2
    if not abs(found["loss"] - want) <= near * max(1.0, want):
        raise ModelError(f"{line}, but a policy that is its reference has {want:.6f}: the reference is not the policy.")
    print(f"{line}; in closed form {want:.6f}")


def rewards(found: dict) -> str:
    """The rewards that a table of metrics has."""
    names = ("chosen", "rejected", "margins", "accuracies")
    there = [f"{n} {found[f'rewards/{n}']:.4f}" for n in names if f"rewards/{n}" in found]
    return f", rewards {', '.join(there)}" if there else ""


if __name__ == "__main__":
    define_flags()
    common.run(main)
