"""BitFit: only the biases train (Ben Zaken et al., arXiv 2106.10199).

    before  {"params": {..., "attn": {"q": {"kernel", "bias"}}}}
    after   {"params": {..., "attn": {"q": {"kernel", "bias" (trained)}}}}

Every parameter called bias: q, k, v, the attention's output, both layer norms, both feed-forward projections, the
embeddings' norm and the pooler. Layer-norm gains stay frozen, as in the authors' code. The paper's partial form has the
biases of the query and of the first feed-forward projection (b_q and b_m2, "query intermediate"), which is
`targets=attn/q|mlp/up`; the authors' code always trains the pooler's bias with them, which is
`targets=attn/q|mlp/up|pooler`. A model without biases (LLaMA) is refused.
"""

from research.errors import FlagError
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Variables, base_leaves

CARD = Card(paper="2106.10199", kind="selective", memory="yes", inference="none")


def bitfit(targets: str = ".*") -> Method:
    """Trains biases.

    Args:
        targets: pattern of the path of what owns the bias; the paper's partial form is "attn/q|mlp/up".
    Raises FlagError where the model has no such bias.
    """

    def trainable(variables: Variables) -> PyTree:
        mask = base_leaves(rf"(?:{targets})/bias", variables)
        if not any(tree.paths(mask).values()):
            biases = [path for path in tree.paths(variables["params"]) if path.endswith("/bias")]
            raise FlagError(
                f"bitfit: targets={targets} matches none of the model's {len(biases)} biases."
                if biases
                else "bitfit: this model has no biases, so there is nothing to train. "
                "Valid: a model with biases (BERT, RoBERTa), or --peft=layernorm."
            )
        return mask

    return Method(init=lambda rng, sites: {}, trainable=trainable)
