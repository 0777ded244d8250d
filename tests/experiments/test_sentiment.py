"""`experiments.sentiment` in small: a table of all methods from one SFT policy; the same command goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import sentiment
from research.data import text
from tests.experiments.script import Outcome, refused, run

SHORT = ("--save_every=0",)
TINY = ("--model=smoke-llama", "--data=smoke", "--sft_steps=10", "--steps=4", "--batch_size=8", "--group=4", *SHORT)
TINY += ("--max_new=6", "--prompt_words=2", "--pool=8", "--eval_prompts=8", "--peft=lora:rank=2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[str]:
    """A reward model and a judge of the bundled sentences."""
    folder = tmp_path_factory.mktemp("parts")
    few = ("--model=smoke-llama", "--data=smoke", "--batch_size=16", "--max_length=16", *SHORT)
    made = run(
        "reward_model",
        *few,
        "--pairs=160",
        "--held_out=20",
        "--eval_every=0",
        "--steps=2",
        f"--workdir={folder / 'reward'}",
    )
    assert made.status == 0, made.err
    made = run(
        "classify", *few, "--steps=60", "--learning_rate=1e-2", "--eval_every=0", f"--workdir={folder / 'judge'}"
    )
    assert made.status == 0, made.err
    return [f"--{name}={folder / name / 'adapter'}" for name in ("reward", "judge")]


def table(parts: list[str], workdir: Path, *more: str) -> Outcome:
    return run("sentiment", *TINY, *parts, "--eval_every=2", f"--workdir={workdir}", *more)


@pytest.mark.slow
def test_one_table_of_all_methods_and_the_same_command_goes_on(parts: list[str], tmp_path: Path):
    first = table(parts, tmp_path, "--seeds=1")
    assert first.status == 0, first.err
    found = json.loads((tmp_path / "result.json").read_text())
    runs = {(r["method"], r["seed"]): r for r in found["runs"]}
    assert len(runs) == len(found["runs"]) == 1 + 5 + 5, "SFT, best of n, five methods"
    assert runs["sft", 0]["kl_sequence"] == 0 and runs["grpo", 0]["kl_sequence"] != 0
    best = [runs[f"best of {n}", 0]["reward"] for n in sentiment.SIZES]
    assert best == sorted(best) and best[0] < best[-1]
    for name in sentiment.METHODS[1:]:
        one = runs[name, 0]
        assert len(one["way"]) == 2 and one["way"][-1]["reward"] == pytest.approx(one["reward"], abs=1e-6)
        assert one["near"] == max(w["positive"] for w in one["way"])
    lines = [json.loads(line) for line in (tmp_path / "dpo-0" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(np.log(2), abs=1e-5), (
        "the policy is its reference"
    )
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    grpo = [r for r in rows if r["method"] == "grpo" and r["seed"] == 0]
    assert np.mean([r["positive"] > 0.5 for r in grpo]) == pytest.approx(runs["grpo", 0]["positive"])
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")

    more = table(parts, tmp_path, "--methods=grpo,kto", "--seeds=2")
    assert more.status == 0, more.err
    kept = {(r["method"], r["seed"]): r for r in json.loads((tmp_path / "result.json").read_text())["runs"]}
    for name in ("grpo", "kto"):
        assert kept[name, 0] == runs[name, 0], f"{name}: what is done is not done again"
        assert kept[name, 1]["kl_sequence"] != kept[name, 0]["kl_sequence"], f"{name}: seeds differ"
    refused(table(parts, tmp_path, "--methods=grpo", "--kl_loss=0.5"), 2, "holds a run", "kl_coef")


@pytest.mark.slow
def test_the_judge_knows_what_it_was_taught(parts: list[str]):
    judge = sentiment.load_judge(parts[1].partition("=")[2])
    train = text.load("smoke").train
    found = judge(train.texts)
    assert found.shape == (len(train),) and ((found > 0.5) == (train.labels == 1)).mean() > 0.9


@pytest.mark.slow
def test_parts_that_are_none(parts: list[str], tmp_path: Path):
    reward, judge = (part.partition("=")[2] for part in parts)
    where = f"--workdir={tmp_path}"
    refused(run("sentiment", *TINY, f"--reward={judge}", f"--judge={judge}", where), 4, "'classify', not 'reward'")
    refused(run("sentiment", *TINY, f"--reward={reward}", f"--judge={reward}", where), 4, "'reward', not 'classify'")
    dry = run("sentiment", *TINY, *parts, where, "--dry_run")
    assert dry.status == 0 and "prompt: " in dry.out and not list(tmp_path.glob("*/checkpoints"))


def test_bad_flags():
    refused(run("sentiment", "--methods=grop"), 2, "no method 'grop'", "Did you mean 'grpo'")
    refused(run("sentiment", "--batch_size=10", "--group=4"), 2, "batch_size=10", "group=4")
    refused(run("sentiment", "--reward=/nowhere"), 4, "/nowhere")
