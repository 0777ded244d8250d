"""`experiments.vision` in all its modes on the tiny model and drawn figures, and the pieces it is made of."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from experiments.shared import augmenting, classification, entries, images, vision_table, vit_base, vtab
from experiments.shared.entries import Entry
from research.errors import DataError, FlagError, ModelError
from research.vision import augment
from tests.experiments.script import refused, run

TINY = ["--smoke", "--steps=12", "--save_every=6", "--eval_every=6", "--learning_rate=3e-3"]


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.fixture(scope="module")
def tiny() -> vit_base.VitBase:
    return vit_base.load("smoke")


def test_a_batch_is_a_function_of_seed_epoch_and_row():
    data, recipe = images.smoke(20, 0), images.Recipe(1e-3, batch_size=8, micro_batches=2)
    several, alone = images.batches(data, recipe, [3, 5]), images.batches(data, recipe, 5)
    for step in range(4):
        one = alone(step)
        assert one["images"].shape == (2, 4, 12, 12, 1) and one["draw"].dtype == np.int32
        seeds, epochs, rows = np.moveaxis(one["draw"], -1, 0)
        np.testing.assert_array_equal(epochs.ravel(), np.arange(8 * step, 8 * step + 8) // 20)
        assert (seeds == 5).all()
        np.testing.assert_array_equal(one["images"], data.images[rows])
        np.testing.assert_array_equal(one["labels"], data.labels[rows])
        for name, leaf in several(step).items():
            np.testing.assert_array_equal(leaf[1], one[name], err_msg=name)
    first_epoch = np.concatenate([alone(s)["draw"][..., 2].ravel() for s in range(3)])[:20]
    assert sorted(first_epoch) == list(range(20))


@pytest.mark.slow
def test_augmentation_of_a_row_does_not_see_the_others():
    batch = images.batches(images.smoke(8, 0), images.Recipe(1e-3, batch_size=8), 0)(0)
    draw, x, labels = batch["draw"][0], batch["images"][0].astype(np.float32) / 255, batch["labels"][0]
    one = jax.jit(lambda draw, x: augmenting.augmented(augmenting.parse("crop=1,flip"), draw, x, labels, 4))
    whole, same = one(draw, x)
    other = one(np.concatenate([draw[:4] + 7, draw[4:]]), np.concatenate([x[3::-1], x[4:]]))[0]
    np.testing.assert_array_equal(whole[4:], other[4:])
    np.testing.assert_array_equal(same, labels)
    assert not np.array_equal(whole, x) and not np.array_equal(whole[:4], other[:4])
    key = jax.random.fold_in(augment.sample_key(0, int(draw[0, 2]), 0), 1)  # flip is the second of its kind
    flipped = augmenting.augmented({"flip": 1.0}, draw[:1], x[:1], labels[:1], 4)[0]
    np.testing.assert_array_equal(flipped[0], augment.flip(key, x[0]))


@pytest.mark.slow
def test_mixed_labels_are_shares_of_the_pixels():
    labels = np.array([0, 1] * 3)
    x = jnp.asarray(labels, jnp.float32)[:, None, None, None] * jnp.ones((6, 4, 4, 1))  # a pixel is its class
    mix = jax.jit(lambda draw: augmenting.augmented(augmenting.parse("mixup=0.8,cutmix"), draw, x, labels, 2))
    ways = set()
    for seed in range(8):
        mixed, soft = mix(np.full((6, 3), seed, np.int32))
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), soft[:, 1], atol=1e-6)
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
        ways.add(bool(np.isin(mixed, (0, 1)).all()))  # cutmix leaves pixels whole
    assert ways == {True, False}
    smooth = augmenting.augmented({"smoothing": 0.1}, np.zeros((6, 3), np.int32), x, labels, 2)[1]
    np.testing.assert_allclose(smooth[0], [0.95, 0.05], atol=1e-6)


def test_the_model_sees_stored_pixels_resized_and_normalised(tiny: vit_base.VitBase):
    sized, normal = images.pixels(tiny)
    raw = images.smoke(2, 0).images
    np.testing.assert_allclose(normal(sized(raw)), raw / 255 * 2 - 1, atol=1e-6)
    colour = np.full((1, 24, 36, 3), (255, 0, 0), np.uint8)
    np.testing.assert_allclose(sized(colour), np.full((1, 12, 12, 1), 0.299), atol=1e-5)


def test_layer_decay_scales_what_a_method_adds_too():
    variables = {
        "params": {"embed": {"x": jnp.ones(2)}, "layers": {"w": jnp.ones((2, 3, 3))}, "norm": {"scale": None}},
        "peft": {"layers": {"w": {"lora": jnp.ones((2, 3, 1))}}},
        "head": {"kernel": jnp.ones((3, 2))},
    }
    recipe = images.Recipe(0.1, 10, optimizer="sgd", schedule="constant", warmup=0, weight_decay=0.0)
    tx = images.Recipe(**(vars(recipe) | {"layer_decay": 0.5, "layers": 2})).tx()
    updates = tx.update(variables, tx.init(variables), variables)[0]
    np.testing.assert_allclose(updates["params"]["embed"]["x"], -0.1 / 8)
    for leaf in (updates["params"]["layers"]["w"], updates["peft"]["layers"]["w"]["lora"]):
        np.testing.assert_allclose(leaf[:, 0, 0], [-0.1 / 4, -0.1 / 2])
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1)
    with pytest.raises(FlagError, match="layer_decay=1.5"):
        images.Recipe(**(vars(recipe) | {"layer_decay": 1.5})).tx()


def test_a_base_comes_back_from_its_directory(tiny: vit_base.VitBase, tmp_path: Path):
    head = {"kernel": np.ones((32, 2), np.float32), "bias": np.zeros(2, np.float32)}
    made = vit_base.marked(vit_base.replace(tiny, head=head, classes=("a", "b"), mean=(0.3,)))
    size = vit_base.save(tmp_path / "base", made)
    assert size == sum(file.stat().st_size for file in (tmp_path / "base").iterdir())
    found = vit_base.load(str(tmp_path / "base"), drop_path=0.5)
    assert found.fingerprint == made.fingerprint != tiny.fingerprint and found.classes == ("a", "b")
    assert found.mean == (0.3,) and found.model.config.drop_path == 0.5 and (found.head["kernel"] == 1).all()
    one, two = (jax.tree.leaves(base.params) for base in (made, found))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    flat = vit_base.fresh("smoke", vit_base.replace(vit_base.SMOKE, scan=False), (0.5,), (0.5,))
    assert "layers_1" in flat.params and flat.fingerprint == tiny.fingerprint

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    with pytest.raises(ModelError, match="something else"):
        vit_base.save(tmp_path / "notes", made)
    with pytest.raises(ModelError, match="no config.json"):
        vit_base.load(str(tmp_path / "notes"))
    record = tmp_path / "base" / "config.json"
    edited = json.loads(record.read_text())
    record.write_text(json.dumps(edited | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ModelError, match="head is not one of 3 classes"):
        vit_base.load(str(tmp_path / "base"))
    record.write_text(json.dumps(edited | {"config": edited["config"] | {"num_layers": 3}}))
    with pytest.raises(ModelError, match="does not fit its config.json"):
        vit_base.load(str(tmp_path / "base"))
    record.write_text(json.dumps(edited | {"task": "diffusion"}))
    with pytest.raises(ModelError, match="no saved model for vision: it is for task 'diffusion'"):
        vit_base.load(str(tmp_path / "base"))
    record.write_text(json.dumps(edited))
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(ModelError, match="damaged"):
        vit_base.load(str(tmp_path / "base"))


def test_confusion_counts_rows(tmp_path: Path):
    matrix = images.confusion(np.array([0, 1, 1, 2, 0]), np.array([0, 0, 1, 2, 2]), 3)
    np.testing.assert_array_equal(matrix, [[1, 1, 0], [0, 1, 0], [1, 0, 1]])
    images.draw_confusion(matrix, ("a", "b", "c"), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 300


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: images.choose(("bag", "shirt"), "bag,shirts"), "'shirts' .*Did you mean 'shirt'"),
        (lambda: images.choose(("bag", "shirt"), "0-2"), "0-1"),
        (lambda: images.choose(("bag", "shirt"), "bag,0"), "each once"),
        (lambda: augmenting.parse("flop"), "Did you mean 'flip'"),
        (lambda: augmenting.parse("crop=1.5"), "Valid: crop=2"),
        (lambda: augmenting.parse("smoothing=2"), "Valid: smoothing=0.1"),
        (lambda: vtab.parse("cifar-100"), "Did you mean 'cifar100'"),
        (lambda: vtab.parse("vtab,dtd"), "twice"),
    ],
)
def test_wrong_choices_are_named(call, words: str):
    with pytest.raises(FlagError, match=words):
        call()
    assert images.choose(("t-shirt", "bag", "x", "y"), "t-shirt,2-3") == [0, 2, 3]


def test_classes_go_by_name():
    data = images.smoke(8, 0)
    kept = images.matching(data, ("square", "down"))
    assert kept.classes == ("square", "down") and kept.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="no 'circle'"):
        images.matching(data, ("circle",))


# --------------------------------------------------------------------------------------------------------------- tasks

# Full fine-tuning of ViT-B/16 as published in NOAH (arXiv 2206.04673, table 1), in vtab's order.
PUBLISHED = [68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8, 79.7, 95.7, 84.2, 73.9, 56.3, 58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1]  # fmt: skip  # noqa: E501


def test_means_are_of_groups_as_published():
    assert [sum(t.group == g for t in vtab.VTAB.values()) for g in vtab.GROUPS] == [7, 4, 8]
    assert sum(t.classes for t in vtab.VTAB.values()) == 940 and {t.metric for t in vtab.VTAB.values()} == {"accuracy"}
    tasks = vtab.parse("vtab")
    cells = {
        (task, "full"): {"method": "full", "trainable": 1, "percent": 100.0, "accuracy": x, "accuracies": [x, x]}
        for task, x in zip(tasks, PUBLISHED, strict=True)
    }
    (row,) = vision_table.rows(["full", "lora"], tasks, cells)  # lora has no cell yet
    assert [round(row["groups"][g], 1) for g in vtab.GROUPS] == [75.9, 83.4, 47.6]
    assert row["accuracy"] == pytest.approx(68.97, abs=0.01) and row["std"] == 0
    head, _, line = vision_table.markdown([row], tasks).splitlines()
    assert head.count("|") == line.count("|") == 27 and "| cifar100 |" in head and "**structured**" in head


def test_what_is_drawn_of_other_images():
    data = images.smoke(12, 0)
    turned = vtab.rotation(data, 0)
    back = np.stack([np.rot90(x, -k) for x, k in zip(turned.images, turned.labels, strict=True)])
    np.testing.assert_array_equal(back, data.images)
    placed, counted = vtab.location(data, 0), vtab.count(data, 0)
    for image, label, raw in zip(placed.images, placed.labels, data.images, strict=True):
        small = raw.reshape(6, 2, 6, 2, 1).mean(axis=(1, 3)).round()
        top, left = 3 * (label // 3), 3 * (label % 3)
        np.testing.assert_array_equal(image[top : top + 6, left : left + 6], small)
        assert image.sum() == small.sum()
    quarters = counted.images.reshape(12, 2, 6, 2, 6).max(axis=(2, 4)) > 0
    np.testing.assert_array_equal(quarters.sum(axis=(1, 2)), counted.labels + 1)
    assert len({len(set(x.labels.tolist())) for x in (turned, placed, counted)} - {1}) > 0


def test_a_task_has_a_thousand_rows_at_most():
    data = images.smoke(30, 0)
    few, same = vtab.sample(data, 10, 1), vtab.sample(data, 40, 1)
    assert len(few.labels) == 10 and same is data
    assert not np.array_equal(vtab.sample(data, 10, 2).images, few.images)


@pytest.mark.slow
def test_every_method_of_the_table_fits_a_base(tiny: vit_base.VitBase):
    todo = entries.parse(vision_table.METHODS)
    for entry in todo:
        classification.check(tiny, entry.spec)
    assert len(todo) == 9 and len({entry.folder for entry in todo}) == 9


# ----------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--patch=5"], 4, ["patch 5 does not divide image size 12", "1, 2, 3, 4, 6, 12"]),
        (["--stem=4,x"], 2, ["--stem='4,x'", "none, or such as 32,64"]),
        (["--model=minilm-l6"], 4, ["does not see images", "vit-mini"]),
        (["--peft=lora"], 2, ["--peft=full", "--mode=adapt"]),
        (["--data=fashion"], 3, ["fashion", "fashion-mnist"]),
        (["--classes=0-7"], 2, ["0-7", "0-3"]),
        (["--shots=100"], 3, ["fewer than 100"]),
        (["--augment=flips"], 2, ["Did you mean 'flip'?"]),
        (["--layer_decay=0"], 2, ["layer_decay=0"]),
        (["--untie"], 2, ["token table"]),
        (["--adapter=x"], 2, ["--mode=evaluate"]),
        (["--mode=adapt", "--model=nowhere"], 4, ["nowhere", "--mode=pretrain"]),
        (["--mode=adapt", "--model=vit-b16"], 4, ["preset without weights"]),
        (["--mode=adapt", "--peft=lara"], 2, ["lara", "Did you mean"]),
        (["--mode=table", "--tasks=cifar10"], 2, ["cifar100"]),
        (["--mode=table", "--data=smoke"], 2, ["--tasks"]),
        (["--mode=evaluate"], 4, ["no head of its own"]),
        (["--mode=evaluate", "--adapter=nowhere"], 4, ["no adapter"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], tmp_path: Path):
    refused(run("vision", "--smoke", *arguments, f"--workdir={tmp_path / 'run'}"), status, *words)
    assert not (tmp_path / "run" / "config.json").exists()


def folder(path: Path) -> Path:
    """Two classes of six small images."""
    rng = np.random.default_rng(0)
    for name, base in (("dark", 0), ("light", 160)):
        (path / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(base, base + 80, (16, 14, 3)).astype(np.uint8)).save(path / name / f"{i}.png")
    return path


def test_a_corrupt_image_and_an_empty_class_are_named(tmp_path: Path):
    data = folder(tmp_path / "data")
    (data / "light" / "3.png").write_bytes((data / "light" / "3.png").read_bytes()[:60])
    refused(run("vision", "--smoke", f"--data={data}", f"--workdir={tmp_path / 'a'}"), 3, "3.png", "not a whole image")
    (data / "none").mkdir()
    for file in (data / "light").iterdir():
        file.unlink()
    outcome = run("vision", "--smoke", f"--data={data}", f"--workdir={tmp_path / 'a'}")
    refused(outcome, 3, "class 'light' has no images")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, and an adapter on it."""
    home = tmp_path_factory.mktemp("vision")
    outcome = run("vision", *TINY, "--steps=24", "--drop_path=0.1", f"--workdir={home / 'run'}")
    assert outcome.status == 0, outcome.err
    assert "17,984 of 17,984 parameters train" in outcome.out
    outcome = run("vision", *adapt(home), "--peft=lora:rank=2", f"--workdir={home / 'lora'}")
    assert outcome.status == 0, outcome.err
    return home


