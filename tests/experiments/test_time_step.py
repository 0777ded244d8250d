"""`experiments.time_step`: its last line, the ratio of several seeds, and the turns with a reference."""

import stat
from pathlib import Path

import pytest

from research.convert.load import load
from tests.experiments.script import refused, run

TINY = ["--model=smoke", "--batch_size=2", "--max_length=8", "--steps=2"]


def last(out: str) -> float:
    name, _, value = out.splitlines()[-1].partition("=")
    assert name == "seconds_per_step"
    return float(value)


def test_the_last_line_is_the_time_of_a_step():
    outcome = run("time_step", *TINY)
    assert outcome.status == 0, outcome.err
    assert 0 < last(outcome.out) < 10 and "lora, 1 seed(s), 2 rows of 8 tokens" in outcome.out


@pytest.mark.slow
def test_several_seeds_are_set_beside_as_many_runs():
    out = run("time_step", *TINY, "--seeds=2", "--peft=ia3").out
    ratio = float(out.splitlines()[-2].split()[-1])
    alone = float(out.split("one seed alone ")[1].split()[0])
    assert ratio == pytest.approx(last(out) / (2 * alone), rel=0.5)  # of figures with four decimals


def python(folder: Path, body: str) -> str:
    """A program in the place of another Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"--reference_python={path}"


@pytest.mark.slow
def test_the_reference_runs_by_turns(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("research.convert.load.load", lambda name, **options: load("smoke", **options))
    asked = tmp_path / "asked"
    body = f"echo $@ >> {asked}; echo torch says hello; echo seconds_per_step=2.0"
    outcome = run("time_step", "--steps=1", python(tmp_path, body))
    assert outcome.status == 0, outcome.err
    calls = asked.read_text().splitlines()
    assert len(calls) == 3 and all(c.startswith("-m experiments.hf_reference --time_only --threads=") for c in calls)
    ratio = float(outcome.out.splitlines()[-2].removeprefix("ratio to the reference "))
    assert ratio == pytest.approx(last(outcome.out) / 2.0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo 'error: torch is not installed here' >&2; exit 2", "hf_reference: torch is not installed here"),
        ("echo hello", "no time"),
        ("true", "printed nothing"),
    ],
)
def test_a_reference_that_does_not_run_is_one_line(body: str, words: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("research.convert.load.load", lambda name, **options: load("smoke", **options))
    refused(run("time_step", "--steps=1", python(tmp_path, body)), 2, words)


def test_a_reference_has_one_size(tmp_path: Path):
    refused(run("time_step", "--batch_size=2", python(tmp_path, "exit 1")), 2, "--reference_python", "--batch_size")
    refused(run("time_step", "--peft=prompt:length=600", "--model=smoke"), 2, "virtual tokens")
