"""A corpus of plain text as tokens on disk, with what a model of it has to beat."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from experiments.shared import common
from research.convert.load import Pretrained
from research.data import bpe, corpus, shards

ORDER = 5  # of the byte model: n - 1 bytes of context


class Text(NamedTuple):
    """Parts train, validation and test, memory-mapped; the bits a byte that gzip and a byte model need for the last two
    (`baselines`); the digest of all tokens.
    """

    tokenizer: Any
    parts: dict[str, shards.Shard]
    baselines: dict[str, dict[str, float]]
    fingerprint: str


def prepare(source: str, folder: Path, vocab_size: int, base: Pretrained | None = None) -> Text:
    """Loads a corpus and encodes it, with the base's tokenizer or with one of at most `vocab_size` tokens that is
    trained on the training part. What `folder` holds of the same documents and tokenizer is taken as it is:

        folder/text.json, tokenizer.json (a trained one), tokens/{index.json, train.npy, validation.npy, test.npy}

    Raises DataError as `corpus.load` does.
    """
    documents = corpus.load(source)
    digest = hashlib.sha256(repr(sorted(documents.items())).encode()).hexdigest()
    made_of = {"documents": digest, "tokenizer": base.fingerprint if base else f"BPE, {vocab_size}"}
    record, file, tokens = folder / "text.json", folder / "tokenizer.json", folder / "tokens"
    if not record.exists() or common.read_json(record, made_of=dict, baselines=dict)["made_of"] != made_of:
        print(f"encoding {source} ...", flush=True)
        tokenizer = base.tokenizer if base else bpe.train(documents["train"], vocab_size)
        encoded = {part: bpe.encode(tokenizer, texts) for part, texts in documents.items()}
        shards.write(tokens, encoded, base.config.vocab_size if base else len(tokenizer))
        if base is None:
            bpe.save(tokenizer, file)
        common.write_json(record, {"made_of": made_of, "baselines": baselines(documents)})
    tokenizer = base.tokenizer if base else bpe.load(file)
    if base is None:
        tokenizer.bos_token = tokenizer.eos_token  # as GPT-2's: a text begins where another has ended
    return Text(
        tokenizer,
        {part: shards.load(tokens, part) for part in documents},
        common.read_json(record)["baselines"],
        hashlib.sha256((tokens / "index.json").read_bytes()).hexdigest(),
    )


def baselines(documents: dict[str, tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Bits a byte of the held-out parts: by gzip, each part alone, and by a byte model of the training part."""
    joined = {part: "".join(texts).encode() for part, texts in documents.items()}
    model = bpe.ByteModel(joined.pop("train"), ORDER)
    return {part: {"gzip": bpe.gzip_bits(whole), "ngram": model.bits(whole)} for part, whole in joined.items()}


def summary(text: Text) -> str:
    """One line: how many tokens each part has, and how many kinds there are."""
    parts = [f"{part} {len(x.tokens):,} tokens of {x.bytes_per_token:.2f} bytes" for part, x in text.parts.items()]
    return f"{', '.join(parts)}; {len(text.tokenizer):,} kinds of token"
