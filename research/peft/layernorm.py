"""LayerNorm tuning: only the norms' gains and biases train (Zhao et al., arXiv 2312.11420; the LN rows of arXiv
1902.00751).

    before  {"params": {..., "attn_norm": {"scale", "bias"}}}
    after   {"params": {..., "attn_norm": {"scale" (trained), "bias" (trained)}}}

Every norm of the model: those of the layers, of the embeddings, and the last one.
"""

from collections.abc import Callable

from research.peft.method import Card, Method, PyTree, Variables, base_leaves, either, trained_fields

CARD = Card(paper="2312.11420", kind="selective", memory="yes", inference="none")
NORMS = r"\w*norm/(scale|bias)"


def layernorm() -> Method:
    """Trains every layer norm or RMS norm of the base; nothing is added."""

    def trainable(variables: Variables) -> PyTree:
        return base_leaves(NORMS, variables)

    return Method(init=lambda rng, sites: {}, trainable=trainable)


def with_norms(norms: bool) -> Callable[[Variables], PyTree] | None:
    """What trains of a method that adds nodes: their fields, and the base's layer norms where asked for."""
    return (lambda variables: either(trained_fields(variables), base_leaves(NORMS, variables))) if norms else None
