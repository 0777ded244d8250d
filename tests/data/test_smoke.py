import collections

from research.data import smoke, text
from research.data.tokenize import encode


def test_two_hundred_distinct_sentences_in_balance():
    found = list(smoke.sentences())
    assert len({sentence for sentence, _ in found}) == len(found) == 200
    assert collections.Counter(name for _, name in found) == {"negative": 100, "positive": 100}


def test_the_split_leaves_enough_of_both_classes_to_test():
    splits = text.load("smoke")
    for part in (splits.validation, splits.test):
        counts = collections.Counter(part.labels.tolist())
        assert len(part) >= 15 and min(counts.values()) >= 8, counts
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 200


def test_the_tokenizer_knows_every_word():
    tokenizer = smoke.smoke_tokenizer()
    found = encode(tokenizer, [sentence for sentence, _ in smoke.sentences()], 16)
    assert not (found["tokens"] == tokenizer.unk_token_id).any()
    assert (found["tokens"][:, 0] == tokenizer.cls_token_id).all()
    assert tokenizer("zebra")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.decode(tokenizer("Her garden made everybody smile.")["input_ids"], skip_special_tokens=True) == (
        "her garden made everybody smile ."
    )
