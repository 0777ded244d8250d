"""Tokens added to a model's vocabulary, and the adapters that were trained before.

    params, config = add_tokens(base.params, base.config, 2)
    carried = carry(adapter.load(DIR), params, base.fingerprint, fingerprint(params, config))

    before  {"embed": {"tokens": {"embedding": E[V, D]}}, "lm_head": {"kernel": [D, V]} (where it is untied)}
    after   {"embed": {"tokens": {"embedding": E[V + 2, D]}}, "lm_head": {"kernel": [D, V + 2]}}

A new row is the mean of the old ones (Hewitt, "Initializing New Word Embeddings", 2021), so that a new token's
probability is at most 1 / V, where a random row might take over the output. A tied model has one table and stays tied.

The base has another fingerprint then, so that adapters trained before are refused. `carry` moves one over: it asks
for the fingerprint of the base the adapter knows, and gives base leaves that trained and are as tall as the vocabulary
the new rows. Save what `adapter.attach` makes of it to have it on disk.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import ModelError
from research.nn.param import is_quantised
from research.peft import partial, tree
from research.peft.adapter import Adapter
from research.peft.method import PyTree, at_least, fold

TABLES = {"tokens/embedding": 0, "lm_head/kernel": -1}  # end of the path -> the vocabulary's axis
SPREAD = 0.01  # of drawn rows, in units of the old ones' standard deviation


def add_tokens(params: PyTree, config: Any, n: int, rng: jax.Array | None = None) -> tuple[PyTree, Any]:
    """The parameters and configuration with n more tokens, behind the old ones, whose rows stay bit for bit.

    Args:
        params: the base's.
        config: a dataclass with `vocab_size`.
        n: at least 1.
        rng: where given, new rows also differ a little from each other: the mean and a hundredth of the old rows'
            spread.
    Raises FlagError for n, ModelError where the base has no token table of the configured size, or a quantised one.
    """
    at_least("n", n, 1)
    vocabulary, found = config.vocab_size, []

    def more(path: str, leaf: Any) -> Any:
        if (axis := _axis(path)) is None:
            return leaf
        if is_quantised(leaf):
            raise ModelError(f"{path} is quantised: add the tokens to the unquantised base.")
        if leaf.shape[axis] != vocabulary:
            raise ModelError(f"{path} has {leaf.shape[axis]} tokens, the configuration has {vocabulary}.")
        found.append(path)
        return grown(leaf, axis, n, None if rng is None else fold(rng, path))

    params = tree.map_with_path(more, params, is_leaf=is_quantised)
    if not any(path.endswith("tokens/embedding") for path in found):
        raise ModelError("this base has no token table (tokens/embedding) to add tokens to.")
    return params, dataclasses.replace(config, vocab_size=vocabulary + n)


def grown(leaf: jax.Array, axis: int, n: int, rng: jax.Array | None = None) -> jax.Array:
    """The leaf with n more entries along an axis: the mean of those there are, in fp32."""
    wide = leaf.astype(jnp.float32)
    new = jnp.repeat(jnp.mean(wide, axis=axis, keepdims=True), n, axis=axis)
    if rng is not None:
        new += SPREAD * jnp.std(wide, axis=axis, keepdims=True) * jax.random.normal(rng, new.shape)
    return jnp.concatenate([leaf, new.astype(leaf.dtype)], axis=axis)


def carry(adapter: Adapter, params: PyTree, before: str, after: str) -> Adapter:
    """The adapter, trained on base `before`, for the same base with more tokens.

    Args:
        adapter: from `adapter.load`.
        params: what `add_tokens` returned.
        before, after: the fingerprints of the two bases.
    Raises ModelError where the adapter was trained on neither of them.
    """
    base = adapter.meta["base"]
    if base["fingerprint"] == after:
        return adapter
    if base["fingerprint"] != before:
        raise ModelError(
            f"the adapter was trained on base {base['name']} ({base['fingerprint'][:12]}), not on the one that tokens "
            f"were added to ({before[:12]})."
        )
    new = {f"params/{path}": leaf for path, leaf in tree.paths(params).items()}
    leaves = {}
    for path, leaf in adapter.leaves.items():
        whole, mark, part = path.partition("#")
        axis = _axis(whole) if whole in new else None
        if axis is None:
            leaves[path] = leaf
        elif not mark:
            leaves[path] = np.concatenate([leaf, _behind(np.asarray(new[whole]), axis, leaf.shape[axis])], axis=axis)
        else:
            leaves[path] = _part(adapter.leaves, whole, f"#{part}", new[whole].shape, axis)
    return dataclasses.replace(adapter, meta=adapter.meta | {"base": base | {"fingerprint": after}}, leaves=leaves)


def _axis(path: str) -> int | None:
    return next((axis for end, axis in TABLES.items() if f"/{path}".endswith(f"/{end}")), None)


def _behind(leaf: np.ndarray, axis: int, old: int) -> np.ndarray:
    return np.take(leaf, np.arange(old, leaf.shape[axis]), axis=axis)


def _part(leaves: dict[str, np.ndarray], whole: str, part: str, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """One of the arrays of a leaf that trained in part: its mask is as tall as the vocabulary now, and indices into the
    mask move with it.
    """
    mask_shape, index, values = (leaves[whole + name] for name in partial.PARTS)
    if part == "#values" or mask_shape[axis] == 1:
        return leaves[whole + part]
    taller = np.array(mask_shape)
    taller[axis] = shape[axis]
    if part == "#mask":
        return taller
    return np.ravel_multi_index(np.unravel_index(index, mask_shape), taller).astype(index.dtype)
