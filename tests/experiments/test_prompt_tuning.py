"""`experiments.prompt_tuning` on the tiny decoder: the guide's example, whole, and the table of starts and lengths."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared import language, replies
from tests.experiments.script import refused, run
from tests.experiments.test_sft import recipe, write_talks

TINY = [
    "--model=smoke-llama",
    "--steps=4",
    "--batch_size=8",
    "--max_length=32",
    "--max_new=4",
    "--save_every=2",
    "--eval_every=4",
    "--text=the old piano left a warm memory",
    "--topics=museum|garden",
    "--length=3",
    "--learning_rate=0.1",
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    return write_talks(tmp_path_factory.mktemp("talks") / "talks.jsonl")


@pytest.mark.slow
def test_the_prompt_starts_from_the_text_trains_and_answers_in_generate(talks: Path, tmp_path: Path):
    outcome = run("prompt_tuning", *TINY, f"--data={talks}", "--ask=the museum", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["trainable"] == 3 * 32 and result["adapter_bytes"] < 5000
    table = load_file(tmp_path / "adapter" / "adapter.safetensors")["peft/embed/prompt/prompt/table"]
    base = replies.load_model("smoke-llama")
    embedding = np.asarray(base.params["embed"]["tokens"]["embedding"])
    ids = base.tokenizer("the old piano", add_special_tokens=False)["input_ids"]
    moved = np.abs(table - embedding[ids]).max()
    assert 0 < moved < 4 * 0.1 + 1e-6  # Adam moves nothing further than the rate a step
    command = next(line for line in outcome.out.splitlines() if "experiments.generate" in line)
    again = run("generate", *shlex.split(command)[3:], "--max_new=4")
    assert again.status == 0, again.err
    assert again.out.strip() == result["samples"][0]["after"]


@pytest.mark.slow
def test_a_table_goes_on_row_by_row(talks: Path, tmp_path: Path):
    command = ["prompt_tuning", *TINY, "--mode=table", f"--data={talks}", f"--workdir={tmp_path}", "--lengths=3"]
    first = run(*command, "--starts=labels", "--starts=text")
    assert first.status == 0, first.err
    rows = list(csv.DictReader((tmp_path / "table" / "table.csv").open()))
    assert [(r["start"], r["tokens"]) for r in rows] == [("no prompt", "0"), ("labels", "3"), ("text", "3")]
    for row in rows[1:]:
        result = json.loads((tmp_path / "table" / f"{row['start']}-3" / "result.json").read_text())
        assert float(row["after"]) == result["after"]["loss"] and float(row["before"]) == result["before"]["loss"]
    assert len({row["before"] for row in rows}) == 3, "each start is another"
    second = run(*command, "--starts=labels", "--lengths=2")
    assert second.out.count("finished before") == 2 and second.err.count("step 4/4") == 1
    shown = (tmp_path / "table" / "table.md").read_text()
    assert "| no prompt" in shown and f"{float(rows[1]['after']):.4f}" in shown and shown.count("| text") == 2
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")
    refused(run(*command, "--seed=1"), 2, "seed=0, not 1")


@pytest.mark.slow
def test_a_text_start_repeats_the_text_s_embeddings(talks: Path):
    base = replies.load_model("smoke-llama")
    data = language.load_data(str(talks), replies.chat_of(base, "plain/zh"), recipe())
    run = language.start(base, "prompt:length=5,start=text,text=the museum", data, recipe(), 0)
    table = run.state.trainable["peft"]["embed"]["prompt"]["prompt"].table
    ids = base.tokenizer("the museum the museum the", add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(table, base.params["embed"]["tokens"]["embedding"][np.asarray(ids)])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--start=texts"], 2, ["texts"]),
        (["--length=0"], 2, ["length"]),
        (["--start=labels", "--length=1"], 2, ["no token for each of the 2 labels"]),
        (["--text= "], 2, ["start=text has no text"]),
        (["--length=300"], 2, ["300 virtual tokens"]),
        (["--mode=table", "--dry_run"], 2, ["--dry_run"]),
        (["--mode=table", "--lengths=300"], 2, ["300 virtual tokens"]),
        (["--temperature=-1"], 2, ["temperature=-1"]),
        (["--model=smoke"], 4, ["no language model"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], talks: Path, tmp_path: Path):
    refused(run("prompt_tuning", *TINY, f"--data={talks}", *arguments, f"--workdir={tmp_path}"), status, *words)
    assert not list(tmp_path.glob("**/config.json"))
