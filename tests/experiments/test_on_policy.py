"""`experiments.grpo` and `experiments.ppo` on a policy of characters and on the tiny model: what they leave, resuming,
the reference, the price of KL, refusals.
"""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared import characters, on_policy
from experiments.shared.training import Recipe
from research.errors import DataError, FlagError
from research.train import loop
from research.train.checkpoint import Checkpointer
from tests import tiny
from tests.experiments.script import refused, run

HERE = "tests.experiments.test_on_policy"
SMALL = ["--prompts=4", "--eval_prompts=8", "--save_every=3", "--eval_every=4"]
SORT = ["--task=sort", "--sft_steps=2", "--group=2", "--batch_size=8", "--steps=4", *SMALL]
MODEL = [
    "--model=smoke-llama",
    "--data=smoke",
    "--prompt_words=2",
    "--max_new=4",
    "--group=2",
    "--batch_size=8",
    *SMALL,
]


def few(prompts: list[str], completions: list[str]) -> list[float | None]:
    """Likes few different characters; has no opinion of an empty text."""
    return [-float(len(set(c))) if c else None for c in completions]


def short(prompts: list[str], completions: list[str]) -> list[float]:
    return [-float(len(c)) for c in completions]


def nothing(prompts: list[str], completions: list[str]) -> list[float]:
    return [math.nan] * len(completions)


RECIPE = Recipe(3e-3, steps=8, batch_size=4, schedule="constant", warmup=0.0)
GRPO = on_policy.Settings("grpo", prompts=4, group=2, epochs=2, max_new=4, kl_coef=0.01)


@functools.cache
def base():
    return characters.policy("tiny", "abc=", 8, width=16, layers=1)


@functools.cache
def task() -> on_policy.Task:
    prompts = on_policy.encode(base(), ["a=", "ab=", "c=", "bca=", "b="], GRPO.max_new)
    return on_policy.Task(prompts, prompts, {"few": few}, {}, {})


@functools.cache
def learner(spec: str = "lora:targets=all", settings: on_policy.Settings = GRPO) -> on_policy.Learner:
    return on_policy.start(base(), spec, task(), settings, RECIPE)


@functools.cache
def stepper():
    return jax.jit(learner().run.step, donate_argnums=(0,))


def fit(folder: Path, batch=None, steps: int = 8, **options) -> loop.Result:
    one = learner()
    state = jax.tree.map(lambda x: x.copy(), one.run.state)
    return loop.fit(
        stepper(), state, one.run.frozen, batch or one.batch, steps=steps, prepare=one.prepare,
        checkpointer=Checkpointer(folder), save_every=1, **options,
    )  # fmt: skip


class Died(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> loop.Result:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [4, 6])
def test_resumed_is_never_stopped_between_two_rollouts_and_within_one(dies_at: int, whole: loop.Result, tmp_path: Path):
    def dying(step: int) -> dict:
        if step == dies_at:
            raise Died
        return learner().batch(step)

    with pytest.raises(Died):
        fit(tmp_path, dying)
    drawn = []
    resumed = fit(tmp_path, lambda step: drawn.append(step) or learner().batch(step))
    assert drawn[0] > 0, "went on, and did not start over"
    plain = lambda s: (s.trainable, s.extra, s.opt_state)  # noqa: E731
    assert tiny.same(plain(resumed.state), plain(whole.state))


@pytest.mark.slow
def test_a_first_step_has_ratio_one_and_the_policy_moves_away(whole: loop.Result):
    rows = {row["step"]: row for row in whole.history}
    for step in (1, 5):
        assert rows[step]["ratio_mean"] == 1 and rows[step]["clip_fraction"] == 0
    assert rows[4]["ratio_mean"] != 1 and all(row["sampler_gap"] < 1e-4 for row in rows.values())
    assert rows[1]["kl_sequence"] == 0 and rows[5]["kl_sequence"] != 0


