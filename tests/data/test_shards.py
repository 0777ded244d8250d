import numpy as np
import pytest

from research.data import shards
from research.errors import DataError, FlagError, ModelError

TOKENS = np.arange(100)


def test_tokens_come_back_in_the_smallest_type(tmp_path):
    shards.write(tmp_path / "s", {"train": (TOKENS, 250), "validation": (TOKENS[:7], 9)}, 2**16)
    found = shards.load(tmp_path / "s", "train")
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.dtype == np.uint16
    assert np.array_equal(found.tokens, TOKENS)
    assert found.bytes_per_token == 2.5
    shards.write(tmp_path / "s", {"train": (TOKENS + 2**16, 250)}, 2**17)
    assert shards.load(tmp_path / "s", "train").tokens.dtype == np.uint32


def test_altered_missing_and_foreign_directories_are_named(tmp_path):
    shards.write(tmp_path / "s", {"train": (TOKENS, 250)}, 100)
    with pytest.raises(DataError, match="Did you mean 'train'"):
        shards.load(tmp_path / "s", "trian")
    path = tmp_path / "s" / "train.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="altered or cut short"):
        shards.load(tmp_path / "s", "train")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        shards.load(tmp_path / "s", "train")
    (tmp_path / "s" / "index.json").write_text("{")
    with pytest.raises(DataError, match="index.json is broken"):
        shards.load(tmp_path / "s", "train")
    with pytest.raises(DataError, match="holds no token shards"):
        shards.load(tmp_path, "train")
    with pytest.raises(ModelError, match="holds something else"):
        shards.write(tmp_path, {"train": (TOKENS, 250)}, 100)
    with pytest.raises(DataError, match="outside the vocabulary of 99"):
        shards.write(tmp_path / "t", {"train": (TOKENS, 250)}, 99)


def test_windows_are_a_function_of_seed_and_step():
    windows = shards.Windows(TOKENS, length=8, batch_size=4, seed=3, micro_batches=2)
    unbroken, resumed = list(windows.stream(0, 6)), list(windows.stream(4, 6))
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(unbroken[4:], resumed, strict=True))
    tokens = unbroken[0]["tokens"]
    assert tokens.shape == (2, 2, 9)
    assert (np.diff(tokens) == 1).all()
    other = shards.Windows(TOKENS, 8, 4, seed=4).batch(0)["tokens"]
    assert not np.array_equal(tokens.ravel(), other.ravel())
    starts = np.concatenate([windows.starts(step) for step in range(600)])
    assert set(starts) == set(range(92))  # the last window ends with the last token
    for bad in [dict(length=100, batch_size=4), dict(length=8, batch_size=4, micro_batches=3)]:
        with pytest.raises(FlagError):
            shards.Windows(TOKENS, **bad)


@pytest.mark.parametrize("length", [1, 7, 33, 99, 120])
def test_evaluation_predicts_every_token_but_the_first_once(length):
    rows = shards.consecutive(TOKENS, length)
    predicted = rows["tokens"][:, 1:][rows["mask"][:, 1:] == 1]
    assert np.array_equal(predicted, TOKENS[1:])
    assert (rows["mask"][:, :2] == 1).all()
