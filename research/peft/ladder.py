"""Ladder side-tuning: a small network beside the base reads its layers, and nothing is differentiated through the base
(Sung et al., arXiv 2206.06522, section 3).

    h_0 = e W_0 + b_0,    h_i = block_i(mu_i h_{i-1} + (1 - mu_i) (H_i W_i + b_i)),    mu_i = sigmoid(alpha_i / T)
    x <- x + norm(h_L) W_up + b_up

    after   peft {"outputs": {"ladder": Ladder(first[D, d], first_bias[d], down[L, D, d], down_bias[L, d], gate[L],
                  attn_norm[L, d], q, k, v, o[L, d, d], mlp_norm[L, d], wi[L, d, 4d], wo[L, 4d, d],
                  norm[d], up[d, D], up_bias[D], temperature[])}}

e is what the first layer of the base reads, H_i what the i-th gives; both enter without gradient. d = D / reduction,
T = 0.1, alpha = 0, and a block is T5's: RMS norm, attention, RMS norm, feed-forward (GELU), no biases. It has no
positions of its own: H_i carries them. Deviations: the paper starts the side network from pruned weights of the base
and drops some of its layers; here it starts at random (U(-1/sqrt(in), 1/sqrt(in)) as LoRA's A, norms at 1) with W_up at
0 and the base's own output in the sum, so that a fresh one is the base itself.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from research.errors import FlagError
from research.nn.attention import attend
from research.nn.sites import OutputNode, Site
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    at_least,
    constant,
    divides,
    leaf,
    place,
    select,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2206.06522", kind="additive", memory="yes", inference="extra decoder")
RUNGS = ("down", "down_bias", "gate", "attn_norm", "q", "k", "v", "o", "mlp_norm", "wi", "wo")
ENDS = ("first", "first_bias", "norm", "up", "up_bias")


class Ladder(OutputNode):
    """The side network; `heads` divides d."""

    first: Any
    first_bias: Any
    down: Any
    down_bias: Any
    gate: Any
    attn_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    mlp_norm: Any
    wi: Any
    wo: Any
    norm: Any
    up: Any
    up_bias: Any
    temperature: Any
    heads: int = struct.field(pytree_node=False)
    trained: ClassVar[tuple[str, ...]] = (*RUNGS, *ENDS)

    def outputs_after(
        self,
        x: jax.Array,
        layers: jax.Array,
        embedded: jax.Array,
        mask: jax.Array,
        rng: jax.Array | None,
        past: PyTree,
    ) -> tuple[jax.Array, PyTree]:
        frozen = jax.lax.stop_gradient
        mu = jax.nn.sigmoid(self.gate / self.temperature)
        rungs = {name: getattr(self, name).astype(x.dtype) for name in RUNGS} | {"mu": mu.astype(x.dtype)}
        first, first_bias, norm, up, up_bias = (getattr(self, name).astype(x.dtype) for name in ENDS)

        def rung(h: jax.Array, of: tuple) -> tuple[jax.Array, PyTree]:
            state, w, before = of
            h = w["mu"] * h + (1 - w["mu"]) * (state @ w["down"] + w["down_bias"])
            n = rms(h) * w["attn_norm"]
            q, k, v = ((n @ w[name]).reshape(*h.shape[:-1], self.heads, -1) for name in "qkv")
            kept = {"keys": k, "values": v}
            past = (before["keys"], before["values"]) if before else None
            h = h + attend(q, k, v, mask, past=past) @ w["o"]
            return h + jax.nn.gelu((rms(h) * w["mlp_norm"]) @ w["wi"]) @ w["wo"], kept

        h, kept = jax.lax.scan(rung, frozen(embedded) @ first + first_bias, (frozen(layers), rungs, past))
        return x + (rms(h) * norm) @ up + up_bias, kept


def rms(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2)) over the last axis, in fp32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def ladder(reduction: int = 8, heads: int = 4, temperature: float = 0.1) -> Method:
    """A side network of as many small blocks as the base has layers.

    Args:
        reduction: D / d, a divisor of D.
        heads: of its attention, a divisor of d.
        temperature: T of the gates.
    Raises FlagError for a value out of range and for one that does not divide the width it has to.
    """
    at_least("reduction", reduction, 1)
    at_least("heads", heads, 1)
    if temperature <= 0:
        raise FlagError(f"temperature={temperature} is out of range: valid are numbers above 0, such as 0.1.")

    def node(site: Site, rng: jax.Array) -> Ladder:
        depth, wide = site.shape
        divides("reduction", reduction, wide)
        d = wide // reduction
        divides("heads", heads, d)

        def matrix(i: int, rows: int, columns: int, axes: tuple = (None, None), stack: tuple = (depth,)) -> Any:
            axes = (None,) * len(stack) + axes
            return leaf(site, jax.random.fold_in(rng, i), uniform(rows**-0.5), (*stack, rows, columns), axes)

        def vector(value: float, *shape: int, axes: tuple = ()) -> Any:
            return leaf(site, rng, constant(value), shape, axes)

        return Ladder(
            first=matrix(0, wide, d, ("embed", None), ()),
            first_bias=vector(0.0, d),
            down=matrix(1, wide, d, ("embed", None)),
            down_bias=vector(0.0, depth, d),
            gate=vector(0.0, depth),
            attn_norm=vector(1.0, depth, d),
            **{name: matrix(2 + i, d, d) for i, name in enumerate("qkvo")},
            mlp_norm=vector(1.0, depth, d),
            wi=matrix(6, d, 4 * d),
            wo=matrix(7, 4 * d, d),
            norm=vector(1.0, d),
            up=leaf(site, rng, zeros, (d, wide), (None, "embed")),
            up_bias=vector(0.0, wide, axes=("embed",)),
            temperature=vector(temperature),
            heads=heads,
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "output", ".*"), "ladder", rng, node)

    return Method(init)
