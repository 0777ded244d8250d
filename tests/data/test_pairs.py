import json

import numpy as np
import pytest

from research.data import pairs
from research.errors import DataError, FlagError


def test_published_pairs_of_both_forms_are_read_and_equal_answers_dropped(tmp_path):
    turns = [{"from": "human", "value": "q"}]
    records = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": turns, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": "q", "chosen": "a ", "rejected": " a"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    kept, dropped = pairs.load(str(path))
    assert [(p.prompt, p.chosen, p.rejected) for p in kept] == [(({"role": "user", "content": "q"},), "a", "b")] * 2
    assert dropped == {"both answers are the same": 1, "no answer": 1, "an empty message": 1}
    path.write_text('{"prompt": "q", "better": "a"}')
    with pytest.raises(DataError, match=r"pairs.jsonl:1: expected prompt, chosen and rejected, found prompt, better"):
        pairs.load(str(path))


def test_preference_is_the_mann_whitney_statistic():
    assert pairs.preference([1, 2], [2, 0]) == (0 + 1 + 0.5 + 1) / 4
    a, b = np.asarray([3, 1, 4, 1]), np.asarray([2, 2, 0])
    assert pairs.preference(a, b) + pairs.preference(b, a) == 1
    assert pairs.preference([4, 4], [-4]) == 1


def test_soft_pairs_are_of_two_texts_and_the_same_for_a_seed():
    rated = [(f"text {n}", np.full(3, n - 2)) for n in range(5)]
    found, again, other = (pairs.pair_up(rated, 500, seed) for seed in (7, 7, 8))
    assert (found.first != found.second).all()
    assert set(found.first) == set(found.second) == set(range(5))
    assert np.array_equal(found.probability, (found.first > found.second).astype(np.float32))
    assert np.array_equal(found.first, again.first)
    assert not np.array_equal(found.first, other.first)
    with pytest.raises(FlagError, match="1 pair of 2 texts"):
        pairs.pair_up(rated[:1], 3)
    with pytest.raises(DataError, match="rated twice"):
        pairs.pair_up([rated[0], rated[0]], 3)


@pytest.mark.assets
@pytest.mark.slow
def test_the_packaged_pairs_have_their_published_counts():
    for source in pairs.PACKAGED:
        kept, dropped = pairs.load(source)
        assert len(kept) + sum(dropped.values()) == 300
        assert len(kept) > 290
    judged, dropped = pairs.judged()
    assert len(judged) + sum(dropped.values()) == 300
    soft = pairs.soft_pairs("vader/movie", 4000, seed=1)
    clear = np.mean(np.abs(2 * soft.probability - 1) >= 0.5)
    assert 0.6 < clear < 0.8  # .69 of random pairs have a clear majority
