"""Several methods on one model: `chain(lora(), prefix())`, or `lora+prefix` on the command line.

The union of the added subtrees, the OR of the masks. Node keys carry the place in the chain, since jax sorts dictionary
keys:

    {"layers": {"attn": {"q": {"0_lora": Lora(...)}, "kv": {"1_prefix": Prefix(...)}}}}

A part never sees the other parts' nodes, nor its own number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.peft import tree
from research.peft.method import Method, PyTree, Sites, Variables, either, fold, frozen, is_node, trained_fields


def chain(*parts: Method) -> Method:
    """One method that does what all parts do, in order."""
    width = len(str(len(parts) - 1))
    numbers = [f"{i:0{width}d}_" for i in range(len(parts))]

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        added = [
            _rename(p.init(fold(rng, n), sites), lambda key, n=n: n + key) for p, n in zip(parts, numbers, strict=True)
        ]
        return tree.merge_dicts(*added)

    def trainable(variables: Variables) -> PyTree:
        masks = []
        for part, number in zip(parts, numbers, strict=True):
            mine = (part.trainable or trained_fields)(_view(variables, number))
            rest = tree.paths(frozen(variables)["peft"]) if "peft" in variables else {}
            mine_peft = tree.paths(_rename(mine.get("peft", {}), lambda key, n=number: n + key))
            whole = mine | {"peft": _like(variables["peft"], rest | mine_peft)} if "peft" in variables else mine
            masks.append(whole)
        return either(*masks)

    def each(name: str) -> Callable | None:
        """A function that passes the variables through every part that has the function `name`."""
        if all(getattr(part, name) is None for part in parts):
            return None

        def through(*args: Any) -> Variables:
            at = 1 if name == "fit" else 0  # fit takes the rng first
            variables = args[at]
            for part, number in zip(parts, numbers, strict=True):
                fn = getattr(part, name)
                if fn is not None:
                    changed = fn(*args[:at], _view(variables, number), *args[at + 1 :])
                    others = _others(variables.get("peft", {}), number)
                    renamed = _rename(changed.get("peft", {}), lambda key, n=number: n + key)
                    variables = changed | {"peft": tree.merge_dicts(others, renamed)}
            return variables

        return through

    def penalty(variables: Variables, rng: jax.Array) -> jax.Array:
        terms = [p.penalty(_view(variables, n), fold(rng, n)) for p, n in zip(parts, numbers, strict=True) if p.penalty]
        return sum(terms, jnp.zeros(()))

    def update(added: PyTree, grads: PyTree, step: jax.Array) -> PyTree:
        for part, number in zip(parts, numbers, strict=True):
            if part.update is not None:
                mine = part.update(_only(added, number), _only(grads, number), step)
                added = tree.merge_dicts(_others(added, number), _rename(mine, lambda key, n=number: n + key))
        return added

    def rates(variables: Variables) -> PyTree:
        factors = tree.constant(variables, 1.0)
        for part, number in zip(parts, numbers, strict=True):
            if part.rates is not None:
                mine = part.rates(_view(variables, number))
                mine = tree.paths(mine | {"peft": _rename(mine.get("peft", {}), lambda key, n=number: n + key)})
                factors = tree.map_with_path(lambda path, x, m=mine: x * m.get(path, 1.0), factors)
        return factors

    return Method(
        init,
        trainable,
        each("fit"),
        each("realise"),
        penalty if any(p.penalty for p in parts) else None,
        update if any(p.update for p in parts) else None,
        rates if any(p.rates for p in parts) else None,
        all(p.identity for p in parts),
    )


def _rename(added: PyTree, key: Callable[[str], str]) -> PyTree:
    """Renames the dictionary keys that hold nodes."""
    if not isinstance(added, dict):
        return added
    return {key(k) if is_node(v) else k: _rename(v, key) for k, v in added.items()}


def _filter(added: PyTree, keep: Callable[[str], bool]) -> PyTree:
    """Drops the nodes whose key fails `keep`, and the dictionaries left empty."""
    out = {}
    for k, v in added.items():
        if is_node(v):
            if keep(k):
                out[k] = v
        elif inner := _filter(v, keep):
            out[k] = inner
    return out


def _only(added: PyTree, number: str) -> PyTree:
    """The nodes of one part, under the names it gave them."""
    return _rename(_filter(added, lambda k: k.startswith(number)), lambda k: k.removeprefix(number))


def _others(added: PyTree, number: str) -> PyTree:
    return _filter(added, lambda k: not k.startswith(number))


def _view(variables: Variables, number: str) -> Variables:
    return variables | {"peft": _only(variables.get("peft", {}), number)}


def _like(added: PyTree, leaves: dict[str, Any]) -> PyTree:
    """A tree like `added` with the given leaves by path."""
    return tree.map_with_path(lambda path, _: leaves[path], added)