def adapt(home: Path) -> list[str]:
    own = ["--mode=adapt", f"--model={home / 'run' / 'base'}", "--augment=crop=1,flip", "--classes=square,across"]
    return [*TINY, *own]


@pytest.mark.slow
def test_pretraining_leaves_a_base_that_knows_its_classes(made: Path):
    for name in ("config.json", "metrics.jsonl", "curve.png", "confusion.png", "attention.png", "result.json"):
        assert (made / "run" / name).exists(), name
    result = json.loads((made / "run" / "result.json").read_text())["test"]
    assert result["accuracy"] > 0.4 and np.sum(result["confusion"]) == 80  # chance is 0.25
    assert np.trace(result["confusion"]) / 80 == pytest.approx(result["accuracy"])
    outcome = run("vision", "--smoke", "--mode=evaluate", f"--model={made / 'run' / 'base'}", f"--workdir={made / 'e'}")
    assert f"test accuracy {result['accuracy']:.4f} over 80 images" in outcome.out, outcome.err
    assert json.loads((made / "e" / "result.json").read_text())["test"] == result


@pytest.mark.slow
def test_an_adapter_evaluates_to_what_training_ended_with(made: Path):
    result = json.loads((made / "lora" / "result.json").read_text())["test"]
    assert list(result["classes"]) == ["square", "across"] and np.sum(result["confusion"]) == 40
    arguments = ["--mode=evaluate", f"--adapter={made / 'lora' / 'adapter'}", f"--workdir={made / 'e2'}"]
    outcome = run("vision", *arguments)  # its base, data and classes are in the adapter
    assert outcome.status == 0, outcome.err
    assert json.loads((made / "e2" / "result.json").read_text())["test"] == result


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path):
    arguments = ["--smoke", "--mode=evaluate", f"--adapter={made / 'lora' / 'adapter'}", "--model=smoke"]
    refused(run("vision", *arguments, f"--workdir={tmp_path}"), 4, "trained on base")
    outcome = run("vision", *adapt(made), "--peft=lora:rank=3", f"--workdir={made / 'lora'}")
    refused(outcome, 2, "holds a run", "peft=lora:rank=2, not lora:rank=3")


