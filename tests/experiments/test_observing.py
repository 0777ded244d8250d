"""--track, --profile, --peak_tflops, --keep and --keep_best of a training script."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.shared import observing
from tests.experiments.script import refused, run

TINY = ["--model=smoke", "--data=smoke", "--steps=8", "--batch_size=16", "--max_length=16", "--peft=lora"]


@pytest.mark.slow
def test_what_is_asked_for_is_there(tmp_path: Path):
    outcome = run(
        "classify", *TINY, "--save_every=2", "--eval_every=2", "--keep=1", "--keep_best=2", "--track=tensorboard",
        "--profile=1", "--peak_tflops=1", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "MiB per device: base 0.1, trainable 0.0, optimiser 0.0, activations" in outcome.out
    assert "% of peak" in outcome.err and f"profile: {tmp_path / 'profile'}" in outcome.err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval/accuracy" in events.read_bytes() and b"perf/utilisation" in events.read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert not any(name.startswith("perf/") for row in rows for name in row)
    best = sorted(losses, key=losses.get)[:2]
    assert {int(f.name) for f in (tmp_path / "checkpoints").iterdir()} == {8, *best}
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["keep_best"] == 2


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    outcome = run("classify", *TINY, "--track=wandb", f"--workdir={tmp_path}")
    refused(outcome, 2, "wandb is not installed", "tensorboard")
    assert not (tmp_path / "config.json").exists()


def test_memory_is_what_each_class_holds():
    class Run:
        frozen, state = {"w": jnp.zeros((100, 10))}, type("S", (), {})

    Run.state.extra, Run.state.trainable = None, {"a": jnp.zeros((10, 10)), "k": jax.random.key(0)}
    Run.state.opt_state = (jnp.zeros((10, 10)), jnp.zeros((10, 10)), jnp.zeros((), jnp.int32))
    stats = type("M", (), {f"{n}_size_in_bytes": 6000 for n in ("argument", "output", "temp", "alias")})
    compiled = type("C", (), {"memory_analysis": lambda self: stats})()
    found = observing.memory(Run, compiled)
    assert found == {
        "base": 4000, "trainable": 400, "optimiser": 804, "activations and gradients": 12000 - 5204, "all": 12000,
    }  # fmt: skip
