"""LoRA-FA: LoRA whose random A stays frozen (Zhang et al., arXiv 2308.03303, section 3).

    h = x W + (alpha / r) x A B,    only B trains

    after   peft {"q": {"lora_fa": LoraB(a[L, in, r], b[L, r, out], scale[L])}}

A is drawn as LoRA's, but from `seed` and not from the run's key, so that adapters need not store it. The gradient of B
is as it comes, where Hugging Face's optimiser for LoRA-FA multiplies it by (A'A)^-1.
"""

from typing import ClassVar

import jax

from research.peft.lora import Lora, loras
from research.peft.method import Card, Method, PyTree, Sites, at_least

CARD = Card(paper="2308.03303", kind="reparametrisation")


class LoraB(Lora):
    """b [r, out] trains; a [in, r] is frozen."""

    trained: ClassVar[tuple[str, ...]] = ("b",)


def lora_fa(
    rank: int = 8, alpha: float = 16.0, targets: str = "attn/(q|v)", dropout: float = 0.0, seed: int = 0
) -> Method:
    """LoRA with a frozen A.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
        seed: of A.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("seed", seed, 0)
    start = loras("lora_fa", rank, alpha, targets, dropout, make=lambda site, a, b, scale: LoraB(a, b, scale, dropout))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return start(jax.random.key(seed), sites)

    return Method(init)
