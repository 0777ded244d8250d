"""LoRA+: LoRA whose B learns faster than its A (Hayou et al., arXiv 2402.12354, section 4).

    A <- A - eta u_A,    B <- B - lambda eta u_B,    u the optimiser's updates

    after   peft {"q": {"lora_plus": Lora(a[L, in, r], b[L, r, out], scale[L])}}

All else is LoRA's. lambda = 2^4 is the ratio that the paper recommends; it may want a smaller rate eta than LoRA.
"""

import jax

from research.errors import FlagError
from research.peft import tree
from research.peft.lora import Lora, loras
from research.peft.method import Card, Method, PyTree, Variables, is_node

CARD = Card(paper="2402.12354", kind="reparametrisation")


def lora_plus(
    rank: int = 8, alpha: float = 16.0, targets: str = "attn/(q|v)", dropout: float = 0.0, ratio: float = 16.0
) -> Method:
    """LoRA with two learning rates.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
        ratio: lambda, B's learning rate in units of A's.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    if not ratio > 0:
        raise FlagError(f"ratio={ratio} is out of range: it is above 0, such as 16.")

    def rates(variables: Variables) -> PyTree:
        of = lambda node: tree.constant(node, 1.0).replace(b=ratio) if isinstance(node, Lora) else 1.0  # noqa: E731
        return tree.constant(variables, 1.0) | {"peft": jax.tree.map(of, variables["peft"], is_leaf=is_node)}

    return Method(loras("lora_plus", rank, alpha, targets, dropout), rates=rates)
