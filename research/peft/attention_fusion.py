"""AttentionFusion: each token attends to its own representations in all layers, and nothing is differentiated through
the base (Cao et al., Findings of NAACL 2022, pages 857-866).

    x <- x - H_L + sum_l p_l H_l,    p = softmax_l(H_l q / sqrt(D)),    H_l: output of layer l, for each token

    after   peft {"outputs": {"attention_fusion": Fusion(query[D])}}

Kept of the paper: late fusion of a frozen encoder's layers into task-attuned token representations by attention with a
learnt query, at less than a thousandth of a percent of the parameters (its abstract; 768 of BERT's 110M are 0.0007 %).
Its text was not at hand, so that its exact projections are not claimed: here keys and values are the layers' outputs
themselves. x is H_L, which the fused representation replaces, unless a method before it in a chain changed it: then its
change stays. q starts at N(0, 0.02^2): almost the mean over the layers, so a fresh one is not the base.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.sites import OutputNode, Site
from research.peft.method import Card, Method, PyTree, Sites, leaf, normal, place, select

CARD = Card(paper="2022.findings-naacl.64", kind="additive", memory="yes", inference="extra decoder")


class Fusion(OutputNode):
    """query [D]."""

    query: Any
    trained: ClassVar[tuple[str, ...]] = ("query",)

    def outputs(
        self, x: jax.Array, layers: jax.Array, embedded: jax.Array, mask: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        layers = jax.lax.stop_gradient(layers)
        scores = jnp.einsum("lbtd,d->lbt", layers, self.query.astype(x.dtype), preferred_element_type=jnp.float32)
        share = jax.nn.softmax(scores * x.shape[-1] ** -0.5, axis=0).astype(x.dtype)
        return x - layers[-1] + jnp.einsum("lbt,lbtd->btd", share, layers)


def attention_fusion(std: float = 0.02) -> Method:
    """Attention over the layers.

    Args:
        std: of the initial query.
    """

    def node(site: Site, rng: jax.Array) -> Fusion:
        return Fusion(leaf(site, rng, normal(std), site.shape[1:], site.axes[1:]))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "output", ".*"), "attention_fusion", rng, node)

    return Method(init, identity=False)
