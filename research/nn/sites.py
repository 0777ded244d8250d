"""The five sites: the only places where a PEFT node may sit, and the base classes of the nodes that sit there.

A site is a module that does nothing by itself. Under `model.init` it records `Site(kind, shape, axes, stack)` in
collection `sites`; under `model.apply` it hands its activations to the nodes found at its own path in collection
`peft`, in the order of their keys. No node, no cost.

    sites: {"layers": {"attn": {"q": {"site": Site("linear", (D, H*K), ("embed", "heads"), stack=[L])}}}}
    peft:  {"layers": {"attn": {"q": {"lora": Lora(a[L, D, r], b[L, r, H*K], scale[L])}}}}

Decoding goes through sites too. What later tokens need of these ones is written to collection `kept` where that is
mutable, and what earlier tokens left is read from collection `cache` where that is given: keys and values, virtual ones
included, at `attention`, the mask and the positions at `embed`, and a side network's own keys at `output`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from research.nn.param import training_rng


@struct.dataclass
class Site:
    """Where a node may sit.

    kind: "linear" (shape [in, out]), "residual" ([D]), "attention" ([kv_heads, K]), "embed" ([D]) or "output" ([L, D]).
    axes: one logical axis name for each dimension of `shape`.
    stack: a scalar that `nn.scan` stacks with the layers' parameters, so its shape is the leading shape of every leaf
    added here: () or (L,).
    """

    kind: str = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    stack: Any


class Node(struct.PyTreeNode):
    """One method's added arrays at one site.

    `trained` names the fields with gradients; the others are frozen leaves. A `derived` node is made by its method's
    `realise` at every apply, so that no adapter stores it. `inert` names the fields that change no output: a method's
    own state of training.
    """

    kind: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    derived: ClassVar[bool] = False
    inert: ClassVar[tuple[str, ...]] = ()

    def bind(self, shared: "Node") -> "Node":
        """The node with what all layers share, from collection `shared`, which the scan broadcasts."""
        raise TypeError(f"{type(self).__name__} shares nothing")


class LinearNode(Node):
    """May change a projection's input, kernel and, after the bias, output.

    x [N, in], y [N, out], w [in, out]; rng is None in evaluation.
    """

    kind: ClassVar[str] = "linear"

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return x

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return w

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        return y

    def fold_input(self, w: jax.Array) -> jax.Array:
        """The kernel that does what `input` and then `w` do. A node that overrides `input` merges only with this."""
        return w

    def fold_output(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and bias that do what `w`, `bias` and then `output` do; likewise."""
        return w, bias


class ResidualNode(Node):
    """Changes a sublayer's output before it is added to the stream."""

    kind: ClassVar[str] = "residual"

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        """stream, x (the sublayer's input), y (its output) [B, T, D] -> new y.

        `norm` is the layer norm that follows the addition (post-LN) or the identity.
        """
        raise TypeError(f"{type(self).__name__} has no residual hook")


class Virtual(NamedTuple):
    """Keys and values that no token made: k, v [P, kv_heads, K] or [B, P, kv_heads, K], on bool [P].

    gate [B, T], where given, multiplies their scores and their probabilities for each query.
    """

    k: jax.Array
    v: jax.Array
    on: jax.Array
    gate: jax.Array | None = None


class AttentionNode(Node):
    """Adds keys and values that every query sees, or changes what the attention gives.

    x [B, T, D] is the layer's input, project: [..., D] -> (k, v) [..., kv_heads, K].
    """

    kind: ClassVar[str] = "attention"

    def keys_values(self, x: jax.Array, project: Callable) -> Virtual | None:
        """What stands before the layer's own keys and values, if anything."""
        return None

    def attended(self, q: jax.Array, y: jax.Array, x: jax.Array, project: Callable, rng: jax.Array | None) -> jax.Array:
        """q [B, T, H, K] after rotary embedding, y [B, T, H*K] before the output projection -> new y."""
        return y


