"""The bookkeeping of the reference, which needs no torch: which run comes next, what is summed up, what is resumed."""

import csv
import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from experiments import hf_reference as reference
from experiments.shared import hf_runs
from research.errors import DataError, FlagError
from research.train.lock import lock

SETTINGS = {"steps": 300, "threads": 2, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}


def made(rate: float, seed: int, validation: float, test: float = 0.5, method: str = "lora") -> dict:
    sizes = {"trainable": 73728, "head": 770, "seconds_per_step": 0.7, "seconds": 9.0}
    return {"method": method, "learning_rate": rate, "seed": seed, "validation": validation, "test": test, **sizes}


def test_validation_of_the_first_seed_chooses_the_rate():
    rates, seeds = (5e-4, 1e-3, 2e-3), (4, 5)
    runs, order = [], []
    accuracy = {5e-4: (0.80, 0.99), 1e-3: (0.85, 0.10), 2e-3: (0.85, 0.20)}  # the test part would choose otherwise
    while pair := hf_runs.missing(runs, "lora", rates, seeds):
        order.append(pair)
        validation, test = accuracy[pair[0]]
        runs += [made(*pair, validation if pair[1] == 4 else 0.0, test), made(5e-4, 4, 1.0, method="houlsby")]
    assert order == [(5e-4, 4), (1e-3, 4), (2e-3, 4), (1e-3, 5)]
    assert hf_runs.best_rate(runs, "lora", rates, 4) == 1e-3
    assert hf_runs.best_rate(runs[:2], "lora", rates, 4) is None


def test_one_rate_needs_no_trial():
    assert hf_runs.best_rate([], "full", (1e-4,), 0) == 1e-4
    assert hf_runs.missing([], "full", (1e-4,), (0, 1)) == (1e-4, 0)
    assert hf_runs.missing([made(1e-4, 0, 0.8, method="full")], "full", (1e-4,), (0, 1)) == (1e-4, 1)


def test_summary_takes_the_runs_at_the_chosen_rate():
    runs = [made(1e-3, 0, 0.9, 0.84), made(2e-3, 0, 0.8, 0.99), made(1e-3, 1, 0.9, 0.86), made(1e-3, 2, 0.9, 0.88)]
    (row,) = hf_runs.summary(runs, {"full": (1e-4,), "lora": (1e-3, 2e-3)}, (0, 1, 2))
    assert (row["method"], row["learning_rate"], row["seeds"]) == ("lora", 1e-3, "0 1 2")
    assert (row["mean"], row["std"], row["accuracies"]) == (0.86, 0.02, "0.8400 0.8600 0.8800")


def test_results_come_back_and_other_settings_are_refused(tmp_path):
    runs = [made(1e-3, seed, 0.9, 0.8) for seed in (0, 1)]
    rows = hf_runs.summary(runs, {"lora": (1e-3,)}, (0, 1))
    assert hf_runs.resume(tmp_path, SETTINGS) == ([], [])
    hf_runs.save(tmp_path, SETTINGS, runs, rows)
    assert hf_runs.resume(tmp_path, SETTINGS) == (runs, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
    with (tmp_path / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["method"], row["mean"], row["torch"], row["steps"]) == ("lora", "0.8", "2.13.0", "300")
    with pytest.raises(FlagError, match="steps=300, not 60"):
        hf_runs.resume(tmp_path, SETTINGS | {"steps": 60})


SHORT = {"settings": SETTINGS, "summary": [], "runs": [{"method": "lora", "learning_rate": 1e-3}]}


@pytest.mark.parametrize("content", ["{", "[]", "null", json.dumps({"runs": []}), json.dumps(SHORT)])
def test_a_broken_results_file_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match="results.json is damaged"):
        hf_runs.resume(tmp_path, SETTINGS)


@pytest.mark.parametrize("values", [["x"], ["nan"], ["-1"], ["0.1", "1e-1"]])
def test_rates_are_checked(values):
    with pytest.raises(FlagError, match="--learning_rates"):
        hf_runs.numbers("learning_rates", values, float)


def test_an_unknown_method_and_an_absent_torch_are_one_line(monkeypatch):
    flags = SimpleNamespace(methods=["lorra"], learning_rates=[], seeds=["0"])
    with pytest.raises(FlagError, match="'lorra'. Did you mean 'lora'"):
        reference.execute(flags)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    flags.methods = ["lora"]
    with pytest.raises(FlagError, match="torch is not installed here: pip install torch==") as caught:
        reference.execute(flags)
    assert "\n" not in str(caught.value)


def test_neither_torch_nor_jax_is_imported_with_the_script():
    code = "import sys, experiments.hf_reference; print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_starts_and_locks_its_folder_where_there_is_no_jax(tmp_path):
    code = f"""
import runpy, sys
sys.modules["jax"] = None
from research.train.lock import lock
with lock({str(tmp_path)!r}):
    sys.argv = ["hf_reference", "--methods=lorra"]
    runpy.run_module("experiments.hf_reference", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "lorra" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.fixture
def without_torch(tmp_path, monkeypatch):
    """Calls `execute` for methods with everything replaced that needs torch; returns the runs it made."""
    order = []

    def run(method, rate, seed, *_):
        order.append((method, rate, seed))
        return made(rate, seed, 0.9, 0.8, method)

    parts = {part: {"labels": [0]} for part in ("train", "validation", "test")}
    monkeypatch.setattr(reference, "versions", lambda: SETTINGS["versions"])
    monkeypatch.setattr(reference, "load_parts", lambda length: (parts, {}))
    monkeypatch.setattr(reference, "run", run)
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    values = {"learning_rates": ["1e-3"], "seeds": ["0", "1"], "steps": 3, "batch_size": 2, "max_length": 4}
    values |= {"threads": 1, "time_only": False, "workdir": str(tmp_path)}

    def execute(*methods: str) -> list:
        reference.execute(SimpleNamespace(**values, methods=list(methods)))
        return order

    return execute


def test_a_later_call_makes_what_is_missing_and_keeps_the_rows_of_other_methods(without_torch, tmp_path):
    assert without_torch("lora") == [("lora", 1e-3, 0), ("lora", 1e-3, 1)]
    assert len(without_torch("lora")) == 2
    assert without_torch("houlsby")[2:] == [("houlsby", 1e-3, 0), ("houlsby", 1e-3, 1)]
    with (tmp_path / "results.csv").open() as file:
        rows = {row["method"]: row["seeds"] for row in csv.DictReader(file)}
    assert rows == {"lora": "0 1", "houlsby": "0 1"}
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4


def test_one_process_a_folder(without_torch, tmp_path):
    with lock(tmp_path), pytest.raises(FlagError, match="in use"):
        without_torch("lora")
