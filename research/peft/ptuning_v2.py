"""P-tuning v2: deep prompts, trained keys and values in every layer without reparametrisation (Liu et al., arXiv
2110.07602, section 3).

    after   peft {"layers": {"attn": {"kv": {"ptuning_v2": Prefix(k[L, P, kv_heads, K], v)}}},
                  "embed": {"prompt": {"ptuning_v2": Shift(P)}}}

Differs from `prefix` in its start, N(0, 1) as in the authors' code, and in that no MLP stands behind the vectors.
"""

import jax

from research.peft.method import Method, PyTree, Sites, at_least
from research.peft.prefix import prefixes


def ptuning_v2(length: int = 20, targets: str = "attn/kv") -> Method:
    """Keys and values before every layer's own, drawn from N(0, 1).

    Args:
        length: P virtual tokens.
        targets: pattern of attention sites.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("length", length, 1)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return prefixes(sites, rng, "ptuning_v2", length, targets)

    return Method(init, identity=False)
