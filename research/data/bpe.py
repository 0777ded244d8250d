"""A byte-level BPE tokenizer trained on one's own text, and what a model of that text has to beat.

Byte-level BPE (Radford et al. 2019, section 2.2): merges over the bytes of UTF-8, so that no text is unknown.

Baselines, in bits a byte: gzip, and the order-n byte model of Witten & Bell (1991) interpolated to the uniform one,

    p(c | h) = (N(h c) + D(h) p(c | h without its first byte)) / (N(h) + D(h)),    p(c) below order 1 = 1 / 256

N counts, D(h) how many different bytes have followed h. Witten-Bell rather than Kneser-Ney: no discount to estimate.
"""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from research.errors import DataError, FlagError
from research.files import write_text

END = "<|endoftext|>"


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END,)):
    """Returns a PreTrainedTokenizerFast of at most `vocab_size` tokens, the 256 bytes and `special` among them.

    The first special token is its end-of-text and pad token. Raises FlagError for a vocabulary that is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(special)
    if vocab_size < least or not special:
        raise FlagError(f"vocab_size is {vocab_size}; 256 bytes and 1 or more special tokens need at least {least}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _fast(bpe, special[0])


def save(tokenizer, path: Path) -> None:
    """Writes tokenizer.json atomically."""
    write_text(Path(path), tokenizer.backend_tokenizer.to_str())


def load(path: Path, end: str = END):
    """Returns the tokenizer of a tokenizer.json. Raises DataError: missing or broken, or it lacks the token `end`."""
    from tokenizers import Tokenizer

    try:
        bpe = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(f"{path} is no tokenizer.json: {str(error).splitlines()[0]}") from error
    if bpe.token_to_id(end) is None:
        raise DataError(f"{path} has no token {end!r}")
    return _fast(bpe, end)


def encode(tokenizer, documents: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns the tokens [N] uint32 of all documents, an end-of-text token after each, and their bytes of UTF-8."""
    end = tokenizer.eos_token_id
    rows = tokenizer(list(documents), add_special_tokens=False)["input_ids"] if documents else []
    tokens = np.fromiter((token for row in rows for token in (*row, end)), np.uint32)
    return tokens, sum(len(document.encode()) for document in documents)


def gzip_bits(text: bytes) -> float:
    """Bits a byte of `text` packed by gzip at its highest level."""
    if not text:
        raise DataError("no text to pack")
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


class ByteModel:
    """The Witten-Bell byte model of order n (n - 1 bytes of context), 1 to 7. Raises FlagError for another order."""

    def __init__(self, text: bytes, order: int = 5):
        if not 1 <= order <= 7:
            raise FlagError(f"order is {order}; it may be 1 to 7")
        self.order, self.tables = order, []
        for n in range(1, order + 1):
            grams, counts = np.unique(_grams(text, n), return_counts=True)
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            distinct = np.diff([*first, len(grams)])
            totals = np.add.reduceat(counts, first) if len(first) else counts
            self.tables.append((grams, counts, contexts, totals, distinct))

    def probabilities(self, text: bytes) -> np.ndarray:
        """Returns p of every byte of `text` given up to n - 1 bytes before it, float64 [len(text)]."""
        chance = np.full(len(text), 1 / 256)
        for n, (grams, counts, contexts, totals, distinct) in enumerate(self.tables, 1):
            found = _grams(text, n)
            seen = _look_up(grams, counts, found)
            total, kinds = (_look_up(contexts, values, found >> np.uint64(8)) for values in (totals, distinct))
            here = slice(n - 1, None)  # bytes with less context keep their lower order
            known = total > 0
            mixed = (seen + kinds * chance[here]) / np.where(known, total + kinds, 1)
            chance[here] = np.where(known, mixed, chance[here])
        return chance

    def bits(self, text: bytes) -> float:
        """Bits a byte of `text` under this model."""
        return float(-np.log2(self.probabilities(text)).mean())


def _fast(bpe, end: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def _grams(text: bytes, n: int) -> np.ndarray:
    """Returns every run of n bytes as a number, uint64 [len(text) - n + 1]."""
    letters = np.frombuffer(text, np.uint8).astype(np.uint64)
    count = max(0, len(letters) - n + 1)
    grams = np.zeros(count, np.uint64)
    for offset in range(n):
        grams = (grams << np.uint64(8)) | letters[offset : offset + count]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns the value of each of `found`, 0 where it is no key."""
    if not len(keys):
        return np.zeros(len(found), np.int64)
    places = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
    return np.where(keys[places] == found, values[places], 0)
