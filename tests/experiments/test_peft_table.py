"""`experiments.peft_table --smoke`: the table, its files, and going on where it was."""

import csv
import json
from pathlib import Path

import pytest

from tests.experiments.script import refused, run


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("table")
    outcome = run(
        "peft_table", "--smoke", "--methods=lora;bitfit;prompt:length=3@1e-2", "--seeds=2", f"--workdir={workdir}"
    )
    assert outcome.status == 0, outcome.err
    return workdir


def test_writes_the_table_in_three_forms(table: Path):
    rows = list(csv.DictReader((table / "table.csv").open()))
    assert [r["method"] for r in rows] == ["lora", "bitfit", "prompt:length=3"]
    assert [int(r["trainable"]) for r in rows] == [2048, 640, 96]
    assert all(0 <= float(r["accuracy"]) <= 1 and float(r["step_mb"]) > 0 for r in rows)
    text = (table / "table.md").read_text()
    assert "Smoke test: the numbers mean nothing." in text and "| bitfit | 640 |" in text
    assert (table / "table.png").read_bytes().startswith(b"\x89PNG")
    size = (table / "methods" / "lora" / "adapter-0").iterdir()
    assert float(rows[0]["adapter_kb"]) == pytest.approx(sum(f.stat().st_size for f in size) / 1024)


def test_finished_methods_are_not_trained_again(table: Path):
    results = {p: p.stat().st_mtime_ns for p in table.glob("methods/*/result.json")}
    before = (table / "table.csv").read_text()
    outcome = run(
        "peft_table", "--smoke", "--methods=lora;bitfit;prompt:length=3@1e-2", "--seeds=2", f"--workdir={table}"
    )
    assert outcome.out.count("finished before") == 3
    assert results == {p: p.stat().st_mtime_ns for p in table.glob("methods/*/result.json")}
    assert (table / "table.csv").read_text() == before


def test_seeds_of_one_program_equal_seeds_alone(table: Path, tmp_path: Path):
    run("peft_table", "--smoke", "--methods=lora", "--seeds=1", f"--workdir={tmp_path}")
    several, alone = (json.loads((d / "methods/lora/result.json").read_text())["row"] for d in (table, tmp_path))
    assert several["accuracies"][0] == alone["accuracies"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods=lora,bitfti"], ["bitfti", "Did you mean 'bitfit'?"]),
        (["--methods=lora@fast"], ["'fast'", "learning rate"]),
        (["--methods=lora,lora"], ["twice"]),
        (["--preset=quik"], ["quik"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str], tmp_path: Path):
    refused(run("peft_table", "--smoke", *arguments, f"--workdir={tmp_path}"), 2, *words)
