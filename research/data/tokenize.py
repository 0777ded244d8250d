"""Texts to rectangular arrays of token numbers, with masks that come from lengths, never from padding tokens."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from research.errors import DataError

logger = logging.getLogger(__name__)


def encode(
    tokenizer, texts: Sequence[str], max_length: int, *, padding_side: Literal["right", "left"] = "right"
) -> dict[str, np.ndarray]:
    """Returns {"tokens": int32 [N, T], "mask": int32 [N, T]}, mask 1 on real tokens; T is always `max_length`.

    A constant T lets every part of a data set run through one compiled program; `batches` can trim it. A pad token may
    also mean something (SmolLM2 pads with its end of turn), hence masks from lengths.

    Args:
      tokenizer: a `transformers` fast tokenizer; its special tokens are added and survive truncation.
      max_length: longest row in tokens; longer texts are cut, and a warning in the log counts them.

    Raises:
      DataError: a text that gives no token at all.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False).encodings
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = np.full((len(encoded), max_length), pad, np.int32)
    mask = np.zeros_like(tokens)
    for row, encoding in enumerate(encoded):
        count = len(encoding.ids)
        if not count:
            raise DataError(f"text {row + 1} gives no tokens: {texts[row][:40]!r}")
        columns = slice(0, count) if padding_side == "right" else slice(max_length - count, max_length)
        tokens[row, columns] = encoding.ids
        mask[row, columns] = 1
    cut = sum(bool(encoding.overflowing) for encoding in encoded)
    if cut:
        logger.warning("%d of %d texts cut to %d tokens", cut, len(encoded), max_length)
    return {"tokens": tokens, "mask": mask}
