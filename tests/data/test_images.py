"""Image sets: reading, splits that depend on content alone, few-shot subsets, and what is refused."""

import gzip

import datasets
import numpy as np
import pytest
from PIL import Image

from research.data import images
from research.errors import DataError


def small(rows: int = 60, classes: int = 3) -> images.Images:
    rng = np.random.default_rng(0)
    labels = np.arange(rows, dtype=np.int32) % classes
    names = tuple("abc"[:classes])
    pixels = rng.integers(0, 256, (rows, 4, 4, 1)).astype(np.uint8)
    return images.Images(pixels, labels, names, tuple(f"{names[k]} {i}" for i, k in enumerate(labels)))


def rows_of(data: images.Images) -> set[bytes]:
    return {x.tobytes() for x in data.images}


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(images.read_idx(path), array)
    path.write_bytes(gzip.compress(idx(array)[:-1]))
    with pytest.raises(DataError, match="cut short"):
        images.read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        images.read_idx(path)


def test_split_depends_on_content_alone():
    data = small()
    train, test = images.split(data, 0.2)
    assert len(test.labels) == 12 and len(train.labels) == 48 and (np.bincount(test.labels) == 4).all()
    assert not rows_of(train) & rows_of(test) and rows_of(train) | rows_of(test) == rows_of(data)
    order = np.random.default_rng(1).permutation(60)
    assert rows_of(images.split(data.take(order), 0.2)[1]) == rows_of(test)
    assert all(data.captions[i] == f"{'abc'[data.labels[i]]} {i}" for i in range(60))
    doubled = images.Images(
        *(np.concatenate([x, x]) for x in (data.images, data.labels)), data.classes, data.captions * 2
    )
    train, test = images.split(doubled, 0.2)
    assert not rows_of(train) & rows_of(test)


def test_few_shot_subsets_are_nested_and_balanced():
    data = small()
    two, five = (images.few_shot(data, shots, seed=3) for shots in (2, 5))
    assert (np.bincount(five.labels) == 5).all() and rows_of(two) < rows_of(five)
    assert rows_of(images.few_shot(data, 5, seed=4)) != rows_of(five)
    assert set(images.few_shot(data, 5, classes=[2]).labels) == {2}
    with pytest.raises(DataError, match="class 'a' has 20 images, fewer than 21"):
        images.few_shot(data, 21)


def test_only_some_classes():
    kept = images.only(small(), [2, 0])
    assert kept.classes == ("c", "a") and len(kept.labels) == 40
    assert all(caption[0] == kept.classes[label] for caption, label in zip(kept.captions, kept.labels, strict=True))


def test_folder(tmp_path):
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            value = i + 10 * (name == "dog")
            Image.new("RGB", (6, 8), (value, value, value)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "1.txt").write_text("A black cat.\n")
    data = images.folder(tmp_path, 4, 3)
    assert data.classes == ("cat", "dog") and data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.captions == ("cat", "A black cat.", "cat", "dog", "dog")
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11] and data.images.shape == (5, 4, 4, 3)
    assert images.folder(tmp_path, None, 1).images.shape == (5, 8, 6, 1)
    train, test = images.load(str(tmp_path), size=4)
    assert len(train.labels) == 3 and len(test.labels) == 2
    (tmp_path / "fox").mkdir()
    with pytest.raises(DataError, match="class 'fox' has no images"):
        images.folder(tmp_path, 4, 3)


def test_image_files(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(path)
    assert (images.read_image(path, None, 3) == 255).all()  # what is transparent is white
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    np.testing.assert_array_equal(images.read_image(path, None, 3), noise)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="x.png: not a whole image"):
        images.read_image(path, None, 3)
    path.write_bytes(b"text")
    with pytest.raises(DataError, match="x.png: not a whole image"):
        images.read_image(path, None, 3)


def test_a_hub_set_has_labels_or_captions(monkeypatch):
    pixels = [Image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(6)]
    columns = {"pic": pixels, "kind": [0, 1] * 3, "caption": [f"red {i}" for i in range(6)], "id": list(range(6))}
    types = {"pic": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    types |= {"caption": datasets.Value("string"), "id": datasets.Value("int64")}

    def hub(*names: str):
        features = datasets.Features({name: types[name] for name in names})
        whole = datasets.Dataset.from_dict({name: columns[name] for name in names}, features)
        monkeypatch.setattr(images.rows, "hub", lambda name, near: datasets.DatasetDict(train=whole, test=whole))
        return images.load("hub:a/b", size=4)[0]

    labelled, captioned, both = hub("pic", "kind"), hub("id", "pic", "caption"), hub("pic", "caption", "kind")
    assert labelled.images.shape == (6, 4, 4, 3) and (labelled.images[2, 0, 0] == (80, 0, 0)).all()
    assert labelled.classes == ("cat", "dog") and labelled.captions[:2] == ("cat", "dog")
    assert captioned.classes == ("image",) and captioned.captions[5] == both.captions[5] == "red 5"
    assert list(both.labels) == [0, 1, 0, 1, 0, 1] and both.classes == ("cat", "dog")
    with pytest.raises(DataError, match="a/b: no columns of images and of class labels or captions among id, pic"):
        hub("id", "pic")
    columns["pic"] = [Image.new("RGB", (6 + i, 4)) for i in range(6)]
    with pytest.raises(DataError, match="a/b: its images have 6 shapes: give a size"):
        hub("pic", "kind"), images.load("hub:a/b")


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'fashion-mnist'"):
        images.load("fashion_mnist")
    with pytest.raises(DataError, match="one folder of images for each class"):
        images.folder(tmp_path, None, 3)
    with pytest.raises(DataError, match="patch 3 does not divide 4x4. Valid: 1, 2, 4"):
        images.fits(small(), 3)
    images.fits(small(), 2)
    with pytest.raises(DataError, match="class 'a' has 1 images"):
        images.split(small(3), 0.5)


@pytest.mark.slow
@pytest.mark.assets
def test_packaged_sets():
    train, test = images.load("fashion-mnist")
    assert train.images.shape == (60000, 28, 28, 1) and test.images.shape == (10000, 28, 28, 1)
    assert (np.bincount(train.labels) == 6000).all() and (np.bincount(test.labels) == 1000).all()
    train, test = images.load("mnist-5k")
    assert (np.bincount(train.labels) == 400).all() and (np.bincount(test.labels) == 100).all()
    assert train.images.dtype == np.uint8 and train.images.max() == 255
    train, test = images.load("emoji")
    assert train.images.shape == (1101, 64, 64, 3) and test.images.shape == (276, 64, 64, 3)
    assert len(train.classes) == 9 and len({*train.captions, *test.captions}) == 1377
    heart = train.images[train.captions.index("red heart")]
    assert (heart[0, 0] == 255).all() and heart[32, 32, 0] > 180 > 100 > heart[32, 32, 1]
