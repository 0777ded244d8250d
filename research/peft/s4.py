"""S4: the strategies that a search found for four groups of layers (Chen et al., arXiv 2301.01821, section 4).

    groups of layers in a spindle, L/6, L/3, L/3 and L/6 of them
    G1: adapter, LoRA    G2: adapter, prefix    G3: adapter, prefix, BitFit    G4: prefix, BitFit, LoRA

    s4  =  houlsby:width=8 in G1-G3 + prefix:length=16 in G2-G4 + lora:rank=8 in G1 and G4 + bitfit in G3 and G4

    after   peft {"attn_residual": {"0_houlsby": On(Bottleneck, on[L])}, "mlp_residual": ...,
                  "attn": {"kv": {"1_prefix": On(Prefix, on[L])}, "q": {"2_lora": On(Lora, on[L])}, "v": ...},
                  "embed": {"prompt": {"1_prefix": Shift}}}  and the biases of G3 and G4 train

The search also found that every layer should have about as many parameters: m = 8, 16 virtual tokens and rank 8 are
32 D to 34 D each where keys are as wide as queries. Layer i of L is in the group that (i + 1/2) / L falls into, so a
model of fewer than four layers lacks some. Where a base has no biases (LLaMA), G3 and G4 go without BitFit. Prefixes
are trained themselves, without an MLP.
"""

import re

import jax

from research.peft import tree
from research.peft.bitfit import bitfit
from research.peft.compose import chain, on_layers
from research.peft.houlsby import houlsby
from research.peft.lora import lora
from research.peft.method import Card, Method, PyTree, Sites, Variables
from research.peft.prefix import prefix

CARD = Card(paper="2301.01821", kind="hybrid", memory="yes", inference="extra FFN and input")
INSIDE = r"layers(_\d+)?/.*"


def groups(depth: int) -> list[int]:
    """The group, 1 to 4, of each layer: 12 layers are [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]."""
    place = [6 * (i + 0.5) / depth for i in range(depth)]
    return [1 + (p >= 1) + (p >= 3) + (p >= 5) for p in place]


def s4(rank: int = 8, alpha: float = 16.0, length: int = 16, width: int = 8) -> Method:
    """Adapter, prefix, BitFit and LoRA, each in the groups of layers where the search put it.

    Args:
        rank, alpha: of LoRA.
        length: virtual tokens of the prefix.
        width: of the adapters' bottleneck.
    Raises FlagError for a value out of range.
    """
    parts = [
        (houlsby(width, norms=False), (1, 2, 3)),
        (prefix(length, hidden=0), (2, 3, 4)),
        (lora(rank, alpha), (1, 4)),
    ]

    def of(depth: int, biases: bool) -> Method:
        """The chain for a model of that many layers; BitFit comes last, as its absence must not number the others."""
        numbers = groups(depth)
        chosen = [*parts, (bitfit(INSIDE), (3, 4))] if biases else parts
        where = [(part, "|".join(str(i) for i, g in enumerate(numbers) if g in mine)) for part, mine in chosen]
        return chain(*(on_layers(part, layers) for part, layers in where if layers))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return of(_depth({path: site.stack for path, site in sites.items()}), False).init(rng, sites)

    def trainable(variables: Variables) -> PyTree:
        params = tree.paths(variables["params"])
        biases = any(re.fullmatch(INSIDE + "/bias", path) for path in params)
        return of(_depth(params), biases).trainable(variables)

    return Method(init, trainable=trainable, identity=False)


def _depth(leaves: dict[str, jax.Array]) -> int:
    """The number of layers, from leaves inside them."""
    inside = {path: x for path, x in leaves.items() if path.startswith("layers")}
    scanned = [x.shape[0] for path, x in inside.items() if path.startswith("layers/")]
    return scanned[0] if scanned else 1 + max(int(re.match(r"layers_(\d+)", path)[1]) for path in inside)