@pytest.mark.slow
def test_devices_and_parts_of_a_batch_change_nothing(made: Path, tmp_path: Path):
    own = ["--peft=lora:rank=2", "--mesh=data:4,fsdp:2", "--micro_batches=2"]
    outcome = run("vision", *adapt(made), *own, f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    one, two = (load_file(d / "adapter" / "adapter.safetensors") for d in (made / "lora", tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(two[name], leaf, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_base(made: Path, tmp_path: Path, monkeypatch):
    arguments = [*TINY, "--steps=24", "--drop_path=0.1", f"--workdir={tmp_path}"]
    real = images.batches

    def stopping(*given):
        batch = real(*given)
        return lambda step: (step == 9 and os.kill(os.getpid(), signal.SIGTERM), batch(step))[1]

    with monkeypatch.context() as patch:
        patch.setattr(images, "batches", stopping)
        outcome = run("vision", *arguments)
    assert outcome.status == 143 and not (tmp_path / "base").exists(), outcome.err
    outcome = run("vision", *arguments)
    assert outcome.status == 0 and "going on from step" in outcome.err, outcome.err
    one, two = (load_file(d / "base" / "model.safetensors") for d in (made / "run", tmp_path))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path: Path):
    outcome = run("vision", "--smoke", "--dry_run", f"--workdir={tmp_path}")
    for words in ("activations and gradients", "1x16x12x12x1", "uint8", "9 patches", "label '"):
        assert words in outcome.out, words
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_trains_on_a_folder(tmp_path: Path):
    data = folder(tmp_path / "data")
    own = ["--batch_size=4", "--steps=2", "--augment=flip,mixup,smoothing"]
    more = ["--channels=3", "--pooling=token", "--layer_decay=0.8", f"--data={data}", f"--workdir={tmp_path / 'run'}"]
    outcome = run("vision", "--smoke", *own, *more)
    assert outcome.status == 0, outcome.err
    base = vit_base.load(str(tmp_path / "run" / "base"))
    assert base.classes == ("dark", "light") and base.config.channels == len(base.mean) == 3


TABLE = ["--smoke", "--mode=table", "--steps=6", "--methods=linear_probe@3e-2;vpt:length=2@1e-2", "--tasks=smoke,smoke-count"]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("table")
    outcome = run("vision", *TABLE, "--seeds=2", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    return workdir


@pytest.mark.slow
def test_the_table_in_three_forms(table: Path):
    cells = list(csv.DictReader((table / "table.csv").open()))
    assert [(c["task"], c["method"]) for c in cells] == [
        (task, method) for task in ("smoke", "smoke-count") for method in ("linear_probe", "vpt:length=2")
    ]
    text = (table / "table.md").read_text()
    assert "| vpt:length=2 | 128 |" in text and "the numbers mean nothing" in text
    mean = np.mean([float(c["accuracy"]) for c in cells if c["method"] == "linear_probe"])  # one task a group
    assert f"| {100 * mean:.1f} ± " in text
    assert (table / "table.png").read_bytes().startswith(b"\x89PNG")
    assert (table / "tasks" / "smoke" / "table.md").read_text().startswith("smoke: accuracy on 80")


@pytest.mark.slow
def test_the_table_goes_on_with_what_is_missing(table: Path):
    before = {p: p.read_bytes() for p in table.rglob("*") if p.name in ("result.json", "table.csv", "table.md")}
    place = next((table / "tasks" / "smoke-count").glob("vpt*"))
    shutil.rmtree(place)
    outcome = run("vision", *TABLE, "--seeds=2", f"--workdir={table}")
    assert outcome.status == 0 and outcome.out.count("finished before") == 3
    again = json.loads((place / "result.json").read_text())["row"]
    assert again["accuracies"] == json.loads(before[place / "result.json"])["row"]["accuracies"]
    refused(run("vision", *TABLE, "--seeds=3", f"--workdir={table}"), 2, "holds a result", "seeds=2, not 3")


@pytest.mark.slow
def test_seeds_of_one_program_equal_seeds_alone(table: Path, tmp_path: Path):
    arguments = [*TABLE[:3], "--methods=vpt:length=2@1e-2", "--tasks=smoke", "--seeds=1", "--tune=1"]
    outcome = run("vision", *arguments, f"--workdir={tmp_path}")
    assert outcome.status == 0 and "rate 0.01: validation accuracy" in outcome.out, outcome.err
    alone, several = (next((d / "tasks" / "smoke").glob("vpt*")) for d in (tmp_path, table))
    one, two = (load_file(d / "adapter-0" / "adapter.safetensors") for d in (alone, several))
    for name, leaf in one.items():
        np.testing.assert_allclose(two[name], leaf, atol=1e-6, err_msg=name)


def test_a_rate_is_chosen_on_a_fifth_of_the_training_images(tmp_path: Path, monkeypatch):
    seen = []

    def fit(entry, base, learn, recipe, *_):
        seen.append((recipe.learning_rate, len(learn.labels)))
        return None, SimpleNamespace(state=recipe.learning_rate), None

    def evaluator(run, part):
        assert len(part["labels"]) == 4
        return lambda rate: {"accuracy": 1 - rate}

    monkeypatch.setattr(vision_table, "fit", fit)
    monkeypatch.setattr(vision_table.training, "evaluator", evaluator)
    monkeypatch.setattr(vision_table, "train", lambda entry, *_: {"rate": entry.rate})
    monkeypatch.setattr(vision_table.cell.plot, "curve", lambda *_: None)
    entry, identity = Entry("lora", "lora", 0.1), {"tune": 3, "seeds": 3, "rate": 0.1, "augment": "none"}
    parts = images.smoke(20, 0), images.smoke(20, 1)
    assert vision_table.one(entry, None, parts, images.Recipe(0.0), identity, tmp_path)["rate"] == 0.033
    assert seen == [(0.033, 16), (0.1, 16), (0.3, 16)]  # 800 / 200
