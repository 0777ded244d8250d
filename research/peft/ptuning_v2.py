"""P-tuning v2: deep prompts, trained keys and values in every layer (Liu et al., arXiv 2110.07602, section 3).

    after   peft {"layers": {"attn": {"kv": {"ptuning_v2": Prefix(k[L, P, kv_heads, K], v)}}},
                  "embed": {"prompt": {"ptuning_v2": Shift(P)}}}

Differs from `prefix` in its start, N(0, 1) as in the authors' code, and in that no MLP stands behind the vectors unless
`hidden` asks for one (their `prefix_projection`, 512 wide, as `prefix` has it; dropped after training):

    in training  peft {"reparam": {"ptuning_v2": PrefixMlp(table[P, D], w1, b1, w2, b2)}, "embed": ...}
"""

import jax

from research.peft.method import Card, Method, PyTree, Sites, at_least
from research.peft.prefix import prefixes, projected, realised

CARD = Card(paper="2110.07602", kind="additive")


def ptuning_v2(length: int = 20, hidden: int = 0, targets: str = "attn/kv") -> Method:
    """Keys and values before every layer's own, drawn from N(0, 1).

    Args:
        length: P virtual tokens.
        hidden: width of a reparametrising MLP; 0 trains keys and values themselves.
        targets: pattern of attention sites.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("length", length, 1)
    at_least("hidden", hidden, 0)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        if hidden == 0:
            return prefixes(sites, rng, "ptuning_v2", length, targets)
        return projected(sites, rng, "ptuning_v2", length, hidden, targets)

    realise = lambda variables, sites: realised(variables, sites, "ptuning_v2", targets)  # noqa: E731
    return Method(init, realise=realise if hidden else None, identity=False)
