import numpy as np
import pytest

from research.data.batches import Batches, eval_batches, permutation
from research.errors import DataError, FlagError

PINNED = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7], [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]


def arrays(rows: int = 23, width: int = 12, left: bool = False) -> dict[str, np.ndarray]:
    """Rows of 1 to `width` real tokens, numbered so that every token tells its row and place."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, width + 1, rows)
    mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
    mask = mask[:, ::-1].copy() if left else mask
    tokens = (np.arange(rows)[:, None] * 100 + np.arange(width) + 1) * mask
    return {"tokens": tokens.astype(np.int32), "mask": mask, "row": np.arange(rows)}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_every_row_comes_exactly_once_an_epoch():
    data = Batches(arrays(), batch_size=4, seed=3)
    stream = np.concatenate([batch["row"].ravel() for batch in data.stream(0, 23)])  # 92 rows: four epochs
    epochs = stream.reshape(4, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_resumed_stream_is_the_unbroken_one():
    unbroken = list(Batches(arrays(), 5, seed=1).stream(0, 12))
    resumed = list(Batches(arrays(), 5, seed=1).stream(0, 7)) + list(Batches(arrays(), 5, seed=1).stream(7, 12))
    assert all(equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


def test_a_batch_does_not_depend_on_those_before():
    data = Batches(arrays(), 5, seed=1)
    late = data.batch(9)
    data.batch(2)
    assert equal(late, Batches(arrays(), 5, seed=1).batch(9)) and equal(late, data.batch(9))


def test_the_order_is_pinned():
    """Literal values: a checkpoint's step must mean the same rows under any NumPy."""
    assert permutation(0, 0, 10).tolist() == PINNED[0]
    assert permutation(7, 2, 10).tolist() == PINNED[1]


def test_seeds_differ():
    orders = {tuple(Batches(arrays(), 23, seed).indices(0)) for seed in (0, 1, 2, -1)}
    assert len(orders) == 4


def test_without_shuffle_rows_keep_their_order():
    data = Batches(arrays(), 10, shuffle=False)
    assert np.concatenate([data.indices(0), data.indices(1), data.indices(2)]).tolist() == [*range(23), *range(7)]


def test_micro_batches_are_the_whole_batch_divided():
    whole, divided = Batches(arrays(), 6, 2).batch(5), Batches(arrays(), 6, 2, micro_batches=3).batch(5)
    assert whole["tokens"].shape == (1, 6, 12) and divided["tokens"].shape == (3, 2, 12)
    assert equal(whole, {name: leaf.reshape(1, 6, *leaf.shape[2:]) for name, leaf in divided.items()})


def test_several_seeds_stack_single_ones():
    several = Batches(arrays(), 4, seed=(5, 6, 9), micro_batches=2)
    for step in (0, 5, 6):
        batch = several.batch(step)
        assert batch["tokens"].shape == (3, 2, 2, 12) and batch["weight"].shape == (3, 2, 2)
        for place, seed in enumerate((5, 6, 9)):
            alone = Batches(arrays(), 4, seed=seed, micro_batches=2).batch(step)
            assert equal(alone, {name: leaf[place] for name, leaf in batch.items()})


@pytest.mark.parametrize("left", [False, True])
def test_trimming_takes_away_padding_only(left):
    plain, trimmed = Batches(arrays(left=left), 2, 1), Batches(arrays(left=left), 2, 1, trim_multiple=4)
    widths = set()
    for step in range(12):
        full, cut = plain.batch(step), trimmed.batch(step)
        width = cut["tokens"].shape[-1]
        longest = full["mask"].sum(-1).max()
        assert width == -(-longest // 4) * 4 and cut["mask"].shape == cut["tokens"].shape
        kept, gone = (slice(12 - width, 12), slice(0, 12 - width)) if left else (slice(0, width), slice(width, 12))
        assert np.array_equal(cut["tokens"], full["tokens"][..., kept]) and not full["mask"][..., gone].any()
        widths.add(width)
    assert widths == {4, 8, 12}  # else this test saw no trimming


def test_evaluation_sees_every_row_once():
    found = list(eval_batches(arrays(), 5, trim_multiple=4))
    assert len(found) == 5 and all(batch["row"].shape == (5,) for batch in found)
    rows = np.concatenate([batch["row"] for batch in found])
    weights = np.concatenate([batch["weight"] for batch in found])
    assert weights.dtype == np.float32 and set(weights.tolist()) == {0.0, 1.0}
    assert rows[weights == 1].tolist() == list(range(23)) and weights[23:].tolist() == [0, 0]
    assert all(batch["mask"].any(axis=1).all() for batch in found)  # no row without a real token


def test_given_weights_are_kept():
    data = arrays() | {"weight": np.linspace(1, 2, 23, dtype=np.float32)}
    batch = Batches(data, 23, 4).batch(0)
    assert np.array_equal(batch["weight"], data["weight"][batch["row"]])
    assert next(eval_batches(data, 30))["weight"][22:].tolist() == [2] + [0] * 7
    assert data["weight"][0] == 1


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"batch_size": 24}, FlagError, "1 to 23"),
        ({"batch_size": 0}, FlagError, "1 to 23"),
        ({"batch_size": 6, "micro_batches": 4}, FlagError, "1, 2, 3, 6"),
        ({"trim_multiple": 0}, FlagError, "trim_multiple"),
        ({"arrays": {}}, DataError, "no rows"),
        ({"arrays": {"a": np.zeros(3), "b": np.zeros(4)}}, DataError, "a 3, b 4"),
    ],
)
def test_what_cannot_be_batched_is_named(change, error, words):
    with pytest.raises(error, match=words):
        Batches(**{"arrays": arrays(), "batch_size": 4} | change)
