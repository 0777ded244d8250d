"""Visual prompt tuning: trained tokens before the patches, at the input or in every layer (Jia et al., arXiv
2203.12119, section 3.2).

    shallow  [p_1 ... p_P, x_1 ... x_N] enters the first layer, and what comes out at p goes on to the next
    deep     in every layer l the prompts are replaced by that layer's own: [_, x] = layer_l([P_l, x])

    after   deep     peft {"layers": {"attn": {"kv": {"vpt": DeepPrompt(table[L, P, D])}}}}
            shallow  peft {"embed": {"prompt": {"vpt": VirtualTokens(table[P, D])}}}

What a replaced prompt does to the tokens is all in its keys and values, k(norm(P_l)) and v(norm(P_l)) with the layer's
own norm and projections: no query, no feed-forward, and the sequence keeps its length. A post-LN layer reads its input
without a norm, and so are the prompts. Rotary embedding is not applied to them: prompts have no position.
Start: U(-v, v) with v = sqrt(6 / (C*p*p + D)) of the model's patch size p; a model without patches has D in their
place. The paper's dropout on prompts is not here.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.sites import AttentionNode, Site, Virtual
from research.peft.method import Card, Method, PyTree, Sites, at_least, leaf, place, select, uniform
from research.peft.prompt import VirtualTokens

CARD = Card(paper="2203.12119", kind="additive", small="length=3")


class DeepPrompt(AttentionNode):
    """table [P, D]."""

    table: Any
    trained: ClassVar[tuple[str, ...]] = ("table",)

    def keys_values(self, x: jax.Array, project: Callable) -> Virtual:
        k, v = project(project.norm(self.table.astype(x.dtype)[None]))
        return Virtual(k[0], v[0], jnp.ones(self.table.shape[:1], bool))


def vpt(length: int = 50, deep: bool = True, targets: str = "attn/kv") -> Method:
    """Visual prompts.

    Args:
        length: P, of each layer where deep.
        deep: whether every layer has its own, or the input alone has some.
        targets: pattern of attention sites where deep.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("length", length, 1)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        embed = select(sites, "embed", ".*")
        (d,) = next(iter(embed.values())).shape
        patch = next((site.shape[0] for path, site in sites.items() if path.endswith("embed/patches")), d)
        draw = uniform((6 / (patch + d)) ** 0.5)

        def node(site: Site, rng: jax.Array) -> DeepPrompt | VirtualTokens:
            return (DeepPrompt if deep else VirtualTokens)(leaf(site, rng, draw, (length, d), (None, "embed")))

        return place(select(sites, "attention", targets) if deep else embed, "vpt", rng, node)

    return Method(init, identity=False)
