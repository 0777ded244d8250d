"""Captions as vectors, by a sentence encoder: what a denoiser is told that was trained with --condition=text.

A caption's vector is the mean of the encoder's last hidden states over its tokens, as the packaged MiniLM was trained
to be read (Sentence-BERT, arXiv 1908.10084, section 3), at the length sqrt(E): its features then have the size of a
network's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.convert import load
from research.convert.load import Pretrained
from research.data import tokenize
from research.data.batches import eval_batches
from research.errors import DataError, ModelError

LENGTH = 32  # tokens that are read of a caption


class Encoder(NamedTuple):
    """A model that reads sentences in both directions; mean: its batch -> fp32 [B, E]."""

    base: Pretrained
    mean: Callable[[dict[str, np.ndarray]], jax.Array]


@functools.lru_cache(maxsize=1)
def encoder(name: str) -> Encoder:
    """Raises ModelError for a model that is no such encoder."""
    base = load.load(name)
    if base.tokenizer is None or base.config.family != "bert":
        raise ModelError(f"captions are read by a BERT with its tokenizer: {name} is none. Valid: minilm-l6.")

    @jax.jit
    def mean(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = jnp.sum(base.model.apply({"params": params}, tokens, mask) * mask[..., None], axis=1)
        return x * x.shape[-1] ** 0.5 / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return Encoder(base, lambda batch: mean(base.params, batch["tokens"], batch["mask"]))


def encode(name: str, texts: Sequence[str]) -> np.ndarray:
    """Texts -> fp32 [N, E]. Raises DataError for an empty one, ModelError as `encoder` does."""
    if empty := [n for n, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"caption {empty[0] + 1} of {len(texts)} is empty: every image needs one.")
    found, each = encoder(name), sorted(set(texts))
    batches = eval_batches(tokenize.encode(found.base.tokenizer, each, LENGTH), 64)
    vectors = np.concatenate([np.asarray(found.mean(batch)) for batch in batches])
    return vectors[np.searchsorted(each, texts)]
