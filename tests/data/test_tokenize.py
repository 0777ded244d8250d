import numpy as np
import pytest

from research.data import smoke
from research.data.tokenize import encode
from research.errors import DataError

TEXTS = ["Her garden was far too loud.", "The museum", "her garden made everybody smile."]


def test_rows_hold_the_tokenizers_ids_and_masks_their_lengths():
    tokenizer = smoke.smoke_tokenizer()
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    for side in ("right", "left"):
        found = encode(tokenizer, TEXTS, 12, padding_side=side)
        assert found["tokens"].shape == found["mask"].shape == (3, 12)
        assert found["tokens"].dtype == found["mask"].dtype == np.int32
        for row, ids in enumerate(expected):
            assert found["tokens"][row][found["mask"][row] == 1].tolist() == ids
            edge = found["mask"][row, : len(ids)] if side == "right" else found["mask"][row, 12 - len(ids) :]
            assert edge.all() and found["mask"][row].sum() == len(ids)


def test_the_mask_does_not_come_from_pad_tokens():
    tokenizer = smoke.smoke_tokenizer()
    tokenizer.pad_token = "[SEP]"  # as models do that pad with their end token
    found = encode(tokenizer, TEXTS, 12)
    assert found["mask"].sum(axis=1).tolist() == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert (found["tokens"][found["mask"] == 0] == tokenizer.sep_token_id).all()


def test_cut_texts_are_counted_and_keep_their_last_token(caplog):
    tokenizer = smoke.smoke_tokenizer()
    found = encode(tokenizer, TEXTS, 6)
    assert "2 of 3 texts cut to 6 tokens" in caplog.text
    assert found["tokens"][0, -1] == tokenizer.sep_token_id and found["mask"].sum(axis=1).tolist() == [6, 4, 6]
    caplog.clear()
    encode(tokenizer, TEXTS, 12)
    assert not caplog.records


def test_a_text_without_tokens_is_refused():
    tokenizer = smoke.smoke_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="text 2 gives no tokens"):
        encode(tokenizer, ["garden", " "], 6)
