"""`experiments.randomwalks` in small: one table of all methods, which learn, and the same command goes on."""

import json
from pathlib import Path

import pytest

from tests.experiments.script import refused, run

TINY = [
    "--methods=best_of_n,grpo,dpo,kto",
    "--layers=1",
    "--sft_steps=60",
    "--steps=8",
    "--batch_size=80",
    "--group=8",
    "--samples=16",
    "--learning_rate=2e-3",
    "--eval_every=0",
    "--save_every=0",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("walks")
    outcome = run("randomwalks", *TINY, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert "shortest paths" in outcome.out
    return workdir


@pytest.mark.slow
def test_one_table_between_the_floor_and_the_optimum(table: Path):
    found = json.loads((table / "result.json").read_text())
    rows = found["rows"]
    assert list(rows) == ["sft", "best of 2", "best of 4", "best of 8", "best of 16", "grpo", "dpo", "kto"]
    assert found["bounds"]["uniform tokens"] < 0.01 and 0.3 < found["bounds"]["imitation, exactly"] < 0.4
    assert all(0 <= row["optimality"] <= 1 for row in rows.values())
    best = [row["optimality"] for name, row in rows.items() if name.startswith(("sft", "best"))]
    assert best == sorted(best), "more samples are never worse"
    assert rows["sft"]["kl"] == 0 and rows["grpo"]["kl"] > 0.01
    for name in ("results.md", "config.json"):
        assert (table / name).exists()
    assert (table / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_learning_from_rewards_beats_imitation(table: Path):
    rows = json.loads((table / "result.json").read_text())["rows"]
    assert rows["grpo"]["optimality"] > rows["sft"]["optimality"] + 3 * rows["sft"]["error"]
    losses = [json.loads(line)["loss"] for line in (table / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5), "ln 2 where the policy is its reference"
    assert losses[-1] < 0.5


@pytest.mark.slow
def test_the_same_command_gives_the_same_rows(table: Path):
    before = json.loads((table / "result.json").read_text())["rows"]
    outcome = run("randomwalks", *TINY, "--methods=best_of_n,grpo", f"--workdir={table}")
    assert outcome.status == 0, outcome.err
    rows = json.loads((table / "result.json").read_text())["rows"]
    assert rows == {name: before[name] for name in rows} and "grpo" in rows
    refused(run("randomwalks", *TINY, "--seed=1", f"--workdir={table}"), 2, "seed=0, not 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods=gpro"], ["gpro", "Did you mean 'grpo'?"]),
        (["--width=40"], ["width=40", "32"]),
        (["--samples=30"], ["samples=30", "group=16"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str], tmp_path: Path):
    refused(run("randomwalks", *arguments, f"--workdir={tmp_path}"), 2, *words)
