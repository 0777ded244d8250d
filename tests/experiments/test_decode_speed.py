"""`experiments.decode_speed`: its table, the turns with a reference, and what it refuses."""

import json
from pathlib import Path

import jax
import pytest

from tests.experiments.script import refused, run
from tests.experiments.test_time_step import python

TINY = ("--model=smoke-llama", "--batch_sizes=1,2", "--prompt=3", "--tokens=4", "--rounds=2")


@pytest.fixture(autouse=True)
def compilation_cache():
    """The script turns it off for the process, which goes on here."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.slow
def test_the_table_and_the_turns_with_a_reference(tmp_path: Path):
    asked = tmp_path / "asked"
    body = f"echo $@ >> {asked}; echo torch says hello; echo 1 10.0 100.0; echo 2 20.0 200.0"
    outcome = run("decode_speed", *TINY, python(tmp_path, body), f"--workdir={tmp_path}/out")
    assert outcome.status == 0, outcome.err
    calls = asked.read_text().splitlines()
    assert len(calls) == 2 and all("hf_decode" in c and "--batch_sizes=1,2 --prompt=3 --tokens=4" in c for c in calls)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "3 + 4 tokens" in found["measured"]
    for size, row in enumerate(found["rows"], 1):
        assert row["rows"] == size and row["torch tokens/s"] == f"{10 * size}.0"
        assert float(row["ratio"]) == pytest.approx(float(row["tokens/s"]) / (10 * size), rel=1e-2)
        assert float(row["first token ms"]) > 0 and float(row["compile s"]) >= 0
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 6


def test_bad_input(tmp_path: Path):
    refused(run("decode_speed", "--batch_sizes=1,x"), 2, "--batch_sizes=1,x", "whole numbers")
    refused(run("decode_speed", "--quantise=nf4", python(tmp_path, "exit 1")), 2, "--quantise")
    refused(run("decode_speed", "--model=smoke-llama", "--prompt=9999"), 2, "positions")
    refused(run("hf_decode"), 2, "--model")
