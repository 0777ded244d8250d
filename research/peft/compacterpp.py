"""Compacter++: Compacter after the feed-forward alone (Karimi Mahabadi et al., arXiv 2106.04647, section 4).

    after   peft {"reparam": {"compacter": Rule(rule[n, n, n])}, "mlp_residual": {"compacter": Compacter(...)}}

Everything but the place is `compacter`'s, so that half the adapters remain.
"""

from research.peft.compacter import compacter
from research.peft.method import Card, Method

CARD = Card(paper="2106.04647", kind="hybrid", memory="yes", inference="extra FFN")


def compacterpp(
    reduction: int = 32,
    division: int = 4,
    rank: int = 1,
    activation: str = "gelu",
    norms: bool = True,
    std: float = 0.01,
) -> Method:
    """A Compacter layer after each feed-forward.

    Args:
        reduction: D / m.
        division: n, a divisor of D.
        rank: r, at most the smaller side of a B_i.
        activation: gelu, relu, swish or tanh.
        norms: whether the layer norms train too, as the paper has it.
        std: of the initial A.
    Raises FlagError for a value out of range.
    """
    return compacter(reduction, division, rank, activation, "mlp_residual", norms, std)