@pytest.mark.slow
def test_the_reference_is_the_bases_own_buffers_and_stays_the_base(whole: loop.Result):
    known, copied = on_policy.reference(base(), learner().run)
    own = {id(x) for x in jax.tree.leaves(learner().run.frozen["params"])}
    assert copied == 0 and all(id(x) in own for x in jax.tree.leaves(known["params"]))
    assert tiny.same(known["params"], base().params)
    copies = on_policy.reference(base(), learner("full").run)
    assert copies[1] == len(jax.tree.leaves(base().params)) and tiny.same(copies[0]["params"], base().params)


@pytest.mark.slow
def test_the_price_of_kl_follows_its_target():
    settings = on_policy.Settings("ppo", prompts=4, group=2, max_new=4, kl_coef=0.2, kl_target=1e-3, kl_horizon=80)
    one = learner("lora:targets=all", settings)
    coef = lambda state: float(state.extra["rollout"]["stats"]["kl_coef"])  # noqa: E731
    first = one.prepare(0, one.run.state)
    assert coef(first) == pytest.approx(0.2)
    second = one.prepare(settings.every(RECIPE), first)  # a KL of 0 is under the target: cheaper by the most
    assert coef(second) == pytest.approx(0.2 * (1 - 0.2 * 8 / 80))
    assert one.prepare(1, first) is first


def test_rollouts_that_do_not_fit_are_refused():
    with pytest.raises(FlagError, match="does not divide the 8 rows"):
        GRPO.every(Recipe(1e-3, batch_size=3))
    with pytest.raises(FlagError, match="at least 2"):
        on_policy.Settings("rloo", group=1).every(Recipe(1e-3, batch_size=16))
    with pytest.raises(FlagError, match="fixed kl_coef"):
        _ = on_policy.Settings("grpo", kl_target=6.0).controller
    assert GRPO.every(RECIPE) == 4 and on_policy.Settings("dr_grpo", max_new=7).formula.length == 7


