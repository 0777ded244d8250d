"""From conversations to a tuned language model: what `sft` and `prompt_tuning` share."""

import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.shared import common, replies, training
from experiments.shared.classification import check, check_length
from research.convert.load import Pretrained
from research.data import instructions, packing
from research.data.batches import Batches, eval_batches
from research.data.chat import Chat
from research.data.instructions import Conversation, Message
from research.generate.sampling import GREEDY, Sampling
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import lm
from research.train import metrics, step
from research.train import state as states

CHUNK = 256  # tokens whose logits exist at a time: [B, T, V] never does
LEAVES = ("tokens", "mask", "loss_mask", "segments")  # the model counts positions itself
PACKING = ("first_fit", "sequential", "none")


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to train. A row has max_length tokens: longer conversations are cut or left out, shorter ones packed."""

    max_length: int = 256
    truncation: str = "right"
    packing: str = "first_fit"


class Data(NamedTuple):
    """Packed rows: leaves int32 [N, T] of the training part, and of the validation part by language; conversations of
    the latter as they are; what was left out and cut, a line each.
    """

    train: dict[str, np.ndarray]
    validation: dict[str, dict[str, np.ndarray]]
    held: dict[str, list[Conversation]]
    notes: list[str]
    fingerprint: str


def data_flags(source: str, template: str | None, max_length: int) -> None:
    """--data, --template, --max_length, --truncation, --packing, --eval_rows."""
    own = {"module_name": sys.argv[0]}  # the script's, so that its config.json holds them
    flags.DEFINE_string(
        "data", source, "alpaca, alpaca/en, alpaca/zh, a .json or .jsonl file of conversations, or hub id.", **own
    )
    flags.DEFINE_string("template", template, "chatml, plain or plain/zh. Default: the tokenizer's own.", **own)
    flags.DEFINE_integer("max_length", max_length, "Tokens a row.", lower_bound=2, **own)
    flags.DEFINE_enum(
        "truncation", "right", packing.POLICIES, "Longer conversations: cut the left or the right, or drop.", **own
    )
    flags.DEFINE_enum("packing", "first_fit", PACKING, "How conversations share rows, each seeing itself alone.", **own)
    flags.DEFINE_integer("eval_rows", 48, "Held-out conversations a language; 0 for all.", lower_bound=0, **own)


def load_data(source: str, chat: Chat, recipe: Recipe, eval_rows: int = 0) -> Data:
    """Loads, encodes and packs conversations. `eval_rows`: held-out ones of each language, 0 for all."""
    found = instructions.load(source)
    train, notes = rows(chat, found.part("train"), recipe, "train")
    notes = [*found.notes, *notes]
    held: dict[str, list[Conversation]] = {}
    for conversation in sorted(found.part("validation"), key=lambda c: c.language):
        held.setdefault(conversation.language or "other", []).append(conversation)
    validation = {}
    for language in held:
        chosen = held[language][: eval_rows or None]
        validation[language], more = rows(chat, chosen, recipe, f"validation, {language}")
        notes += more
    digest = hashlib.sha256()
    for leaf in itertools.chain(train.values(), *(part.values() for part in validation.values())):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return Data(train, validation, held, notes, digest.hexdigest()[:16])


def rows(
    chat: Chat, conversations: Sequence[Conversation], recipe: Recipe, name: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The rows of a part, and what became of its conversations. Masks come from lengths: a pad may well be the closing
    token, which is learnt all the same.
    """
    encoded, dropped = chat.encode_all(c.messages for c in conversations)
    kept, counts = packing.truncate(encoded, recipe.max_length, recipe.truncation)
    pad = chat.tokenizer.pad_token_id or 0
    if recipe.packing == "none":
        arrays = packing.unpacked(kept, recipe.max_length, pad)
    else:
        arrays = packing.pack(kept, recipe.max_length, recipe.packing, pad)
    arrays = {leaf: arrays[leaf] for leaf in LEAVES}
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    notes = [f"{name}: {count} conversations dropped: {reason}" for reason, count in dropped.items()]
    notes += [
        f"{name}: {len(conversations):,} conversations ({told}; longer than {recipe.max_length} tokens: "
        f"{recipe.truncation}) in {len(arrays['tokens']):,} rows of {recipe.max_length} tokens, "
        f"{100 * packing.efficiency(arrays):.0f} % full, {int(arrays['loss_mask'].sum()):,} tokens to learn"
    ]
    return arrays, notes


