"""Losses of documents that share rows are those of rows apart, and DPO takes little more memory than SFT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.shared import preferences
from research.data.packing import pack_pairs
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import alignment, lm, policy, preference
from research.tasks.preference import Options
from research.train import state
from research.train.step import make_step
from tests import tiny

PAIRS, WIDTH, ROW = 6, 10, 27
# Chosen and rejected: an empty prompt, an answer of one token, and sides of unequal lengths.
PROMPTS, ANSWERS = (3, 0, 5, 2, 1, 4), ((4, 6), (7, 3), (1, 5), (8, 2), (6, 6), (2, 1))


@functools.cache
def leaves() -> dict[str, np.ndarray]:
    """Pairs of one prompt and two answers in rows of their own, padded on the right."""
    rng, sides = np.random.default_rng(3), {"chosen": [], "rejected": []}
    for prompt, sizes in zip(PROMPTS, ANSWERS, strict=True):
        asked = rng.integers(1, tiny.VOCAB, prompt).astype(np.int32)
        for side, size in zip(sides, sizes, strict=True):
            sides[side].append((asked, rng.integers(1, tiny.VOCAB, size).astype(np.int32)))
    filled = [preferences.prefixed(side, preferences.fill(rows, WIDTH)) for side, rows in sides.items()]
    return filled[0] | filled[1]


@functools.cache
def packed() -> dict[str, np.ndarray]:
    return pack_pairs(leaves(), ROW)


@functools.cache
def order() -> np.ndarray:
    """Which pair lies in each place of a packed row [R, P], -1 for none."""
    found, out = packed(), np.full(packed()["weight"].shape, -1)
    apart = preferences.nest(leaves())["chosen"]
    for row, place in np.argwhere(found["weight"] > 0):
        tokens = found["tokens"][row, found["segments"][row] == 2 * place + 1]
        same = [np.array_equal(t[m > 0], tokens) for t, m in zip(apart["tokens"], apart["mask"], strict=True)]
        out[row, place] = same.index(True)
    return out


def test_pairs_are_packed_whole_and_once():
    found = packed()
    assert found["weight"].tolist() == [[1, 1], [1, 1], [1, 0], [1, 0]]
    assert sorted(order()[order() >= 0]) == list(range(PAIRS)) and np.array_equal(found["mask"], found["segments"] > 0)
    for row, place in np.argwhere(found["weight"] > 0):
        for side, segment in (("chosen", 2 * place + 1), ("rejected", 2 * place + 2)):
            there, pair = found["segments"][row] == segment, order()[row, place]
            real = leaves()[f"{side}_mask"][pair] > 0
            assert np.array_equal(found["tokens"][row, there], leaves()[f"{side}_tokens"][pair, real])
            assert np.array_equal(found["completion"][row, there][1:], leaves()[f"{side}_completion"][pair, real][1:])


# ------------------------------------------------------------------------------------------------ packed = unpacked


def worth() -> np.ndarray:
    """An advantage for each side of each pair [N, 2]."""
    return np.random.default_rng(5).normal(size=(PAIRS, 2)).astype(np.float32)


def apart_rows(model, variables: dict) -> alignment.Scored:
    """Rows chosen 0, rejected 0, chosen 1, ... [2N, T]."""
    sides = preferences.nest(leaves())
    both = {k: jnp.stack([sides["chosen"][k], sides["rejected"][k]], 1).reshape(2 * PAIRS, WIDTH) for k in KEYS}
    return alignment.sequence_logprobs(model, variables, both)


def packed_rows(model, variables: dict) -> alignment.Scored:
    """The same, in the order of their rows, those that are not there with an empty mask [R * 2P, ROW]."""
    found = {k: jnp.asarray(v) for k, v in packed().items()}
    return alignment.documents(alignment.sequence_logprobs(model, variables, found), found["segments"], 4)


KEYS = ("tokens", "mask", "completion")
ROWS = {"apart": apart_rows, "packed": packed_rows}


@functools.cache
def scored(which: str) -> tuple[alignment.Scored, alignment.Scored]:
    """(policy, reference) from one compiled program."""
    case = tiny.case("lora", "decoder")
    variables = {k: v for k, v in case.point.items() if k != "head"}

    def both(v: dict) -> tuple:
        own = peft.realised(case.method, v, case.sites)
        return ROWS[which](case.model, own), ROWS[which](case.model, alignment.reference_variables(own, "base"))

    return jax.tree.map(np.asarray, jax.jit(both)(variables))


def advantages(which: str) -> np.ndarray:
    """[rows] of `scored`; a document that is not there is worth what must not count."""
    if which == "apart":
        return worth().reshape(-1)
    return np.where(order()[..., None] >= 0, worth()[order()], 1e6).reshape(-1)


def completions(which: str) -> list[preference.Completion]:
    own, other = scored(which)
    whole = preference.completion(own.logps, own.mask, other.logps)
    return [preference.Completion(*(x[side::2] for x in whole)) for side in (0, 1)]


def test_documents_are_scored_as_if_alone():
    (apart, _), (together, _) = scored("apart"), scored("packed")
    place = np.argsort(order()[order() >= 0])
    for name in ("logps", "entropy", "mask"):
        rows = getattr(together, name).reshape(*order().shape, 2, ROW)[order() >= 0][place]
        tiny.close(rows.sum(-1).reshape(-1), getattr(apart, name).sum(-1))
    assert together.mask.sum() == sum(map(sum, ANSWERS)) - 2, "the first token of a row without a prompt has no score"


@pytest.mark.parametrize("name", [*preference.LOSSES, "kto"])
def test_packed_pairs_have_the_loss_of_pairs_apart(name):
    found = {}
    for which in ROWS:
        win, lose = completions(which)
        if name == "kto":
            z0 = preference.kto_baseline(lose)
            found[which] = preference.kto(win, jnp.ones(len(win.logps)), z0, Options(), win.length > 0)
        else:
            found[which] = preference.paired(name, win, lose, Options())
    tiny.close(found["packed"], found["apart"])
    assert found["apart"].weight == PAIRS


@pytest.mark.parametrize("name", policy.VARIANTS)
def test_packed_completions_have_the_loss_of_completions_apart(name):
    v, found = policy.variant(name), {}
    for which in ROWS:
        own, other = scored(which)
        options = {"old": own.logps - 0.3 * other.mask, "reference": other.logps, "entropy": own.entropy}
        found[which] = policy.policy_loss(v, own.logps, jnp.asarray(advantages(which)), own.mask, **options)
    tiny.close(found["packed"], found["apart"])
    assert found["apart"].weight > 0


@pytest.mark.slow
def test_gradients_through_the_model_are_those_of_pairs_apart():
    """Of DPO by its batch, from either reference, and of GRPO by its rows."""
    case, grpo = tiny.case("lora", "decoder"), policy.variant("grpo")
    trainable, frozen = tree.partition({k: v for k, v in case.point.items() if k != "head"}, case.mask)
    known = {side: np.float32(np.random.default_rng(6).normal(size=PAIRS)) for side in ("chosen", "rejected")}
    place = lambda x: np.where(order() >= 0, x[order()], 1e3)  # noqa: E731
    batches = {"apart": preferences.nest(leaves()) | {f"reference_{k}": x for k, x in known.items()},
               "packed": packed() | {f"reference_{k}": place(x) for k, x in known.items()}}  # fmt: skip

    def total(trainable, which: str) -> tuple:
        own = peft.realised(case.method, tree.combine(trainable, frozen), case.sites)
        pairs = [alignment.preference_loss(case.model, "dpo", reference=r)(own, batches[which], None)
                 for r in ("base", "batch")]  # fmt: skip
        rows = ROWS[which](case.model, own)
        out = policy.policy_loss(grpo, rows.logps, jnp.asarray(advantages(which)), rows.mask)
        return sum(x.mean() for x in (*pairs, out)), [x.metrics["rewards/margins"] for x in pairs]

    found = {which: jax.jit(jax.grad(functools.partial(total, which=which), has_aux=True))(trainable) for which in ROWS}
    tiny.close(found["packed"], found["apart"], 1e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found["apart"][0])) > 0.01


# ------------------------------------------------------------------------------------------------------------- memory


def cost() -> dict[str, int]:
    """Bytes that a compiled step of LoRA works in, on 4 rows of 128 tokens: SFT, and DPO on 2 pairs."""
    config = LlamaConfig(4096, 128, 4, 4, 4, 32, 384, max_positions=128)
    model, method = build(config), registry.parse("lora")
    variables = {"params": tiny.fill(peft.base(model)[0])}
    variables["peft"] = peft.init(method, jax.random.key(0), peft.sites(model))
    mask, realise = peft.mask(method, variables), lambda v: peft.realised(method, v, peft.sites(model))
    row = {k: jnp.ones((1, 4, 128), jnp.int32) for k in (*KEYS, "loss_mask")}
    pair = {side: {k: row[k][:, :2] for k in KEYS} for side in ("chosen", "rejected")}
    tx, found = tiny.optimizer(), {}
    runs = {"sft": (lm.loss(model, 64), row), "dpo": (alignment.preference_loss(model, "dpo", chunk=64), pair)}
    for name, (loss, batch) in runs.items():
        trainable, extra, frozen = state.split(variables, mask)
        start = state.create(trainable, tx, jax.random.key(1), extra, mask)
        step = jax.jit(make_step(loss, tx, realise=realise), donate_argnums=(0,))
        found[name] = step.lower(start, frozen, batch).compile().memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.slow
def test_dpo_takes_under_1_3_times_the_memory_of_sft():
    found = tiny.alone("tests.tasks.test_alignment:cost")
    assert found["dpo"] < 1.3 * found["sft"], found
