import numpy as np
import pytest

from research.data import bpe
from research.errors import DataError, FlagError

TEXTS = ["the cat sat on the mat, the cat ate the rat"] * 3 + ["猫在垫子上。猫在垫子上。"]


def test_a_trained_tokenizer_is_saved_loaded_and_loses_nothing(tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained = bpe.train(TEXTS, 280, special=(bpe.END, "<pad>"))
    bpe.save(trained, tmp_path / "tokenizer.json")
    for loaded in (
        bpe.load(tmp_path / "tokenizer.json"),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    ):
        for text in [*TEXTS, " Ünseen\n\t🙂 text "]:
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            assert loaded.decode(ids) == text
            assert ids == trained(text, add_special_tokens=False)["input_ids"]
    assert 258 < len(trained) <= 280
    assert trained.eos_token_id == 0
    with pytest.raises(FlagError, match="at least 257"):
        bpe.train(TEXTS, 256)
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(DataError, match="no tokenizer.json"):
            bpe.load(tmp_path / name)


def test_documents_end_with_their_token_and_bytes_are_counted():
    plain = bpe.train([], 257)  # no merges: one token a byte
    tokens, size = bpe.encode(plain, ["ab", "猫"])
    assert size == 2 + 3
    assert len(tokens) == size + 2
    assert tokens[2] == tokens[-1] == plain.eos_token_id
    assert len(bpe.encode(bpe.train(TEXTS, 300), TEXTS)[0]) < sum(len(text.encode()) for text in TEXTS)


def witten_bell(train: bytes, context: bytes, byte: int) -> float:
    """The equation of the module, one probability at a time."""
    lower = witten_bell(train, context[1:], byte) if context else 1 / 256
    follow = [train[i + len(context)] for i in range(len(train) - len(context)) if train[i:].startswith(context)]
    if not follow:
        return lower
    kinds = len(set(follow))
    return (follow.count(byte) + kinds * lower) / (len(follow) + kinds)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_byte_model_is_its_equation(order):
    train, text = TEXTS[0].encode(), b"the rat sat, zzz the cat"
    found = bpe.ByteModel(train, order).probabilities(text)
    wanted = [witten_bell(train, text[max(0, i - order + 1) : i], byte) for i, byte in enumerate(text)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    chances = [bpe.ByteModel(train, order).probabilities(b"the " + bytes([byte]))[-1] for byte in range(256)]
    assert sum(chances) == pytest.approx(1)


def test_baselines_at_their_limits():
    noise = np.random.default_rng(0).integers(0, 256, 20000, np.uint8).tobytes()
    assert bpe.gzip_bits(noise) == pytest.approx(8, abs=0.02)
    assert bpe.ByteModel(noise, 3).bits(noise[::-1]) > 8
    assert bpe.gzip_bits(b"ab" * 10000) < 0.05
    assert bpe.ByteModel(b"ab" * 10000, 5).bits(b"ab" * 100) < 0.1
    assert bpe.ByteModel(b"", 5).bits(b"abc") == 8
    with pytest.raises(FlagError, match="1 to 7"):
        bpe.ByteModel(b"ab", 8)