def batches(data: Data, recipe: Recipe, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch [M, B/M, ...]."""
    return Batches(data.train, recipe.batch_size, seed, recipe.micro_batches).batch


def start(
    base: Pretrained, spec: str, data: Data, recipe: Recipe, seed: int, mesh: jax.sharding.Mesh | None = None
) -> training.Run:
    """Attaches the method, whose loss holds the logits of CHUNK tokens at a time."""
    fits(base, spec, recipe)
    batches(data, recipe, seed)  # refuses what does not fit, before anything is compiled

    def feed(seed: int) -> Callable[[int], dict[str, np.ndarray]]:
        whole = batches(data, replace(recipe, micro_batches=1), seed)
        return lambda i: {name: leaf[0] for name, leaf in whole(i).items()}

    chunk = CHUNK if registry.parse(spec).task is None else None  # a method with its own loss may compare all logits
    return training.start(base, spec, lm.loss(base.model, chunk), recipe, seed, feed=feed, mesh=mesh)


def fits(base: Pretrained, spec: str, recipe: Recipe) -> None:
    """FlagError where the method does not apply, or virtual tokens and rows together outgrow the model's positions."""
    check_length(base, check(base, spec), recipe.max_length)


def evaluator(run: training.Run, data: Data, batch_size: int) -> Callable[..., dict[str, float] | None]:
    """(state, stop) -> nats a held-out token: `loss` over all, and one by the name of each language."""

    def evaluate(state: Any, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        found = {}
        for language, part in data.validation.items():
            found[language] = run.evaluate(state, run.frozen, eval_batches(part, batch_size), stop)
            if found[language] is None:
                return None
        return _means(found)

    return evaluate


def base_losses(base: Pretrained, data: Data, batch_size: int) -> dict[str, float]:
    """What `evaluator` gives for the base alone."""
    variables = {"params": base.params}
    trainable, extra, frozen = states.split(variables, tree.constant(variables, False))
    state = states.TrainState(jnp.zeros((), jnp.int32), trainable, extra, (), jax.random.key(0))
    evaluate = step.make_eval(lm.loss(base.model, CHUNK))
    found = {name: evaluate(state, frozen, eval_batches(part, batch_size)) for name, part in data.validation.items()}
    return _means(found)


def _means(found: dict[str, dict[str, float]]) -> dict[str, float]:
    weight = sum(means["weight"] for means in found.values())
    loss = sum(means["loss"] * means["weight"] for means in found.values()) / max(weight, 1)
    return {"loss": loss, **{language: means["loss"] for language, means in found.items()}, "weight": weight}


class Question(NamedTuple):
    """Messages that end with a question, their language, and an answer to compare with ("" if there is none)."""

    language: str
    messages: Sequence[Message]
    reference: str


def held_out(data: Data, chat: Chat, recipe: Recipe, count: int) -> list[Question]:
    """The first `count` held-out conversations of each language whose question fits a row, without their answers."""
    found = []
    for language, talks in data.held.items():
        fitting = (t for t in talks if len(chat.prompt(t.messages[:-1])) <= recipe.max_length)
        chosen = itertools.islice(fitting, count)
        found += [Question(language, t.messages[:-1], t.messages[-1]["content"]) for t in chosen]
    return found


class Setup(NamedTuple):
    """What several tunings have in common."""

    base: Pretrained
    chat: Chat
    data: Data
    recipe: Recipe
    mesh: jax.sharding.Mesh | None = None


def tune(
    setup: Setup,
    run: training.Run,
    spec: str,
    where: Path,
    values: Any,
    questions: Sequence[Question],
    sampling: Sampling = GREEDY,
) -> dict[str, Any]:
    """Trains, or goes on, and leaves in `where` the curve, the adapter and result.json; what is finished is read. Call
    it under the folder's lock. `values`: the script's flags.

    Returns what result.json holds: `before` and `after` (nats a held-out token), `samples`, counts, seconds, bytes.
    """
    base, chat, data, recipe, mesh = setup
    adapter, label = where / "adapter", where.name
    identity = {
        "base": base.fingerprint, "data": data.fingerprint, "peft": spec, "seed": values.seed,
        "recipe": common.jsonable(recipe), "dtype": values.dtype, "template": values.template,
    }  # fmt: skip
    identity |= {} if values.quantise is None else {"quantise": values.quantise}
    earlier = training.saved_identity(where / "checkpoints")
    common.refuse_other(earlier or identity, identity, f"{where} holds a run")  # before the minutes that follow
    asked = {"questions": [q.messages[-1]["content"] for q in questions], "max_new": values.max_new}
    asked |= {"sampling": common.jsonable(sampling)}
    done = _found(where / "result.json", identity | asked)
    if done is not None and (adapter / adapters.META).exists():
        print(f"{label}: finished before, in {where}")
        return done
    evaluate = evaluator(run, data, recipe.batch_size)
    ask = lambda v: replies.answers(  # noqa: E731
        base, chat, v, [q.messages for q in questions], values.max_new, sampling, values.seed
    )
    before = _found(where / "before.json", identity | asked)
    if before is None:
        print("measuring what is there before training ...", flush=True)
        before = {"identity": identity | asked, "losses": evaluate(run.state), "answers": ask({"params": base.params})}
        common.write_json(where / "before.json", before)
        if earlier is None:  # the curve begins here
            writer = metrics.Writer(where / "metrics.jsonl")
            writer.resume(-1)
            writer.write(metrics.row(0, before["losses"], "eval/"))
    print(f"step 0: {told(before['losses'])}", flush=True)
    several = [f"eval/{language}" for language in data.validation] if len(data.validation) > 1 else []
    result = training.train(
        run, batches(data, recipe, values.seed), recipe, where, identity, mesh=mesh, evaluate=evaluate,
        eval_every=values.eval_every, save_every=values.save_every, label=label,
        curve=("loss", "eval/loss", *several),
    )  # fmt: skip
    ended = [row for row in result.history if row["step"] == recipe.steps and "eval/loss" in row]
    after = {name: ended[-1][f"eval/{name}"] for name in before["losses"]} if ended else evaluate(result.state)
    variables = result.state.variables(run.frozen)
    told_after = ask(peft.realised(run.method, variables, run.sites))
    named = {"name": base.name, "fingerprint": base.fingerprint}
    size = adapters.save(
        adapter, spec, variables, run.sites, named, task="chat", template=values.template, losses=after
    )
    samples = [
        {
            "language": q.language,
            "question": q.messages[-1]["content"],
            "reference": q.reference,
            "before": a,
            "after": b,
        }
        for q, a, b in zip(questions, before["answers"], told_after, strict=True)
    ]
    trainable, total = training.counts(run)
    found = {
        "identity": identity | asked, "before": before["losses"], "after": after, "samples": samples,
        "trainable": trainable, "total": total, "seconds": result.seconds, "step_ms": result.step_ms,
        "adapter_bytes": size, "notes": data.notes,
    }  # fmt: skip
    common.write_json(where / "result.json", found)
    return found


def _found(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A file of an earlier run of the same identity."""
    found = common.read_json(path, identity=dict) if path.exists() else {}
    return found if found.get("identity") == identity else None


def told(losses: dict[str, float]) -> str:
    """One line of `evaluator`'s means."""
    each = [f"{name} {value:.4f}" for name, value in losses.items() if name not in ("loss", "weight")]
    return f"{losses['loss']:.4f} nats a held-out token ({', '.join(each)}; {int(losses['weight']):,} tokens)"


def picture(chat: Chat, data: Data) -> str:
    """The first training conversation as text, and what of it is learnt."""
    leaves = {name: leaf[0] for name, leaf in data.train.items()}
    first, learnt = leaves["segments"] == 1, (leaves["segments"] == 1) & (leaves["loss_mask"] == 1)
    whole, said = (chat.tokenizer.decode(leaves["tokens"][places]) for places in (first, learnt))
    return f"a conversation: {whole!r}\n\nwhat is learnt: {said!r}"
