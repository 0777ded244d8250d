"""LLaMA-Adapter: each layer attends to its own prompt in a second softmax behind a gate (Zhang et al., arXiv
2303.16199, section 3.2).

    y <- y + g softmax(q k(p)' / sqrt(K)) v(p),    p [P, D], g = 0;   then the output projection

    after   peft {"layers": {"attn": {"kv": {"llama_adapter": Adaption(prompt[L, P, D], gate[L, 1])}}}}

k and v are the layer's own projections. Queries are rotated, the prompt's keys are not. As in HF PEFT, p starts at
N(0, 1) and one gate serves all heads as it is; the authors' code has a gate a head and takes its tanh. With g = 0 a
fresh adapter is the base itself. The paper adapts the 30 top layers of 32 (`layers=2-31`); here all are the default.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.attention import attend
from research.nn.sites import AttentionNode, Site
from research.peft.method import Card, Method, PyTree, Sites, at_least, leaf, normal, place, select, zeros

CARD = Card(paper="2303.16199", kind="additive")


class Adaption(AttentionNode):
    """prompt [P, D], gate [1]."""

    prompt: Any
    gate: Any
    trained: ClassVar[tuple[str, ...]] = ("prompt", "gate")

    def attended(self, q: jax.Array, y: jax.Array, x: jax.Array, project: Callable, rng: jax.Array | None) -> jax.Array:
        k, v = project(self.prompt.astype(x.dtype))
        z = attend(q, k[None], v[None], jnp.ones((1, 1, k.shape[0]), bool))
        return y + self.gate.astype(y.dtype) * z.astype(y.dtype)


def llama_adapter(length: int = 10, targets: str = "attn/kv") -> Method:
    """A prompt and a gate in each layer's attention.

    Args:
        length: P virtual tokens a layer.
        targets: pattern of attention sites.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("length", length, 1)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        embed = next(iter(select(sites, "embed", ".*").values()))

        def node(site: Site, rng: jax.Array) -> Adaption:
            return Adaption(
                leaf(site, rng, normal(1.0), (length, *embed.shape), (None, *embed.axes)),
                leaf(site, rng, zeros, (1,)),
            )

        return place(select(sites, "attention", targets), "llama_adapter", rng, node)

    return Method(init)
