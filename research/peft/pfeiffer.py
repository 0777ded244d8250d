"""Pfeiffer adapters: one bottleneck a layer, after the feed-forward (Pfeiffer et al., arXiv 2005.00247, section 3;
`SeqBn` in AdapterHub).

    y <- y + relu(norm(stream + y) W_down + b_down) W_up + b_up,   then the residual addition and the layer norm

    after   peft {"mlp_residual": {"pfeiffer": Bottleneck(down[L, D, m], down_bias[L, m], up[L, m, D], up_bias[L, D])}}

`norm` is the layer norm that follows the addition in a post-LN model (BERT), nothing in a pre-LN one. AdapterHub's
initialisation is BERT's: N(0, 0.02^2), biases 0.
"""

import jax

from research.peft.houlsby import bottleneck
from research.peft.method import Card, Method, PyTree, Sites, normal, place, select

CARD = Card(paper="2005.00247", kind="additive", memory="yes", inference="extra FFN")


def pfeiffer(width: int = 64, activation: str = "relu", targets: str = "mlp_residual", std: float = 0.02) -> Method:
    """A bottleneck after each feed-forward.

    Args:
        width: m.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        std: of the initial weights.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    node = bottleneck(width, activation, True, normal(std))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "pfeiffer", rng, node)

    return Method(init, identity=False)