class EmbedNode(Node):
    """Changes the embedded sequence: virtual tokens before it, or a shift of positions."""

    kind: ClassVar[str] = "embed"

    def tokens(self) -> jax.Array | None:
        """Virtual tokens [P, D] to stand before the sequence, if any."""
        return None

    def shift(self) -> jax.Array | int:
        """By how much all positions move."""
        return 0


class OutputNode(Node):
    """Computes the final hidden state from every layer's output."""

    kind: ClassVar[str] = "output"

    def outputs_after(
        self,
        x: jax.Array,
        layers: jax.Array,
        embedded: jax.Array,
        mask: jax.Array,
        rng: jax.Array | None,
        past: Any,
    ) -> tuple[jax.Array, Any]:
        """As `outputs`, and what later tokens need: a dict of leaves [..., B, T, heads, K], {} where each token stands
        for itself. `past`: the same of the earlier tokens, or {}; mask then covers them too.
        """
        return self.outputs(x, layers, embedded, mask, rng), {}

    def outputs(
        self, x: jax.Array, layers: jax.Array, embedded: jax.Array, mask: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D], layers [L, B, T, D] each block's output, embedded [B, T, D] the first block's input,
        mask bool [B, T or 1, T] (True where a query may look) -> [B, T, D].
        """
        raise TypeError(f"{type(self).__name__} has no output hook")


def remember(module: nn.Module, name: str, value: Any) -> None:
    """Writes what later tokens need to collection `kept`, where the caller asked for it."""
    if module.is_mutable_collection("kept") and not module.is_initializing():
        module.put_variable("kept", name, value)


def recall(module: nn.Module, name: str) -> Any:
    """What earlier tokens left here, or None."""
    return module.get_variable("cache", name) if module.has_variable("cache", name) else None


def record(module: nn.Module, kind: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
    """Makes the site known under `model.init`."""
    if module.is_initializing():
        module.variable("sites", "site", lambda: Site(kind, shape, axes, jnp.zeros(())))


def nodes(module: nn.Module) -> list[Node]:
    """The nodes that sit at this module, in order, each with what it shares."""
    here, shared = (module.variables.get(collection, {}) for collection in ("peft", "shared"))
    found = {key: here[key] for key in sorted(here) if isinstance(here[key], Node)}
    return [node.bind(shared[key]) if key in shared else node for key, node in found.items()]


class Residual(nn.Module):
    """Site after (serial) or beside (parallel) a sublayer."""

    @nn.compact
    def __call__(self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable = lambda x: x) -> jax.Array:
        record(self, "residual", (stream.shape[-1],), ("embed",))
        for node in nodes(self):
            y = node.residual(stream, x, y, norm, training_rng(self))
        return y


class KeysValues(nn.Module):
    """Site inside an attention, after rotary embedding. `context`: the keys are another sequence's, all there from the
    start, so that decoding reads them and adds none. `keep`: whether later tokens may read them at all.
    """

    context: bool = False
    keep: bool = True

    def known(self) -> tuple[jax.Array, jax.Array] | None:
        """The context's keys and values, virtual ones in front, where a cache has them."""
        found = recall(self, "context_keys"), recall(self, "context_values")
        return None if found[0] is None else found

    @nn.compact
    def __call__(self, k: jax.Array, v: jax.Array, mask: jax.Array, x: jax.Array, project: Callable) -> tuple:
        """k, v [B, S, kv_heads, K], mask bool [B, T or 1, S] -> k and v with P more in front; past, the keys and values
        of N tokens in the cache, or None; the mask, with past [B, T, N + S]; gate [B, T, P] of the P, or None.
        """
        record(self, "attention", k.shape[-2:], ("kv_heads", None))
        virtual = [more for node in nodes(self) if (more := node.keys_values(x, project)) is not None]
        names = ("context_keys", "context_values") if self.context else ("keys", "values")
        keys, values = recall(self, names[0]), recall(self, names[1])
        if keys is None:  # else the virtual ones are in front of the cache already
            for more in virtual:
                k, v = (jnp.concatenate([_rows(new, old), old], axis=1) for new, old in ((more.k, k), (more.v, v)))
        if self.keep:
            remember(self, names[0], k)
            remember(self, names[1], v)
        past = None
        if keys is not None and not self.context:
            past, k, v = (keys, values), k.astype(keys.dtype), v.astype(values.dtype)
        gates = []
        for more in virtual:
            mask = jnp.concatenate([jnp.broadcast_to(more.on, (*mask.shape[:2], more.on.shape[0])), mask], axis=-1)
            gates.insert(0, (more.gate, more.on.shape[0]))
        if all(gate is None for gate, _ in gates):
            return k, v, past, mask, None
        full = lambda gate, size: jnp.broadcast_to(1.0 if gate is None else gate[..., None], (*x.shape[:2], size))  # noqa: E731
        return k, v, past, mask, jnp.concatenate([full(*g) for g in gates], axis=-1)

    def attended(self, q: jax.Array, y: jax.Array, x: jax.Array, project: Callable) -> jax.Array:
        """The nodes' second hook."""
        for node in nodes(self):
            y = node.attended(q, y, x, project, training_rng(self))
        return y


