"""The key-value cache: a plain pytree, made from what the sites kept.

    prompt      kept  = {"embed": {"prompt": {"mask", "positions" [B, P+T]}},
                         "layers": {"attn": {"kv": {"keys", "values" [L, B, V+P+T, kv_heads, K]}}}}
    cache       the same with room for N more tokens at the end
    each token  kept again, one slot long, written at the next slot of every leaf

What another sequence gives (leaves named `context...`) has no such room: each token finds it and leaves it as it is.
P virtual tokens and V virtual keys of a prompt or a prefix are kept with the text: they enter once. Rows are padded on
the left, so that all of them write at the same slot; slots that nobody has written yet are masked.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.peft import tree
from research.tasks.loss import model_variables

PyTree = Any


def prefill(model: nn.Module, variables: PyTree, tokens: jax.Array, mask: jax.Array, room: int) -> tuple:
    """Runs the prompt once.

    Args:
        variables: realised (`peft.realised`); heads are left out.
        tokens, mask: int [B, T], padded on the left.
        room: N, how many tokens can follow.
    Returns (logits [B, V] fp32 of the token after the last, cache).
    """
    given = model_variables(variables)
    hidden, state = model.apply(given, tokens, mask, mutable=["kept"])
    logits = model.apply(given, hidden[:, -1], method="unembed")
    return logits, tree.map_with_path(lambda path, x: jnp.pad(x, _room(path, x, room)), state["kept"])


def step(model: nn.Module, variables: PyTree, cache: PyTree, token: jax.Array, left: jax.Array | int) -> tuple:
    """Runs one token a row.

    Args:
        token: int [B]. left: how many slots are free, this token's included (the same for all rows).
    Returns (logits [B, V] fp32 of the next token, cache).
    """
    given = model_variables(variables)
    ones = jnp.ones((token.shape[0], 1), jnp.int32)
    hidden, state = model.apply(given | {"cache": cache}, token[:, None], ones, mutable=["kept"])
    logits = model.apply(given, hidden[:, -1], method="unembed")

    def write(path: str, new: jax.Array, old: jax.Array) -> jax.Array:
        if _is_context(path):
            return old
        axis = _slots(path, old)
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), old.shape[axis] - left, axis)

    return logits, tree.map_with_path(write, state["kept"], cache)


def _slots(path: str, leaf: jax.Array) -> int:
    """Which axis counts tokens: keys and values [..., S, heads, K], mask and positions [B, S]."""
    return leaf.ndim - (3 if path.endswith(("keys", "values")) else 1)


def _is_context(path: str) -> bool:
    return path.rpartition("/")[2].startswith("context")


def _room(path: str, leaf: jax.Array, room: int) -> list[tuple[int, int]]:
    room = 0 if _is_context(path) else room
    return [(0, room if axis == _slots(path, leaf) else 0) for axis in range(leaf.ndim)]
