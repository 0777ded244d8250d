"""`experiments.classify` and `experiments.merge` on the tiny model: train, resume, evaluate, predict, merge, refuse."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.shared import training
from research.train.lock import lock
from tests.experiments.script import refused, run

TINY = [
    "--model=smoke",
    "--data=smoke",
    "--steps=8",
    "--batch_size=16",
    "--max_length=16",
    "--save_every=4",
    "--eval_every=4",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("classify")
    outcome = run("classify", *TINY, "--peft=lora", "--learning_rate=1e-2", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir


def test_writes_config_metrics_plot_checkpoint_and_adapter(trained: Path):
    config = json.loads((trained / "config.json").read_text())
    assert config["flags"]["peft"] == "lora" and config["versions"]["jax"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in rows if "eval/accuracy" in r] == [4, 8]
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "checkpoints" / "8").is_dir()
    assert json.loads((trained / "adapter" / "adapter.json").read_text())["classes"] == ["negative", "positive"]


def test_the_adapter_evaluates_to_what_training_ended_with(trained: Path):
    result = json.loads((trained / "result.json").read_text())["test"]
    out = run("classify", f"--adapter={trained / 'adapter'}", "--data=smoke").out
    assert f"test accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}" in out


def test_predicts_a_line_at_a_time(trained: Path):
    lines = ["the film was good", "a dull, empty story"]
    outcome = run("classify", f"--adapter={trained / 'adapter'}", "--mode=predict", stdin="\n".join(lines) + "\n")
    found = [json.loads(line) for line in outcome.out.splitlines()]
    assert [f["text"] for f in found] == lines
    assert all(f["label"] in ("negative", "positive") and 0.5 <= f["probability"] <= 1 for f in found)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_ends_with_the_same_adapter(trained: Path, tmp_path: Path):
    command = [sys.executable, "-m", "experiments.classify", *TINY, "--peft=lora", "--learning_rate=1e-2"]
    command += ["--save_every=0", f"--workdir={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    if process.returncode != 0:  # it was quicker than the signal where it is 0
        assert process.returncode == 143, err
        assert "SIGTERM" in err and "Traceback" not in err
        assert not (tmp_path / "adapter").exists()
    again = run("classify", *TINY, "--save_every=0", "--peft=lora", "--learning_rate=1e-2", f"--workdir={tmp_path}")
    assert again.status == 0, again.err
    one, two = (load_file(d / "adapter" / "adapter.safetensors") for d in (trained, tmp_path))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_another_recipe_in_the_same_folder_is_refused(trained: Path):
    before = (trained / "config.json").read_bytes()
    outcome = run("classify", *TINY, "--peft=lora", "--learning_rate=2e-2", f"--workdir={trained}")
    refused(outcome, 2, "holds a run", "learning_rate=0.01, not 0.02", "--workdir")
    assert (trained / "config.json").read_bytes() == before


def test_a_folder_in_use_keeps_its_config(trained: Path):
    before = (trained / "config.json").read_bytes()
    with lock(trained):
        outcome = run("classify", *TINY, "--peft=lora", "--learning_rate=1e-2", f"--workdir={trained}")
    refused(outcome, 2, "in use")
    assert (trained / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("stdin", "number", "fault"),
    [("good\nbad\n\nfine\n", 3, "empty line"), (b"good\nbad\n\xff\xfe\n", 3, "not UTF-8"), ("", 0, "no line on stdin")],
)
def test_what_came_before_a_bad_line_is_answered(stdin, number: int, fault: str, trained: Path):
    outcome = run("classify", f"--adapter={trained / 'adapter'}", "--mode=predict", stdin=stdin)
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == (["good", "bad"] if number else [])
    refused(outcome, 3, fault, *([f"stdin:{number}"] if number else []))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 4000}, "max_length=4000"),
        ({"max_length": "48"}, "'max_length'"),
        ({"classes": "negative"}, "'classes'"),
        ({"classes": ["a", "b", "c"]}, "head/bias is (2,), expected (3,)"),
        ({"spec": "prompt:length=1000000000"}, "does not fit"),
    ],
)
def test_an_edited_adapter_is_refused(changes: dict, words: str, trained: Path, tmp_path: Path):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    meta = tmp_path / "adapter" / "adapter.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))
    outcome = run("classify", f"--adapter={tmp_path / 'adapter'}", "--data=smoke")
    refused(outcome, 2 if "max_length=" in words else 4, words)


def test_a_model_without_a_tokenizer_is_refused(monkeypatch, tmp_path: Path):
    real = training.load
    monkeypatch.setattr(training, "load", lambda name, **kw: dataclasses.replace(real(name, **kw), tokenizer=None))
    refused(run("classify", *TINY, f"--workdir={tmp_path}"), 4, "smoke comes without a tokenizer")


def test_merges_into_weights_that_predict_the_same(trained: Path, tmp_path: Path):
    outcome = run("merge", f"--adapter={trained / 'adapter'}", f"--output={tmp_path / 'merged'}")
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    head = load_file(trained / "adapter" / "adapter.safetensors")["head/kernel"]
    assert np.array_equal(weights["classifier.weight"], head.T)


def test_what_is_no_change_of_weights_is_not_merged(tmp_path: Path):
    run("classify", *TINY, "--peft=prompt:length=2", f"--workdir={tmp_path / 'run'}")
    outcome = run("merge", f"--adapter={tmp_path / 'run' / 'adapter'}", f"--output={tmp_path / 'out'}")
    refused(outcome, 4, "VirtualTokens", "can't be merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--adapter=nowhere"], 4, ["nowhere", "no adapter"]),
        (["--mode=predict"], 2, ["--adapter"]),
        (["--model=smoke", "--data=vader/movies"], 3, ["vader/movies", "Did you mean 'vader/movie'?"]),
        (["--model=smoke", "--data=missing.jsonl"], 3, ["missing.jsonl"]),
        (["--model=minilm-l7"], 4, ["minilm-l7", "Did you mean 'minilm-l6'?"]),
        ([*TINY, "--optimizer=adamv"], 2, ["adamv", "Did you mean"]),
        ([*TINY, "--batch_size=4000"], 2, ["4000"]),
        ([*TINY, "--micro_batches=5"], 2, ["micro_batches"]),
        ([*TINY, "--peft=prompt:length=600"], 2, ["virtual tokens", "positions"]),
        ([*TINY, "--peft=prompt:length=1000000000"], 2, ["1000000000 virtual tokens", "positions"]),
        ([*TINY, "--max_length=1000000000"], 2, ["max_length=1000000000", "at most max_length=128"]),
        (["--steps=0"], 2, ["steps"]),
        (["--adapter="], 2, ["--adapter is empty"]),
        (["--seed=-1"], 2, ["seed"]),
        (["--seed=2147483648"], 2, ["seed"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], tmp_path: Path):
    refused(run("classify", *arguments, f"--workdir={tmp_path}"), status, *words)


def test_a_broken_row_is_named_by_its_line(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "pos"}\n{"text": "bad", "label": \n')
    refused(run("classify", "--model=smoke", f"--data={rows}", f"--workdir={tmp_path / 'w'}"), 3, f"{rows}:2")


def test_a_damaged_adapter_and_another_base_are_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "adapter", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    refused(run("classify", f"--adapter={tmp_path / 'cut'}", "--data=smoke"), 4, "damaged")
    shutil.copytree(trained / "adapter", tmp_path / "other")
    meta = tmp_path / "other" / "adapter.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"base": {"name": "smoke", "fingerprint": "0" * 64}}))
    refused(run("classify", f"--adapter={tmp_path / 'other'}", "--data=smoke"), 4, "trained on base", "000000000000")


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(tmp_path: Path):
    outcome = run("classify", *TINY, "--peft=lora", "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    for words in ("base", "optimiser", "activations and gradients", "tokens", "1x16x16", "label '"):
        assert words in outcome.out, words
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_mesh_of_all_devices_ends_where_one_device_does(trained: Path, tmp_path: Path):
    outcome = run("classify", *TINY, "--peft=lora", "--learning_rate=1e-2", "--mesh=data:2,fsdp:2,tensor:2",
                  f"--workdir={tmp_path}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    one, eight = (
        [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        for folder in (trained, tmp_path)
    )
    np.testing.assert_allclose(eight, one, atol=1e-5)
    one, eight = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (trained, tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_trains_on_a_quantised_base_and_the_adapter_fits_the_float_one(kind: str, tmp_path: Path):
    outcome = run("classify", *TINY, f"--quantise={kind}", "--peft=lora", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    outcome = run("classify", f"--adapter={tmp_path / 'adapter'}", "--data=smoke")
    assert outcome.status == 0, outcome.err


def test_a_mesh_that_does_not_fit_is_refused(tmp_path: Path):
    refused(run("classify", *TINY, "--mesh=data:3", f"--workdir={tmp_path}"), 2, "has 3 places for 8 devices")
    refused(run("classify", *TINY, "--mesh=date:8", f"--workdir={tmp_path}"), 2, "Did you mean 'data'?")