def test_prompts_without_room_are_counted_or_refused(capsys):
    found = on_policy.encode(base(), ["a=", "abcab="], 4)
    assert found.texts == ("a=",) and "1 of 2 prompts are left out" in capsys.readouterr().out
    assert np.array_equal(on_policy.encode(base(), ["a=", "abc="], 4).mask, [[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(DataError, match="leaves room: at most 4 tokens"):
        on_policy.encode(base(), ["abcab="], 4)


def test_tasks_have_their_answers():
    for name, prompt, answer in (("arithmetic", "37+58=", "95"), ("sort", "dbcab=", "abbcd")):
        known = characters.task(name)
        assert known.answer(prompt) == answer and characters.right(known.answer)([prompt], [answer]) == [1]
        assert set("".join(known.prompts)) <= set(known.alphabet)
        assert max(len(known.answer(p)) for p in known.prompts) < known.max_new, "the end of text needs room"
        learn, held = characters.split(known.prompts)
        assert not set(learn) & set(held) and 0.05 < len(held) / len(known.prompts) < 0.15
    reads = base().tokenizer
    rows = characters.rows(reads, ["ab=", "c="], ["ba", "c"])
    assert reads.decode(rows["tokens"][0][rows["loss_mask"][0] > 0]) == "ba<eos>" and rows["loss_mask"][1].sum() == 2


@pytest.fixture(scope="module")
def sorted_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("grpo")
    outcome = run("grpo", *SORT, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert "live base buffers: 2; " in outcome.out and "leaves train and are kept a second time" in outcome.out
    return workdir


@pytest.mark.slow
def test_leaves_metrics_plots_checkpoint_and_adapter(sorted_run: Path):
    rows = [json.loads(line) for line in (sorted_run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for name in ("reward", "reward_std", "kl", "entropy", "clip_fraction", "completion_length", "kl_sequence"):
        assert all(name in row for row in steps), name
    assert "eval/reward" in rows[-1]
    for png in ("curve.png", "frontier.png"):
        assert (sorted_run / png).read_bytes().startswith(b"\x89PNG")
    assert (sorted_run / "adapter" / "adapter.json").exists() and (sorted_run / "checkpoints" / "4").is_dir()
    assert {"before", "after"} <= set(json.loads((sorted_run / "result.json").read_text()))


@pytest.mark.slow
def test_the_same_command_changes_nothing_of_a_finished_run(sorted_run: Path):
    before = load_file(sorted_run / "adapter" / "adapter.safetensors")
    outcome = run("grpo", *SORT, f"--workdir={sorted_run}")
    assert outcome.status == 0, outcome.err
    after = load_file(sorted_run / "adapter" / "adapter.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_ppo_tunes_a_language_model_with_a_reward_function(tmp_path: Path):
    arguments = [*MODEL, "--steps=3", "--kl_target=1", "--peft=lora:targets=all", f"--reward=0.5*{HERE}:few",
                 f"--reward={HERE}:short"]  # fmt: skip
    outcome = run("ppo", *arguments, f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    assert "live base buffers: 1; the reference is the base with the adapters off: no copy" in outcome.out
    assert json.loads((tmp_path / "result.json").read_text())["live_base_buffers"] == 1
    leaves = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert np.any(leaves["head/kernel"]) and not any(name.startswith("rollout") for name in leaves)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {"value/loss", "explained_variance", "kl_coef", "reward_tests_experiments_test_on_policy_few"}
    assert all(names <= set(row) for row in rows if "loss" in row)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    worth = [0.5 * (few([], [s["completion"]])[0] or 0) + short([], [s["completion"]])[0] for s in samples]
    assert samples and worth == pytest.approx([s["reward"] for s in samples])


@pytest.mark.slow
def test_a_mesh_draws_and_learns_what_one_device_does(sorted_run: Path, tmp_path: Path):
    outcome = run("grpo", *SORT, "--mesh=data:4,fsdp:2", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    one, eight = (load_file(d / "adapter" / "adapter.safetensors") for d in (sorted_run, tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path: Path):
    outcome = run("ppo", *MODEL, f"--reward={HERE}:few", "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    for words in ("optimiser", "rows", "first", "prompt: '"):
        assert words in outcome.out, words
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_reward_of_nothing_but_nan_is_one_line(tmp_path: Path):
    outcome = run("grpo", *MODEL, f"--reward={HERE}:nothing", f"--workdir={tmp_path}")
    refused(outcome, 3, "no reward function gave a number for any of")


@pytest.mark.parametrize(
    ("script", "arguments", "status", "words"),
    [
        ("grpo", ["--task=sorts"], 2, ["sorts", "Did you mean 'sort'?"]),
        ("grpo", [], 2, ["--task", "--model"]),
        ("ppo", ["--task=sort", "--batch_size=100"], 2, ["batch_size=100", "256 rows"]),
        ("grpo", ["--model=smoke-llama"], 2, ["--reward"]),
        ("grpo", ["--model=smoke-llama", "--reward=x*y"], 2, ["'x' is no number"]),
        ("grpo", ["--model=smoke-llama", f"--reward={HERE}:fewer"], 2, ["fewer"]),
        ("grpo", ["--model=smoke-llama", "--reward=nowhere"], 4, ["nowhere", "no adapter"]),
        ("grpo", ["--model=smoke", f"--reward={HERE}:few"], 4, ["no language model"]),
        ("grpo", ["--model=smoke-llama", f"--reward={HERE}:few", "--data=missing.txt"], 3, ["missing.txt"]),
        ("grpo", ["--task=sort", "--variant=gpo"], 2, ["variant"]),
    ],
)
def test_bad_input_is_one_line(script: str, arguments: list[str], status: int, words: list[str], tmp_path: Path):
    refused(run(script, *arguments, f"--workdir={tmp_path}"), status, *words)


def test_every_variant_is_offered():
    from experiments import grpo
    from research.tasks.policy import VARIANTS

    assert {*grpo.VARIANTS, "ppo"} == set(VARIANTS)