def _rows(new: jax.Array, old: jax.Array) -> jax.Array:
    """[P, kv_heads, K] or [B, P, kv_heads, K] for each row of old [B, S, kv_heads, K]."""
    return jnp.broadcast_to(new.astype(old.dtype), (old.shape[0], *new.shape[-3:]))


class Prompt(nn.Module):
    """Site before the embedded sequence. `keep`: whether later tokens read its mask and positions. `virtual`: whether
    there may be tokens before it; without, it only keeps.
    """

    keep: bool = True
    virtual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D], mask and positions [B, T] -> the same with P more slots in front.

        Shifts of all nodes come first, so that their order in a chain does not matter: virtual tokens take positions
        shift..shift+P-1 and the text starts behind them. With a cache the tokens go on where it ends, and nothing
        comes before them.
        """
        if self.virtual:
            record(self, "embed", (x.shape[-1],), ("embed",))
        past = self.past()
        if past is None:
            x, mask, positions = self._first(x, mask, positions)
        else:
            before, their = past
            positions = positions + 1 + jnp.max(jnp.where(before > 0, their, -1), axis=1, keepdims=True)
        if self.keep:
            remember(self, "mask", mask)
            remember(self, "positions", positions)
        return x, mask, positions

    def past(self) -> tuple[jax.Array, jax.Array] | None:
        """Mask and positions [B, N] of the tokens in the cache, virtual ones included; None without a cache."""
        mask = recall(self, "mask")
        return None if mask is None else (mask, recall(self, "positions"))

    def _first(self, x: jax.Array, mask: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        here = nodes(self)
        shift = sum(node.shift() for node in here)
        virtual = [tokens for node in here if (tokens := node.tokens()) is not None]
        if not virtual:
            return x, mask, positions + shift
        virtual = jnp.concatenate(virtual).astype(x.dtype)
        length = virtual.shape[0]
        slots = jnp.broadcast_to(jnp.arange(length, dtype=positions.dtype), (x.shape[0], length))
        x = jnp.concatenate([jnp.broadcast_to(virtual, (x.shape[0], *virtual.shape)), x], axis=1)
        mask = jnp.concatenate([jnp.ones_like(slots, mask.dtype), mask], axis=1)
        return x, mask, jnp.concatenate([slots, positions + length], axis=1) + shift


class Outputs(nn.Module):
    """Site that sees every layer's output; the model collects them only when a node sits here."""

    num_layers: int

    @property
    def occupied(self) -> bool:
        """Whether a node sits here."""
        return bool(nodes(self))

    @nn.compact
    def __call__(self, x: jax.Array, layers: jax.Array | None, embedded: jax.Array, mask: jax.Array) -> jax.Array:
        record(self, "output", (self.num_layers, x.shape[-1]), (None, "embed"))
        past, kept = recall(self, "side") or {}, {}
        for place, node in enumerate(nodes(self)):
            before = past.get(str(place), {})
            x, after = node.outputs_after(x, layers, embedded, mask, training_rng(self), before)
            kept |= {str(place): after} if after else {}
        if kept:
            remember(self, "side", kept)
        return x
