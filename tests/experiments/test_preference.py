"""`experiments.preference`: what its rows hold, where its loss starts, what its reference is, and that it resumes."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.preference import Objective
from experiments.shared import preferences, references, training
from experiments.shared.preferences import Encoder
from research.convert.load import load
from research.data.batches import Batches
from research.data.chat import TEMPLATES
from research.data.smoke import sentences, smoke_tokenizer
from research.errors import DataError, FlagError
from research.tasks import alignment
from research.tasks.preference import Options
from tests import tiny
from tests.data.test_chat import TALK, tokenizer
from tests.experiments.script import refused, run

RECIPE = training.Recipe(0.3, steps=4, batch_size=8, optimizer="sgd", warmup=0, schedule="constant", clip_norm=1e6)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """100 pairs from the bundled sentences, prompts and answers of unequal lengths."""
    of = {label: [text for text, name in sentences() if name == label] for label in ("positive", "negative")}
    rows = []
    for i, (good, bad) in enumerate(zip(of["positive"], of["negative"], strict=True)):
        asked = " ".join(good.split()[:3]) + " the" * (i % 5)
        rows.append({"prompt": asked, "chosen": " ".join(good.split()[3:]), "rejected": bad})
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def base():
    return load("smoke-llama")


@pytest.fixture(scope="module")
def data(source, base) -> preferences.Data:
    return preferences.load_pairs(source, Encoder(base.tokenizer), 32)


# ------------------------------------------------------------------------------------------------- rows


def test_rows_hold_prompt_answer_and_its_end(data, base):
    train, ids = data.parts["train"], base.tokenizer.get_vocab()
    assert {k: v.shape for k, v in train.items()}["chosen_tokens"] == (len(train["chosen_mask"]), 32)
    assert sum(len(leaves["chosen_mask"]) for leaves in data.parts.values()) == 100
    words = data.shown.split("\n-> ")
    for name, said in (("chosen", words[1]), ("rejected", words[2])):
        tokens, mask, scored = (train[f"{name}_{k}"][0] for k in ("tokens", "mask", "completion"))
        assert base.tokenizer.decode(tokens[scored > 0]) == said and tokens[scored > 0][-1] == ids["[SEP]"]
        assert base.tokenizer.decode(tokens[(mask > 0) & (scored == 0)]) == words[0] and words[0].startswith("[CLS]")
        assert (mask >= scored).all() and scored[mask > 0][-1] == 1
    nested = preferences.nest(train | {"weight": np.ones(3)})
    assert nested["chosen"]["mask"] is train["chosen_mask"] and nested["weight"].sum() == 3


def test_what_cannot_teach_is_counted(source, base, tmp_path):
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    rows += [
        {"prompt": "the film", "chosen": "the", "rejected": "the"},
        {"prompt": "the film", "chosen": "the", "rejected": ""},
        {"prompt": "the " * 40, "chosen": "was", "rejected": "is"},
        {"prompt": "the film", "chosen": "the " * 40 + "was", "rejected": "the " * 40 + "is"},
    ]
    found = preferences.load_pairs(write(tmp_path / "more.jsonl", rows), Encoder(base.tokenizer), 32)
    told = "\n".join(found.notes)
    cut = ("its prompt leaves no room for an answer in 32 tokens", "both answers are the same once they are cut")
    for reason in ("both answers are the same", "no answer", *cut):
        assert f": 1 rows left out: {reason}\n" in f"{told}\n", told
    assert sum(len(leaves["chosen_mask"]) for leaves in found.parts.values()) == 100


def test_pairs_apart_meet_another_row_s_answer(source, base, data):
    train = preferences.load_judged(source, Encoder(base.tokenizer), 32).parts["train"]
    half = len(data.parts["train"]["chosen_mask"])
    assert train["desirable"].tolist() == [1] * half + [0] * half
    for i in (0, half - 1, 2 * half - 1):
        j = (i + 1) % (2 * half)
        ids, scored = train["mismatched_tokens"][i], train["mismatched_completion"][i] > 0
        own = (train["mask"][i] > 0) & (train["completion"][i] == 0)
        assert np.array_equal(ids[scored], train["tokens"][j][train["completion"][j] > 0])
        assert np.array_equal(ids[(train["mismatched_mask"][i] > 0) & ~scored], train["tokens"][i][own])


def test_only_the_last_answer_of_a_chat_is_learnt():
    encoder = Encoder(tokenizer(), "chatml")
    asked, said = encoder.answered(TALK)
    assert tokenizer().decode(said) == "再见<|im_end|>" and tokenizer().decode(asked).endswith("assistant\n")
    assert np.array_equal(np.concatenate([asked, said]), encoder.chat.encode(TALK).tokens[: len(asked) + len(said)])
    assert (encoder.name, Encoder(tokenizer(TEMPLATES["chatml"])).name) == ("chatml", None), "its own has no name"


def test_margins_and_probabilities_of_rows(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "probability": 0.7}
    kept, _ = preferences.read(write(tmp_path / "a.jsonl", [row]))
    assert (kept[0].margin, kept[0].probability) == (2.0, 0.7)
    for bad, words in (({"margin": "two"}, "margin"), ({"probability": 2}, "0 to 1"), ({"margin": True}, "margin")):
        with pytest.raises(DataError, match=rf"b.jsonl:1: .*{words}"):
            preferences.read(write(tmp_path / "b.jsonl", [row | bad]))
    judged = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(DataError, match="c.jsonl:2: the label is 'maybe', expected true or false"):
        preferences.read(write(tmp_path / "c.jsonl", [judged, judged | {"label": "maybe"}]))
    with pytest.raises(DataError, match="for --loss=kto"):
        preferences.load_pairs(write(tmp_path / "d.jsonl", [judged]), Encoder(smoke_tokenizer()), 32)
    with pytest.raises(DataError, match="Did you mean 'dpo/en'"):
        preferences.read("dpo/eng")
    with pytest.raises(FlagError, match="Did you mean 'chatml'"):
        Encoder(smoke_tokenizer(), "chatm")


# ------------------------------------------------------------------------------------------------- where it starts


def started(base, data, spec: str, goal: Objective, **options):
    loss = goal.loss(base.model)
    return references.start(base, spec, loss, RECIPE, 0, data.parts["train"], reference=goal.reference, **options)


def evaluated(run_, data) -> dict:
    return training.evaluator(run_, data.parts["test"], 16)(run_.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("dpo", Options(), math.log(2)),
        ("ipo", Options(beta=0.2), 1 / (4 * 0.2**2)),
    ],
)
def test_starts_at_its_closed_form_with_one_base(name, options, want, base, data):
    goal = Objective(name, options, "base")
    fresh = started(base, data, "lora", goal)
    found = evaluated(fresh, data)
    assert found["loss"] == pytest.approx(want, rel=1e-6) == goal.at_start(data.parts["test"])
    assert found["rewards/margins"] == 0 and found["rewards/accuracies"] == 0, "to the bit, in one program"
    assert references.live_bases(fresh, base) == 1


@pytest.mark.slow
def test_kto_starts_at_a_half_and_counts_batches_of_one_kind(source, base):
    judged = preferences.load_judged(source, Encoder(base.tokenizer), 32)
    goal = Objective("kto", Options(), "base")
    fresh = started(base, judged, "lora", goal)
    test = judged.parts["test"]
    assert test["desirable"].tolist() == [1] * 5 + [0] * 5, "batches of 4, 4 and 2: of one kind, mixed, of one kind"
    found = training.evaluator(fresh, test, 4)(fresh.state)
    assert found["loss"] == pytest.approx(0.5) == goal.at_start(test) and found["kl"] == 0
    assert found["one_kind"] == pytest.approx(0.6) and found["rewards/chosen"] == 0


@pytest.mark.slow
def test_a_prompt_starts_apart_from_the_base_and_at_its_own_start(base, data):
    apart = evaluated(started(base, data, "prompt:length=2", Objective("dpo", Options(), "base")), data)
    own = evaluated(started(base, data, "prompt:length=2", Objective("dpo", Options(), "initial_adapter")), data)
    assert abs(apart["loss"] - math.log(2)) > 1e-3 and apart["rewards/margins"] != 0
    assert own["loss"] == pytest.approx(math.log(2), rel=1e-6) and own["rewards/margins"] == 0


def summed(base, variables: dict, leaves: dict) -> np.ndarray:
    """The summed log-probability [N] of the chosen answers."""
    side = preferences.nest(leaves)["chosen"]
    return np.asarray(jax.jit(lambda v, b: alignment.sequence_logprobs(base.model, v, b).logps.sum(1))(variables, side))


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "reference"), [("layernorm", "base"), ("lora", "initial_adapter")])
def test_training_leaves_the_reference_as_it_was(spec, reference, base, data):
    """After steps that move the policy, rewards are still beta times its distance from the first base, to the bit of
    the base's own numbers.
    """
    fresh = started(base, data, spec, Objective("dpo", Options(), reference))
    test, before = data.parts["test"], jax.tree.map(np.asarray, base.params)
    first = summed(base, {"params": base.params}, test)
    assert (references.live_bases(fresh, base) > 1) == (spec == "layernorm")
    batch = Batches(data.parts["train"], 8, 0).batch
    step, state = jax.jit(fresh.step, donate_argnums=(0,)), fresh.state
    for i in range(3):
        state, _ = step(state, fresh.frozen, batch(i))
    found = training.evaluator(fresh, test, 16)(state)
    policy = {k: v for k, v in state.variables(fresh.frozen).items() if k != "reference"}
    moved = summed(base, policy, test) - first
    assert np.abs(moved).max() > 0.1, "the policy has moved"
    assert found["rewards/chosen"] == pytest.approx(0.1 * moved.mean(), rel=1e-3)
    assert tiny.same(before, jax.tree.map(np.asarray, base.params))
    assert np.array_equal(summed(base, {"params": base.params}, test), first)


@pytest.mark.slow
def test_micro_batches_are_one_batch(base, data):
    fresh = started(base, data, "lora", Objective("dpo", Options(), "base"))
    point = tiny.noise(fresh.state.trainable, 0.3)  # at the start B = 0 hides A
    states = []
    for parts in (1, 4):
        batch = Batches(data.parts["train"], 8, 0, parts).batch(0)
        states.append(jax.jit(fresh.step)(fresh.state.replace(trainable=point), fresh.frozen, batch))
    (one, told), (four, again) = states
    tiny.close(one.trainable, four.trainable, 1e-5)
    assert not tiny.same(one.trainable, point)
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert float(told[key]) == pytest.approx(float(again[key]), rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_packed_pairs_are_judged_as_pairs_apart(base, data):
    goal, together = Objective("dpo", Options(), "base"), data.packed()
    assert len(together.parts["train"]["tokens"]) < len(data.parts["train"]["chosen_tokens"])
    fresh = started(base, data, "lora", goal)
    point = fresh.state.replace(trainable=tiny.noise(fresh.state.trainable, 0.3))
    apart, packed = (training.evaluator(fresh, x.parts["test"], 4)(point) for x in (data, together))
    assert packed.pop("weight") == apart.pop("weight") == len(data.parts["test"]["chosen_tokens"])
    assert apart.pop("skipped") == 0 and packed == pytest.approx(apart, rel=1e-4, abs=1e-5)
    assert abs(apart["rewards/margins"]) > 1e-3


# ------------------------------------------------------------------------------------------------- the script

TINY = ["--model=smoke-llama", "--steps=4", "--batch_size=8", "--micro_batches=2", "--max_length=32", "--warmup=0"]
TINY += ["--learning_rate=1e-2", "--eval_every=2", "--save_every=2"]


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("preference")
    outcome = run("preference", *TINY, f"--data={source}", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir, outcome.out


@pytest.mark.slow
def test_says_where_it_starts_and_writes_what_the_field_names(trained):
    workdir, out = trained
    assert "live base buffers: 1; the reference is the base with the adapters off: no copy" in out
    assert "step 0: loss 0.693147, rewards chosen 0.0000" in out and "in closed form 0.693147" in out
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names <= set(rows[0]) and [r["step"] for r in rows if "eval/rewards/accuracies" in r] == [2, 4]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    result = json.loads((workdir / "result.json").read_text())
    assert result["live_base_buffers"] == 1 and result["start"]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert (workdir / "curve.png").exists() and (workdir / "config.json").exists()


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_never_stopped(trained, source, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "adapter")
    outcome = run("preference", *TINY, f"--data={source}", f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 0 and "going on from step 2" in outcome.err
    one, two = (load_file(d / "adapter" / "adapter.safetensors") for d in (trained[0], tmp_path / "run"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    other = run("preference", *TINY, "--beta=0.2", f"--data={source}", f"--workdir={trained[0]}")
    refused(other, 2, "beta=0.1, not 0.2", "--workdir")


@pytest.mark.slow
def test_a_mesh_learns_what_one_device_does(trained, source, tmp_path):
    outcome = run("preference", *TINY, "--micro_batches=1", "--mesh=data:4,fsdp:2", f"--data={source}",
                  f"--workdir={tmp_path}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    one, eight = (load_file(d / "adapter" / "adapter.safetensors") for d in (trained[0], tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_learns_from_packed_pairs(trained, source, tmp_path):
    outcome = run(
        "preference", *TINY, "--packing=first_fit", "--batch_size=4", f"--data={source}", f"--workdir={tmp_path}"
    )
    assert outcome.status == 0, outcome.err
    assert "step 0: loss 0.693147" in outcome.out and "% of the places in rows hold a token" in outcome.out
    tests = [json.loads((d / "result.json").read_text())["test"] for d in (trained[0], tmp_path)]
    assert tests[0]["weight"] == tests[1]["weight"] and tests[1]["loss"] < math.log(2) - 0.001


@pytest.mark.slow
def test_goes_on_with_an_adapter_that_is_its_reference(trained, source, tmp_path):
    outcome = run("preference", *TINY, "--loss=ipo", f"--adapter={trained[0] / 'adapter'}", f"--data={source}",
                  "--dry_run", "--micro_batches=1", "--mesh=data:4,fsdp:2", f"--workdir={tmp_path}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "the reference is the adapter as it starts, for which" in outcome.out and "chosen_tokens" in outcome.out
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_an_adapter_is_adopted_as_it_was_saved(trained, base, data):
    from research.peft import adapter as adapters

    loaded = adapters.load(trained[0] / "adapter")
    fresh = started(base, data, loaded.meta["spec"], Objective("dpo", Options(), "initial_adapter"), loaded=loaded)
    stored = adapters.stored(fresh.method, fresh.state.variables(fresh.frozen), fresh.sites, fresh.mask)
    assert stored.keys() == loaded.leaves.keys() and all(np.array_equal(stored[k], x) for k, x in loaded.leaves.items())
    assert evaluated(fresh, data)["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--loss=dpp"], 2, ["loss", "dpo"]),
        (["--loss=ipo", "--label_smoothing=0.1"], 2, ["--label_smoothing", "ipo"]),
        (["--loss=simpo", "--reference=base"], 2, ["simpo", "no reference"]),
        (["--loss=kto", "--packing=first_fit"], 2, ["--packing", "kto"]),
        (["--beta=0"], 2, ["beta=0.0"]),
        (["--loss=robust", "--label_smoothing=0.5"], 2, ["label_smoothing=0.5", "below 0.5"]),
        (["--divergence=js", "--loss=hinge"], 2, ["--divergence", "hinge"]),
        (["--model=smoke-llama", "--data=dpo/em"], 3, ["dpo/em", "Did you mean 'dpo/en'?"]),
        (["--model=smoke-llama", "--data=missing.jsonl"], 3, ["missing.jsonl"]),
        (["--model=smoke"], 4, ["smoke is no language model"]),
        (["--adapter=nowhere"], 4, ["nowhere", "no adapter"]),
    ],
)
def test_bad_input_is_one_line(arguments, status, words, tmp_path):
    refused(run("preference", *arguments, f"--workdir={tmp_path}"), status, *words)


def test_virtual_tokens_that_leave_no_room_are_refused(source, tmp_path):
    outcome = run("preference", *TINY, "--peft=prompt:length=600", f"--data={source}", f"--workdir={tmp_path}")
    refused(outcome, 2, "600 virtual tokens", "positions")


def test_closed_forms_follow_the_options():
    rows = {"desirable": np.asarray([1, 1, 0, 0])}
    assert Objective("kto", Options(desirable=2.0), "base").at_start(rows) == pytest.approx(0.75)
    assert Objective("sppo_hard", Options(beta=0.1), "base").at_start({}) == pytest.approx(50)
    assert Objective("cdpo", Options(label_smoothing=0.1), "base").at_start({}) == pytest.approx(math.log(2))
    assert Objective("orpo", Options(), None).at_start({}) is None
