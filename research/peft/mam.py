"""The Mix-And-Match adapter: a short prefix for the attention, a wide scaled parallel adapter for the feed-forward
(He et al., arXiv 2110.04366, section 4.6).

    mam  =  prefix:length=30,hidden=800 + parallel:width=512,scale=4

    after   peft {"attn": {"kv": {"0_prefix": ...}}, "embed": {"prompt": {"0_prefix": Shift}},
                  "mlp_residual": {"1_parallel": Parallel(...)}}

Both parts are as their own files have them; 800 is the width of the authors' prefix MLP, which is not kept.
"""

from research.peft.compose import chain
from research.peft.method import Card, Method
from research.peft.parallel import parallel
from research.peft.prefix import prefix

CARD = Card(paper="2110.04366", kind="hybrid", memory="yes", inference="extra FFN and input")


def mam(length: int = 30, hidden: int = 800, width: int = 512, scale: float = 4.0) -> Method:
    """Prefix and scaled parallel adapter.

    Args:
        length: virtual tokens of the prefix.
        hidden: width of the prefix's MLP; 0 trains keys and values themselves.
        width: of the adapter's bottleneck.
        scale: of the adapter.
    Raises FlagError for a value out of range.
    """
    return chain(prefix(length, hidden), parallel(width, scale))
