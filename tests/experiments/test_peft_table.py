"""`experiments.peft_table --smoke`: the table, its files, and going on where it was."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from experiments.shared import cell, entries, table
from experiments.shared.entries import Entry
from experiments.shared.table import COLUMNS
from research.convert.load import load
from research.errors import DataError, FlagError, ModelError
from research.peft import registry
from tests.experiments.script import refused, run

METHODS = "--methods=lora;bitfit;prompt:length=3@1e-2"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("table")
    outcome = run("peft_table", "--smoke", METHODS, "--seeds=2", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir


def files(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder but the lock."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "LOCK"}


def test_writes_the_table_in_three_forms(made: Path):
    rows = list(csv.DictReader((made / "table.csv").open()))
    assert [r["method"] for r in rows] == ["lora", "bitfit", "prompt:length=3"]
    assert [int(r["trainable"]) for r in rows] == [2048, 640, 96]
    assert all(0 <= float(r["accuracy"]) <= 1 and float(r["step_mb"]) > 0 for r in rows)
    text = (made / "table.md").read_text()
    assert "Smoke test: the numbers mean nothing." in text and "| bitfit | 640 |" in text
    assert "| step MB (all seeds) |" in text
    assert (made / "table.png").read_bytes().startswith(b"\x89PNG")
    size = (made / "methods" / "lora" / "adapter-0").iterdir()
    assert float(rows[0]["adapter_kb"]) == pytest.approx(sum(f.stat().st_size for f in size) / 1024)


def test_finished_methods_are_not_trained_again(made: Path):
    before = {p: x for p, x in files(made).items() if p.name in ("result.json", "table.csv")}
    outcome = run("peft_table", "--smoke", METHODS, "--seeds=2", f"--workdir={made}")
    assert outcome.out.count("finished before") == 3
    assert len(before) == 4 and before.items() <= files(made).items()


@pytest.mark.slow
def test_seeds_of_one_program_equal_seeds_alone(made: Path, tmp_path: Path):
    run("peft_table", "--smoke", "--methods=lora", "--seeds=1", f"--workdir={tmp_path}")
    several, alone = (json.loads((d / "methods/lora/result.json").read_text())["row"] for d in (made, tmp_path))
    assert several["accuracies"][0] == alone["accuracies"][0]


@pytest.mark.slow
def test_a_retimed_row_says_so(made: Path, tmp_path: Path):
    shutil.copytree(made / "methods" / "bitfit", tmp_path / "methods" / "bitfit")
    outcome = run("peft_table", "--smoke", "--methods=bitfit", "--seeds=2", "--retime", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    again, before = (json.loads((d / "methods/bitfit/result.json").read_text()) for d in (tmp_path, made))
    assert again["retimed"] is True and "retimed" not in before
    assert again["row"]["accuracies"] == before["row"]["accuracies"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--steps=21", "steps=20, not 21"),
        ("--seeds=1", "seeds=2, not 1"),
        ("--tune=2", "tune=0, not 2"),
        ("--methods=ia3;lora@3e-3", "rate=0.002, not 0.003"),
    ],
)
def test_results_of_other_settings_are_never_touched(argument: str, words: str, made: Path):
    before = files(made)
    arguments = ["--smoke", METHODS, "--seeds=2", argument, f"--workdir={made}"]
    refused(run("peft_table", *arguments), 2, "methods/lora in", "holds a result", words, "give another --workdir")
    assert files(made) == before


@pytest.mark.slow
def test_a_begun_run_of_other_settings_is_never_touched(tmp_path: Path, monkeypatch):
    arguments = ["--smoke", "--methods=lora", "--seeds=1", f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr("experiments.shared.classification.predictions", broken)
        with pytest.raises(RuntimeError):
            run("peft_table", *arguments)
    before = files(tmp_path)
    assert any(path.name == "integrity.json" for path in before)
    refused(run("peft_table", *arguments, "--micro_batches=2"), 2, "holds a run begun", "micro_batches=1, not 2")
    assert files(tmp_path) == before
    assert run("peft_table", *arguments).status == 0


def broken(*_, **__):
    raise RuntimeError("stopped here")


@pytest.mark.slow
def test_a_result_is_written_before_its_plot(tmp_path: Path, monkeypatch):
    arguments = ["--smoke", "--methods=layernorm", "--seeds=1", f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr("research.train.plot.curve", broken)
        with pytest.raises(RuntimeError):
            run("peft_table", *arguments)
    assert "finished before" in run("peft_table", *arguments).out


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}", '{"identity": {}, "row": {"method": "lora"}}'])
def test_a_damaged_result_is_named(text: str, tmp_path: Path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match="result.json is damaged"):
        entries.read_result(path)


def test_what_is_no_number_is_a_dash():
    row = dict.fromkeys(COLUMNS, 1) | {"method": "lora", "step_ms": None}
    assert table.markdown([row]).splitlines()[-1].split("|")[7] == " - "


def test_specifications_never_share_a_folder():
    names = ["lora:targets=attn/(q|v)", "lora:targets=attn/[q|v]", "a" * 300, "a" * 299, "lora", "lora:rank=4"]
    folders = {Entry(name, name, 1e-3).folder for name in names}
    assert len(folders) == len(names) and "lora" in folders
    assert all("/" not in f and len(f) < 100 for f in folders)


def test_all_leaves_out_what_does_not_apply_and_a_name_is_an_error(capsys):
    base = load("smoke-llama")
    todo = entries.parse("all", small=True)
    assert [e.name for e in sorted(todo, key=lambda e: e.name)] == registry.names()
    kept = entries.applicable(todo, base, 16, skip=True)
    assert [e.name for e in todo if e not in kept] == ["bitfit", "cross_attention"]
    assert "bitfit is left out: bitfit: this model has no biases" in capsys.readouterr().out
    with pytest.raises(FlagError, match="no biases"):
        entries.applicable(entries.parse("lora,bitfit"), base, 16, skip=False)


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning_v2", "lora+prefix"])
def test_a_length_is_refused_before_anything_is_allocated(method: str):
    with pytest.raises(FlagError, match="1000000000 virtual tokens"):
        entries.applicable(entries.parse(f"lora;{method}:length=1000000000"), load("smoke"), 16, skip=False)


def test_tuning_knows_whose_scores_it_reads_and_that_divergence_is_worst(tmp_path: Path):
    tried = []

    def score(rate: float) -> float:
        tried.append(rate)
        if rate > 2e-3:
            raise ModelError("step 3 is not finite")
        return 0.5 + rate

    def chosen(steps: int) -> float:
        return cell.tuned(1e-3, 3, {"spec": "lora", "recipe": {"steps": steps}}, tmp_path, score)

    assert chosen(20) == chosen(20) == 1e-3
    assert tried == [3.3e-4, 1e-3, 3e-3]
    chosen(30)
    assert len(tried) == 6
    (tmp_path / "0.001.json").write_text("[]")
    with pytest.raises(DataError, match="0.001.json is damaged"):
        chosen(20)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/peft_table"),
        (["--preset=published"], "runs/peft_table-published"),
        (["--smoke"], "runs/peft_table-smoke"),
        (["--preset=published", "--smoke"], "runs/peft_table-smoke"),
    ],
)
def test_each_of_the_readmes_commands_has_its_own_folder(arguments: list[str], folder: str, monkeypatch):
    def lock(workdir: Path):
        raise FlagError(f"asked for {workdir}.")

    monkeypatch.setattr("research.train.lock.lock", lock)
    refused(run("peft_table", *arguments), 2, f"asked for {folder}.")


def test_a_workdir_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    refused(run("peft_table", "--smoke", f"--workdir={tmp_path / 'file'}"), 2, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods=lora,bitfti"], ["bitfti", "Did you mean 'bitfit'?"]),
        (["--methods=lora@fast"], ["'fast'", "learning rate"]),
        (["--methods=lora,lora"], ["twice"]),
        (["--methods=lora@nan"], ["'nan'", "learning rate"]),
        (["--methods=lora,ia3@0"], ["'0'", "learning rate"]),
        (["--methods=lora@-1e-3"], ["'-1e-3'", "learning rate"]),
        (["--methods=lora@"], ["learning rate"]),
        (["--methods=lora;lora:targets=attn/qq"], ["attn/qq", "Did you mean"]),
        (["--max_length=500"], ["max_length=500", "at most max_length=128"]),
        (["--model=minilm-l6"], ["--smoke", "--model"]),
        (["--data=smoke"], ["--smoke", "--data"]),
        (["--preset=quik"], ["quik"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str], tmp_path: Path):
    refused(run("peft_table", "--smoke", *arguments, f"--workdir={tmp_path}"), 2, *words)
