"""The paired interval has a closed form that a small case shows; what is not comparable is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.hf_compare import compare
from experiments.shared.table import COLUMNS
from research.data import text
from research.errors import DataError
from tests.experiments.script import refused, run


def test_difference_and_interval():
    labels = np.zeros(100, int)
    wrong = np.ones(100, int)
    ours, theirs = wrong.copy(), wrong.copy()
    ours[:60], theirs[:50] = 0, 0  # ours is right on the same 50 and on 10 more
    row = compare("lora", {0: ours, 1: ours}, {0: theirs}, labels)
    half = 1.96 * np.sqrt(0.1 * 0.9 / 99) * 100
    assert (row["ours %"], row["Hugging Face %"], row["difference"], row["seeds"]) == ("60.0", "50.0", "+10.0", 1)
    low, high = (float(x) for x in row["95 % interval"].split(" to "))
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=0.06)


def test_what_is_hard_for_both_cancels():
    labels = np.zeros(50, int)
    same = np.arange(50) % 2
    assert compare("full", {0: same}, {0: same}, labels)["95 % interval"] == "+0.0 to +0.0"


def test_no_common_seed_is_refused():
    with pytest.raises(DataError, match=r"lora: no seed in both: ours are \[0, 1\], the reference's \[4\]"):
        compare("lora", {0: np.zeros(3), 1: np.zeros(3)}, {4: np.zeros(3)}, np.zeros(3))


class Pair:
    """A table and a reference on the smoke sentences, as the two scripts write them."""

    def __init__(self, folder: Path):
        splits = text.load("smoke")
        prints = {part: getattr(splits, part).fingerprint for part in ("train", "validation", "test")}
        found = "".join(map(str, splits.test.labels))
        recipe = {"steps": 20, "batch_size": 16, "max_length": 16}
        row = dict.fromkeys(COLUMNS, 0) | {"method": "lora", "predictions": [found]}
        self.ours = {"identity": {"data": "-".join(prints.values()), "recipe": recipe}, "row": row}
        one = {"method": "lora", "learning_rate": 1e-3, "seed": 0, "test_predictions": found}
        self.theirs = {"settings": recipe | {"fingerprints": prints, "threads": 2}, "summary": [one], "runs": [one]}
        self.folder = folder

    def compare(self):
        ours, theirs = self.folder / "table/methods/lora/result.json", self.folder / "reference/results.json"
        for path, content in ((ours, self.ours), (theirs, self.theirs)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        folders = [f"--{name}={self.folder / name}" for name in ("table", "reference")]
        return run("hf_compare", *folders, "--data=smoke")


def test_two_runs_on_the_same_are_compared(tmp_path: Path):
    outcome = Pair(tmp_path).compare()
    assert outcome.status == 0, outcome.err
    assert "| lora" in outcome.out and "100.0" in outcome.out


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("steps", 300, "steps=20, not 300"), ("batch_size", 32, "batch_size=16, not 32"), ("max_length", 48, "not 48")],
)
def test_another_recipe_is_refused(name: str, value: int, words: str, tmp_path: Path):
    pair = Pair(tmp_path)
    pair.theirs["settings"][name] = value
    refused(pair.compare(), 3, "result.json", words)


def test_other_data_is_refused(tmp_path: Path):
    pair = Pair(tmp_path)
    pair.theirs["settings"]["fingerprints"]["train"] = "0" * 16
    refused(pair.compare(), 3, "data=", "not 0000")
    pair.theirs["settings"]["fingerprints"]["test"] = "0" * 16
    refused(pair.compare(), 3, "--data=smoke")


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}", '{"identity": {}, "row": {}}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path):
    pair = Pair(tmp_path)
    pair.ours = text
    refused(pair.compare(), 3, "result.json is damaged")
    pair = Pair(tmp_path)
    pair.theirs = text
    refused(pair.compare(), 3, "results.json is damaged")


@pytest.mark.parametrize("runs", [[1], [{}], [{"method": "lora", "learning_rate": 1e-3, "seed": 0}]])
def test_a_damaged_run_is_named(runs: list, tmp_path: Path):
    pair = Pair(tmp_path)
    pair.theirs["runs"] = runs
    refused(pair.compare(), 3, "results.json is damaged")
