"""rsLoRA: LoRA whose scale keeps the update's size at every rank (Kalajdzievski, arXiv 2312.03732, theorem 3.2).

    h = x W + (alpha / sqrt(r)) x A B

    after   peft {"q": {"rslora": Lora(a[L, in, r], b[L, r, out], scale[L])}}

All else is LoRA's.
"""

from research.peft.lora import loras
from research.peft.method import Card, Method

CARD = Card(paper="2312.03732", kind="reparametrisation")


def rslora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "attn/(q|v)",
    dropout: float = 0.0,
    rank_pattern: str = "",
    alpha_pattern: str = "",
) -> Method:
    """LoRA with alpha over the root of the rank.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / sqrt(rank).
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
        rank_pattern: other ranks for some of the sites, as in mlp/up:16|attn/(q|v):4; the first match counts.
        alpha_pattern: other alphas, likewise.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    scale = lambda alpha, rank: alpha / rank**0.5  # noqa: E731
    return Method(loras("rslora", rank, alpha, targets, dropout, rank_pattern, alpha_pattern, scale=scale))
