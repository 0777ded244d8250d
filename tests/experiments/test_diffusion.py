"""`experiments.diffusion`, `sample_images` and `features` on tiny images: train, resume, adapt, measure, refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import features
from experiments.shared import captions, denoising, diffusion_run, own_model, pictures
from experiments.shared.denoising import Sampling, Setting, drawer, generate
from experiments.shared.pictures import choose, evenly, in_turn
from research.data.images import Images
from research.diffusion import frechet
from research.errors import DataError, FlagError, ModelError
from research.models import unet
from research.models.dit import DitConfig
from research.peft import method as peft
from research.peft import tree
from tests.experiments.script import refused, run

slow = pytest.mark.slow
QUICK = ["--smoke", "--steps=4", "--save_every=2", "--sampler=euler", "--sample_steps=2"]
OLD = [*QUICK, "--eval_every=2", "--classes=0-2", "--layers=1", "--width=16", "--frechet=24"]  # as many as in a grid
NEW = [*QUICK, "--eval_every=0", "--classes=cross", "--images=3", "--frechet=0"]


# ------------------------------------------------------------------------------------------------------------- pieces


def test_classes_are_chosen_by_number_range_and_name():
    names = ("bag", "coat", "t-shirt", "shirt")
    assert choose(None, names) == (0, 1, 2, 3)
    assert choose("1-2,0", names) == (0, 1, 2)
    assert choose("t-shirt, bag", names) == (0, 2)
    for text, words in (("bat", "Did you mean 'bag'"), ("4", "Valid: 0-3"), ("0,bag", "twice"), ("", "no class")):
        with pytest.raises(FlagError, match=words):
            choose(text, names)


def test_even_rows_take_turns_and_a_class_without_images_is_named():
    data = pictures.stripes(16, 0)
    assert list(evenly(data.take(np.arange(15)[::-1]), 6).labels) == [0, 1, 2, 3, 0, 1]
    assert list(in_turn((1, 3), 5)) == [1, 3, 1, 3, 1]
    some = data.take(np.flatnonzero(data.labels != 2))
    with pytest.raises(DataError, match="class 'square' has no images"):
        pictures.of_classes(some, (1, 2))


def test_gaussians_have_the_moments_of_each_class():
    rng = np.random.default_rng(0)
    data = pictures.stripes(4, 0)
    images = np.clip(rng.normal(120, 20, (2000, 2, 2, 1)), 0, 255).round().astype(np.uint8)
    images[1000:, 0] = images[1000:, 1]  # the second class has equal rows
    data = Images(images, np.repeat([0, 1], 1000).astype(np.int32), data.classes, ("",) * 2000)
    drawn = features.gaussians(data, np.repeat([1, 0], 3000)).astype(float)
    np.testing.assert_allclose(drawn.mean((0, 3)), images.mean((0, 3)), atol=1)
    np.testing.assert_allclose(drawn[:3000, 0], drawn[:3000, 1], atol=1.01)
    assert abs(np.corrcoef(drawn[3000:, 0, 0, 0], drawn[3000:, 1, 0, 0])[0, 1]) < 0.06


def test_pixel_features_and_the_refusal_of_unequal_numbers():
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1)).astype(np.uint8)
    net = features.network("auto", Images(images, np.zeros(6, np.int32), ("a",), ("",) * 6))
    read, classes = net.read(images)
    assert read.shape == (6, 49) and classes is None
    np.testing.assert_allclose(read[3, 8], images[3, 4:8, 4:8].mean() / 255)
    target, _ = net.measure(images, np.zeros(6))
    assert features.score(net, "same", images, np.zeros(6), target)["frechet"] < 1e-9
    with pytest.raises(DataError, match="as many images on both sides: 5 and 6"):
        features.score(net, "fewer", images[:5], np.zeros(5), target)


@pytest.fixture(scope="module")
def base() -> denoising.Denoiser:
    """A random one, none of whose leaves is zero."""
    setting = Setting("flow", 1.0, "flow", 0.1, 0.5, pictures.SMOKE_CLASSES, (0, 1, 2))
    config = DitConfig(8, 1, 4, 16, 1, 1, 64, 4, 0, False)
    model, rng = own_model.module(config), np.random.default_rng(0)
    draw = lambda x: jax.numpy.asarray(0.2 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    params = jax.tree.map(draw, peft.base(model)[0])
    return denoising.Denoiser("tiny", config, model, params, setting, "none")


def test_the_rows_of_new_classes_stand_in_the_table_and_nowhere_else(base: denoising.Denoiser):
    head = denoising.new_rows(base, 1, jax.random.key(0))
    found = denoising.with_rows({"params": base.params, "head": head}, (3,))
    assert set(found) == {"params"}
    table, before = (tree.paths(p)["condition/labels/embedding"] for p in (found["params"], base.params))
    np.testing.assert_array_equal(table[3], head["labels"]["rows"][0])
    np.testing.assert_array_equal(np.delete(table, 3, 0), np.delete(before, 3, 0))


@slow
def test_an_image_is_the_same_in_any_batch(base: denoising.Denoiser):
    draw = drawer(base, Sampling("ddpm", 3, 2.0))
    told = {"labels": in_turn((0, 1, 2), 19)}
    whole = generate(draw, {"params": base.params}, told, 19, batch=24)
    parts = generate(draw, {"params": base.params}, told, 19, batch=8)
    assert whole.shape == (19, 8, 8, 1) and whole.dtype == np.uint8 and len(np.unique(whole, axis=0)) == 19
    assert np.abs(whole.astype(int) - parts).max() <= 1  # a rounding of fp32 may go either way


def test_guidance_is_refused_where_there_is_nothing_to_guide(base: denoising.Denoiser):
    never = dataclasses.replace(base, setting=dataclasses.replace(base.setting, label_dropout=0.0))
    with pytest.raises(FlagError, match="needs a model that also learnt images of which it was told nothing"):
        drawer(never, Sampling(guidance=2.0))
    config = dataclasses.replace(base.config, num_classes=0)
    blind = dataclasses.replace(base, config=config, model=own_model.module(config))
    with pytest.raises(FlagError, match="needs a model with classes or captions: this one is unconditional"):
        drawer(blind, Sampling(guidance=2.0))


def test_a_batch_is_half_prior_images_each_with_its_own_mean(base: denoising.Denoiser):
    data, prior = pictures.stripes(4, 0), pictures.stripes(40, 1)
    few = data.take(np.flatnonzero(data.labels == 3))
    task = diffusion_run.Task(base, few, few, (3,), (3,), prior, 0.5, {})
    recipe = diffusion_run.Recipe(1e-3, batch_size=12, micro_batches=2)
    batch = diffusion_run.batches(task, recipe, 0)(5)
    assert batch["images"].shape == (2, 6, 8, 8, 1) and batch["images"].min() == -1
    for labels, weight in zip(batch["labels"], batch["weight"], strict=True):
        assert (labels[:3] == 3).all()
        np.testing.assert_allclose(weight[3:].sum() / weight[:3].sum(), 0.5, rtol=1e-6)
        np.testing.assert_allclose(weight.sum(), 6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A denoiser of three of the four classes."""
    workdir = tmp_path_factory.mktemp("diffusion")
    outcome = run("diffusion", *OLD, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert "step 4: loss" in outcome.out and "frechet" in outcome.out
    return workdir


@pytest.fixture(scope="module")
def adapted(trained: Path, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("adapted")
    outcome = run("diffusion", *NEW, f"--base={trained / 'model'}", f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert "and 1 rows of new classes" in outcome.out
    return workdir


@slow
def test_writes_model_samples_and_curve_and_its_loss_falls(trained: Path):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in seen] == [2, 4] and seen[1]["eval/loss"] < seen[0]["eval/loss"]
    assert seen[1]["eval/minutes"] > seen[0]["eval/minutes"] > 0 and seen[1]["eval/frechet"] > 0
    assert json.loads((trained / "model" / "config.json").read_text())["setting"]["trained"] == [0, 1, 2]
    for png in ("curve.png", "distance.png", "samples/step000002.png", "samples/step000004.png"):
        assert (trained / png).read_bytes().startswith(b"\x89PNG")
    model = denoising.load(trained / "model")
    assert {str(k): np.asarray(v).shape for k, v in tree.paths(model.params).items()}.keys() == load_file(
        trained / "model" / "model.safetensors"
    ).keys()


@slow
def test_a_run_that_was_stopped_ends_with_the_same_average(trained: Path, tmp_path: Path):
    """From the checkpoint of step 2, the average included."""
    shutil.copytree(trained, tmp_path / "again")
    for gone in ("checkpoints/4", "model"):
        shutil.rmtree(tmp_path / "again" / gone)
    outcome = run("diffusion", *OLD, f"--workdir={tmp_path / 'again'}")
    assert outcome.status == 0 and "going on from step 2" in outcome.err, outcome.err
    one, two = (load_file(d / "model" / "model.safetensors") for d in (trained, tmp_path / "again"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@slow
def test_an_adapter_draws_the_class_that_it_brought(trained: Path, adapted: Path, tmp_path: Path):
    leaves = load_file(adapted / "adapter" / "adapter.safetensors")
    assert leaves["head/labels/rows"].shape == (1, 16)
    assert not any(name.startswith("params/") for name in leaves)
    assert json.loads((adapted / "adapter" / "adapter.json").read_text())["new"] == [3]
    how = ["--sampler=euler", "--sample_steps=2", f"--output={tmp_path / 'new.png'}"]
    outcome = run("sample_images", f"--adapter={adapted / 'adapter'}", "--classes=3", "--count=5", *how)
    assert outcome.status == 0 and "5 images of cross" in outcome.out, outcome.err
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    model = f"--model={trained / 'model'}"
    refused(run("sample_images", model, "--classes=3"), 2, "3 (cross) was not learnt", "0 horizontal")
    refused(run("sample_images", model, "--guidance=2", "--interval=a,b"), 2, "--interval=a,b")
    (adapted / "adapter" / "adapter.json").rename(tmp_path / "aside")
    refused(run("sample_images", f"--adapter={adapted / 'adapter'}"), 4, "no adapter")
    (tmp_path / "aside").rename(adapted / "adapter" / "adapter.json")


@slow
def test_the_ladder_is_printed_and_unequal_numbers_are_refused(trained: Path, tmp_path: Path):
    command = [f"--model={trained / 'model'}", "--frechet", "--data=smoke", "--sampler=euler", "--sample_steps=2"]
    outcome = run("sample_images", *command, "--count=60", f"--output={tmp_path / 'a.png'}")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["n"] for row in found["rows"]] == [60] * 5 and found["features"] == frechet.network_name("pixels", {})
    distance = {row["images"]: row["frechet"] for row in found["rows"]}
    assert distance["real (these)"] == 0 < distance["real (training part)"] < distance["samples"]
    for name in distance:
        assert name in outcome.out
    refused(run("sample_images", *command, "--count=100"), 3, "as many images", "100 samples and 72 real", "--count=72")


@slow
def test_the_table_has_a_row_a_method_and_keeps_it(trained: Path, tmp_path: Path):
    command = ["diffusion", "--mode=table", *NEW, f"--base={trained / 'model'}", f"--workdir={tmp_path}"]
    outcome = run(*command, "--methods=ia3")
    assert outcome.status == 0, outcome.err
    text = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| base", "| ia3"]
    assert "learns cross from 3 images" in text and (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    sheet = (tmp_path / "sheet.png").read_bytes()
    again = run(*command, "--methods=ia3")
    assert again.status == 0 and "compiling" not in again.out, again.err
    assert (tmp_path / "table.md").read_text() == text and (tmp_path / "sheet.png").read_bytes() == sheet
    refused(run(*command, "--methods=ia3", "--steps=3"), 2, "holds a result", "steps=4, not 3")


@slow
def test_a_feature_network_is_trained_saved_and_named_by_its_weights(tmp_path: Path):
    outcome = run("features", "--data=smoke", "--width=4", "--dimensions=8", "--steps=60", "--batch_size=32",
                  "--learning_rate=3e-2", f"--workdir={tmp_path}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    test = pictures.load_images("smoke")[1]
    net = features.network(str(tmp_path / "model"), test)
    assert net.name in outcome.out and net.name.startswith("features-")
    moments, right = net.measure(test.images, test.labels)
    assert moments.mean.shape == (8,) and moments.network == net.name and right > 0.5
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="damaged"):
        features.network(str(tmp_path / "model"), test)


@slow
def test_eight_devices_end_where_one_does(trained: Path, tmp_path: Path):
    outcome = run("diffusion", *OLD, "--mesh=data:4,fsdp:2", "--frechet=0", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    one, eight = (load_file(d / "model" / "model.safetensors") for d in (trained, tmp_path))
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, atol=2e-5, err_msg=name)


@slow
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(trained: Path, tmp_path: Path):
    outcome = run("diffusion", *NEW, f"--base={trained / 'model'}", "--dry_run", f"--workdir={tmp_path}")
    assert outcome.status == 0, outcome.err
    for words in ("activations and gradients", "1x16x8x8x1", "class 3 'cross': 3 images"):
        assert words in outcome.out, words
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "checkpoints").exists()


@slow
def test_a_model_that_is_told_nothing_learns_and_draws():
    data = pictures.stripes(8, 0)
    setting = Setting("cosine", 1.0, "v", 0.1, 0.5, data.classes, (0, 1, 2, 3))
    config = denoising.sized(unet.PRESETS["unet-tiny"], data, 0, 0, width=8)
    model = own_model.module(config)
    base = denoising.Denoiser("blind", config, model, peft.base(model)[0], setting, "")
    task = diffusion_run.Task(base, data, data, (0,), (), None, 0.0, {})
    batch = diffusion_run.batches(task, diffusion_run.Recipe(1e-3, batch_size=8), 0)(0)
    assert set(batch) == {"images", "weight"}
    one = {name: leaf[0] for name, leaf in batch.items()}
    found = jax.eval_shape(diffusion_run.loss(task), {"params": base.params}, one, jax.random.key(0))
    assert found.sum.shape == () and config.num_classes == 0
    drawn = jax.eval_shape(drawer(base, Sampling()), {"params": base.params}, {}, np.arange(3), jax.random.key(0))
    assert drawn.shape == (3, 8, 8, 1)


def test_a_caption_is_the_same_vector_beside_any_others():
    texts = ["a good film", "bad", "a good film", "an odd but touching story of love"]
    found = captions.encode("smoke", texts)
    assert found.dtype == np.float32 and found.shape == (4, captions.encoder("smoke").base.config.hidden_size)
    np.testing.assert_allclose((found**2).mean(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found[0], found[2])
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(captions.encode("smoke", [text])[0], row, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.1
    with pytest.raises(DataError, match="caption 2 of 2 is empty"):
        captions.encode("smoke", ["a", " "])
    with pytest.raises(ModelError, match="smoke-llama is none"):
        captions.encode("smoke-llama", ["a"])


@slow
def test_a_denoiser_that_is_told_captions_draws_what_it_is_asked(trained: Path, tmp_path: Path):
    text = [*QUICK, "--condition=text", "--layers=1", "--width=16", "--frechet=24", f"--workdir={tmp_path / 'run'}"]
    outcome = run("diffusion", *text)
    assert outcome.status == 0, outcome.err
    model = f"--model={tmp_path / 'run' / 'model'}"
    base = denoising.load(tmp_path / "run" / "model")
    assert base.config.num_classes == 0 and base.config.text_features == 32 and base.setting.encoder[0] == "smoke"
    how = ["--sampler=euler", "--sample_steps=2", f"--output={tmp_path / 'a.png'}"]
    asked = run("sample_images", model, "--prompt=a cross", "--prompt=square", "--count=8", "--guidance=2", *how)
    assert asked.status == 0 and "8 images of a cross, square" in asked.out, asked.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    measured = run("sample_images", model, "--frechet", "--data=smoke", "--count=60", *how)
    assert measured.status == 0 and "samples" in measured.out, measured.err
    adapted = [*QUICK, f"--base={tmp_path / 'run' / 'model'}", "--classes=3", "--images=3", "--frechet=0"]
    outcome = run("diffusion", *adapted, "--eval_every=0", f"--workdir={tmp_path / 'new'}")
    assert outcome.status == 0 and "rows of new classes" not in outcome.out, outcome.err
    adapter = f"--adapter={tmp_path / 'new' / 'adapter'}"
    assert run("sample_images", adapter, "--prompt=cross", "--count=2", *how).status == 0
    refused(run("sample_images", model), 2, "--prompt=", "--frechet")
    refused(run("sample_images", model, "--prompt=cross", "--classes=1"), 2, "--classes is not for it")
    refused(run("sample_images", f"--model={trained / 'model'}", "--prompt=cross"), 2, "--prompt is for a model")
    table = [*adapted, "--mode=table", f"--workdir={tmp_path / 'table'}"]
    refused(run("diffusion", *table), 2, "--mode=table teaches classes")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--patch=5"], 3, ["patch 5 does not divide 8x8", "1, 2, 4, 8"]),
        (["--peft=lora"], 2, ["--peft=lora", "--base"]),
        (["--mode=table"], 2, ["--base"]),
        (["--base=nowhere"], 4, ["nowhere", "no config.json"]),
        (["--mode=table", "--base=nowhere", "--peft=lora"], 2, ["--peft", "--methods"]),
        (["--model=dit-tinny"], 2, ["Did you mean 'dit-tiny'"]),
        (["--classes=squar"], 2, ["Did you mean 'square'"]),
        (["--images=500"], 3, ["class 'horizontal' has 40 images, fewer than 500"]),
        (["--data=fashion-mnits"], 3, ["Did you mean 'fashion-mnist'"]),
        (["--process=cosine_zero_snr", "--predict=eps"], 2, ["'eps'", "ends at SNR 0"]),
        (["--process=cosine", "--shift=2"], 2, ["--shift=2"]),
        (["--ema=1"], 2, ["--ema=1"]),
        (["--model=unet-tiny"], 2, ["UNet has --width alone"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str], tmp_path: Path):
    refused(run("diffusion", "--smoke", *arguments, f"--workdir={tmp_path / 'run'}"), status, *words)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_corrupt_image_is_named(tmp_path: Path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(pictures.sheet(pictures.stripes(1, 0).images, 1))
    (tmp_path / "dogs" / "b.png").write_bytes(b"\x89PNG nothing more")
    outcome = run("diffusion", f"--data={tmp_path}", "--size=8", f"--workdir={tmp_path / 'run'}")
    refused(outcome, 3, "dogs/b.png", "not a whole image")
    (tmp_path / "dogs" / "b.png").unlink()
    (tmp_path / "dogs" / "a.png").unlink()
    outcome = run("diffusion", f"--data={tmp_path}", "--size=8", f"--workdir={tmp_path / 'run'}")
    refused(outcome, 3, "class 'dogs' has no images")
