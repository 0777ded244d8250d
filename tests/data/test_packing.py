import numpy as np
import pytest

from research.data.batches import Batches
from research.data.chat import Encoded
from research.data.packing import LEAVES, by_length, efficiency, pack, truncate, unpacked
from research.errors import DataError, FlagError


def examples(sizes):
    """Example n holds the tokens 100n + 1, 100n + 2, ...; its second half is to be learnt."""
    return [
        Encoded(100 * n + 1 + np.arange(size, dtype=np.int32), (np.arange(size) >= size // 2).astype(np.int32))
        for n, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("strategy", ["first_fit", "sequential"])
def test_every_token_is_there_once_in_its_own_segment(strategy):
    sizes = np.random.default_rng(0).integers(1, 17, 60)
    arrays = pack(examples(sizes), 16, strategy)
    assert all(leaf.dtype == np.int32 and leaf.shape == arrays["tokens"].shape for leaf in arrays.values())
    found = {}
    for row, segments in enumerate(arrays["segments"]):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            tokens = arrays["tokens"][row, places]
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(arrays["positions"][row, places], np.arange(len(places)))
            found[int(tokens[0]) // 100] = tokens.tolist(), arrays["loss_mask"][row, places].tolist()
    for n, example in enumerate(examples(sizes)):
        learnt = [0, *example.loss_mask[1:].tolist()]
        assert found[n] == (example.tokens.tolist(), learnt)
    assert np.array_equal(arrays["mask"], arrays["segments"] > 0)
    assert arrays["mask"].sum() == sizes.sum()
    assert not arrays["loss_mask"][arrays["mask"] == 0].any()


def test_first_fit_decreasing_by_hand_and_within_its_bound():
    arrays = pack(examples([5, 7, 3, 2, 8, 4, 1]), 10)  # 8+2, 7+3, 5+4+1
    assert [sorted(set((row[row > 0] // 100).tolist())) for row in arrays["tokens"]] == [[3, 4], [1, 2], [0, 5, 6]]
    assert efficiency(arrays) == 1
    in_order = pack(examples([5, 7, 3, 2, 8, 4, 1]), 10, "sequential")
    assert len(in_order["tokens"]) == 4
    sizes = np.random.default_rng(1).integers(1, 100, 500)
    fewest = -(-sizes.sum() // 128)
    assert len(pack(examples(sizes), 128)["tokens"]) <= 11 / 9 * fewest + 1


def test_unpacked_rows_hold_one_example_each_and_pad_is_never_a_mask():
    rows = unpacked(examples([3, 1]), 4, pad=101)  # the pad token occurs in the text too
    assert rows["tokens"].tolist() == [[1, 2, 3, 101], [101, 101, 101, 101]]
    assert rows["mask"].tolist() == rows["segments"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert rows["loss_mask"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_truncation_is_counted():
    long, short = Encoded(np.arange(8), np.asarray([0] * 5 + [1] * 3)), Encoded(np.arange(3), np.asarray([0, 0, 1]))
    assert truncate([long, short], 4, "drop")[1] == {"kept": 1, "cut": 0, "too long": 1, "nothing to learn": 0}
    kept, counts = truncate([long, short], 4, "left")
    assert kept[0].tokens.tolist() == [4, 5, 6, 7]
    assert counts == {"kept": 1, "cut": 1, "too long": 0, "nothing to learn": 0}
    assert truncate([long, short], 4, "right")[1]["nothing to learn"] == 1
    assert truncate([long, short], 7, "right")[0][0].tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_bad_calls_are_named():
    for call, error, said in [
        (lambda: truncate(examples([5]), 4, "drop"), DataError, "no example is left at 4 tokens"),
        (lambda: truncate(examples([5]), 4, "lefft"), FlagError, "Did you mean 'left'"),
        (lambda: pack(examples([3, 5]), 4), DataError, "example 2 has 5 tokens, a row 4"),
        (lambda: pack([], 4), DataError, "no examples"),
        (lambda: pack(examples([3]), 4, "sequentiel"), FlagError, "Did you mean 'sequential'"),
        (lambda: by_length([1, 2], 3, 0, 0), FlagError, "1 to 2"),
    ]:
        with pytest.raises(error, match=said):
            call()


def test_packed_rows_make_batches_of_a_step():
    arrays = pack(examples([3, 4, 5, 6, 7, 2, 9, 3]), 10)
    first, again = (Batches(arrays, 2, seed=1, trim_multiple=1, token_leaves=LEAVES).batch(5) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in LEAVES)
    assert {first[name].shape for name in LEAVES} == {first["tokens"].shape}


def test_batches_by_length_take_every_row_once_an_epoch_and_waste_less():
    sizes = np.random.default_rng(2).integers(1, 200, 64)
    epoch = [by_length(sizes, 8, seed=3, step=step) for step in range(8, 16)]
    assert sorted(np.concatenate(epoch)) == list(range(64))
    assert not np.array_equal(epoch[0], by_length(sizes, 8, seed=3, step=0))
    padded = sum(8 * sizes[rows].max() for rows in epoch)
    assert padded < 1.2 * sizes.sum()
