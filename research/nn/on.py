"""A node that is there in some layers only: all layers of a scanned stack have the same program, and `on` tells them
apart. A zeroed node is not an absent one (a prefix of zeros still takes its share of the softmax), so the hooks'
results are chosen, not their arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.nn.dot import Dropped, LowRank, Plus
from research.nn.param import dense
from research.nn.sites import Node, Virtual


class On(Node):
    """`node` where on [] is True, in the layers with the given numbers, and nothing elsewhere."""

    node: Any
    on: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def kind(self) -> str:
        return self.node.kind

    @property
    def trained(self) -> tuple[str, ...]:
        return self.node.trained

    @property
    def inert(self) -> tuple[str, ...]:
        return tuple(f"node/{name}" for name in self.node.inert)

    @property
    def derived(self) -> bool:
        return self.node.derived

    def bind(self, shared: Node) -> "On":
        return self.replace(node=self.node.bind(shared))

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return jnp.where(self.on, self.node.input(x, rng), x)

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return choose(self.on, self.node.weight(w, rng), w)

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        return jnp.where(self.on, self.node.output(x, y, rng), y)

    def fold_input(self, w: jax.Array) -> jax.Array:
        return jnp.where(self.on, self.node.fold_input(w), w)

    def fold_output(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        new_w, new_bias = self.node.fold_output(w, bias)
        if new_bias is not None:
            new_bias = jnp.where(self.on, new_bias, 0.0 if bias is None else bias)
        return jnp.where(self.on, new_w, w), new_bias

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        return jnp.where(self.on, self.node.residual(stream, x, y, norm, rng), y)

    def keys_values(self, x: jax.Array, project: Callable) -> Virtual | None:
        virtual = self.node.keys_values(x, project)
        return None if virtual is None else virtual._replace(on=virtual.on & self.on)

    def attended(self, q: jax.Array, y: jax.Array, x: jax.Array, project: Callable, rng: jax.Array | None) -> jax.Array:
        return jnp.where(self.on, self.node.attended(q, y, x, project, rng), y)


def choose(on: jax.Array, new: Any, old: Any) -> Any:
    """`new` where on, else `old`; kernels that stay deferred where they can."""
    if new is old:
        return old
    if isinstance(new, LowRank) and new.w is (old.w if isinstance(old, LowRank) else old):
        rank = old.a.shape[-1] if isinstance(old, LowRank) else 0
        return LowRank(new.w, new.a.at[..., rank:].multiply(on), new.b)
    if isinstance(new, Plus) and new.w is old:
        return Plus(old, jnp.where(on, new.d, 0.0))
    if isinstance(new, Dropped):
        if new.w is old:
            return new.replace(a=new.a * on)
        if isinstance(old, Dropped) and new.a is old.a:
            return new.replace(w=choose(on, new.w, old.w))
    return jnp.where(on, dense(new, jnp.float32), dense(old, jnp.float32))
