"""Cross-attention tuning: only the attention from decoder to encoder trains (Gheini et al., arXiv 2104.08771).

    before  {"params": {"decoder": {"layers": {"cross_attn": {"q": {"kernel"}, "k", "v", "o"}}}}}
    after   the same, with every leaf under "cross_attn" trained

The projections alone. The paper, which moves a translation model to another language, also trains new embeddings of
that language: `cross_attention+trainable_tokens:rows=...` is near it. A model without cross-attention is refused.
"""

from research.errors import FlagError
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Variables, base_leaves

CARD = Card(paper="2104.08771", kind="selective", memory="yes", inference="none")


def cross_attention() -> Method:
    """Trains the cross-attention of the base; nothing is added.

    Raises FlagError where the model has none.
    """

    def trainable(variables: Variables) -> PyTree:
        mask = base_leaves("cross_attn/.*", variables)
        if not any(tree.paths(mask).values()):
            raise FlagError(
                "cross_attention: this model has no cross-attention, so there is nothing to train. "
                "Valid: an encoder-decoder model (T5), or another method, such as --peft=last_layers."
            )
        return mask

    return Method(init=lambda rng, sites: {}, trainable=trainable)
