"""Weighted sums of adapters, as one adapter.

    combine([a, b], [0.7, 0.3])                       W + 0.7 dW_a + 0.3 dW_b at every kernel, exactly
    combine([a, b], [1, -1])                          what a has and b has not
    combine([a, b, c], [1, 1, 1], "ties", density=0.2, rank=16)

The names are those of `add_weighted_adapter` in Hugging Face PEFT; what is summed is not: there "linear", "ties" and
the others sum A and B apart, which is no sum of changes, and scales such as rsLoRA's or DoRA's magnitudes get lost.
Here every variant works on the whole change dW of a kernel and of each base leaf that trained.

    linear, cat      sum_i w_i dW_i, exactly: factors are concatenated along the rank
    svd              the same, cut to `rank` by its singular values
    magnitude_prune  the `density` largest entries of each dW_i, summed
    ties             the same, but the mean of those whose sign the majority has      (Yadav et al., arXiv 2306.01708)
    dare_linear      each entry of dW_i stays with probability `density`, divided by it  (Yu et al., arXiv 2311.03099)
    dare_ties        that, and signs as in ties

What changes a kernel becomes a LoRA of scale 1 (the numbers in front of a chain's keys stay), except where the method
itself can hold the sum: DoRA, HiRA, (IA)3, SHiRA, FourierFT and bottleneck adapters, whose widths are concatenated.
combine([a], [1.0]) is a in function for every variant with density 1.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, ModelError
from research.nn.dot import LowRank
from research.nn.param import dense
from research.nn.sites import LinearNode
from research.peft import tree
from research.peft.lora import Lora
from research.peft.merge import fold_linear, mergeable
from research.peft.method import REPARAM, PyTree, Variables, is_node
from research.peft.rows import same
from research.peft.sum_own import At, Part, bare, beside, kept, one_layer, stacked
from research.peft.sum_rules import Rule, by_layer, checked

WHY = {
    "linear": "what they do to a projection is no change of its kernel alone",
    "residual": "what they add is not linear in their weights",
    "attention": "keys and values in one softmax have no weighted sum",
    "embed": "virtual tokens of different runs are not aligned",
    "output": "what they give is not linear in their weights",
    REPARAM: "what they make is not linear in them",
}
Factors = tuple[np.ndarray, np.ndarray]  # a [in, r], b [r, out]
EPS = np.finfo(np.float32).eps


class _NoSum(ModelError):
    """There is a node that can't be summed."""


def combine(
    adapters: Sequence[Variables],
    weights: Sequence[float],
    how: str = "linear",
    *,
    base: PyTree | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority: str | None = None,
    seed: int | None = None,
    head: int | None = None,
) -> Variables:
    """The weighted sum of adapters of one method; a negative weight subtracts. Nothing it is given changes.

    Args:
        adapters: realised variables (`peft.realised`) on one base.
        weights: one for each.
        how: one of `sum_rules.HOWS`; the `_svd` names of Hugging Face PEFT mean the same as those without.
        base: the base's own parameters, needed where base leaves train.
        rank: at most that many singular values of a kernel's change are kept; None keeps all that are not zero up to
            rounding, so that the sum is exact, and as many as a kernel has where changes were pruned. Not for linear
            and cat.
        density: the share of a change's entries that pruning keeps, 1 by default; not for linear, cat and svd.
        majority: what elects a sign in ties and dare_ties: "total", the sum of the changes (the default), or
            "frequency", the sum of their signs.
        seed: of dare's random numbers, 0 by default.
        head: the number of the adapter whose task head is kept, where several have different ones.
    Returns variables, without `shared` unless they are those of the one adapter there is.
    Raises FlagError for options out of range or without use, ModelError for what has no weighted sum.
    """
    rule = checked(len(adapters), weights, how, rank, density, majority, seed)
    out = {"params": _params([v["params"] for v in adapters], base, rule)}
    if any("head" in v for v in adapters):
        out["head"] = _head([v.get("head") for v in adapters], head)
    elif head is not None:
        raise FlagError(f"head={head}: no adapter has a task head: leave it out.")
    try:
        out["peft"] = _added(adapters, out["params"] if base is None else base, rule)
    except _NoSum:
        if rule.weights == (1.0,) and rule.density == 1.0 and rank is None:
            return adapters[0]  # of any method, the sum of one is that one
        raise
    if rank is not None and not any(isinstance(node, Lora) for node in _nodes(out["peft"]).values()):
        raise FlagError(f"rank={rank} has no use: nothing here changes a kernel by two factors. Leave it out.")
    return out


# ------------------------------------------------------------------------------------------- base leaves and task heads


def _params(params: Sequence[PyTree], base: PyTree | None, rule: Rule) -> PyTree:
    """base + the sum of what its leaves changed by."""

    def one(path: str, old: Any, *new: Any) -> Any:
        if all(same(old, x) for x in new):
            return old
        if base is None:
            raise FlagError(f"the adapters train base leaves, such as {path}: give base=, its own parameters.")
        if not jnp.issubdtype(old.dtype, jnp.floating):
            raise ModelError(f"{path} is quantised and differs between the adapters: they have different bases.")
        changes = [np.asarray(x, np.float64) - np.asarray(old, np.float64) for x in new]
        return jnp.asarray(np.asarray(old, np.float64) + by_layer(rule, changes, path), old.dtype)

    try:
        return tree.map_with_path(one, params[0] if base is None else base, *params)
    except ValueError as error:  # of jax, where structures differ
        raise ModelError(f"the adapters are not on one base: {str(error).splitlines()[0]}.") from None


def _head(heads: Sequence[PyTree | None], chosen: int | None) -> PyTree:
    there = [i for i, h in enumerate(heads) if h is not None]
    if chosen is None:
        first = heads[there[0]]
        alike = [jax.tree.structure(heads[i]) == jax.tree.structure(first) for i in there]
        if all(alike) and all(jax.tree.all(jax.tree.map(same, first, heads[i])) for i in there):
            return first
        raise FlagError(f"the adapters have different task heads: choose whose is kept, such as head={there[0]}.")
    if chosen not in there:
        raise FlagError(f"head={chosen} is no adapter with a task head. Valid: {', '.join(map(str, there))}.")
    return heads[chosen]


# ------------------------------------------------------------------------------------------------------ added subtrees


def _added(adapters: Sequence[Variables], params: PyTree, rule: Rule) -> PyTree:
    out, parts = {}, _parts(adapters)
    paths = [path for part in parts for path in part.sites]
    mixed = {path for path in paths if paths.count(path) > 1 or _moved(params, adapters, path)}
    for part in parts:
        nodes = [at.node for found in part.sites.values() for at in found if at is not None]
        if not nodes and all(node.derived for node in part.others):
            continue  # marks of what trains in the base
        if not mixed & part.sites.keys() and (summed := kept(part, rule)) is not None:
            out |= summed(params)
            continue
        for node in nodes or part.others:
            if not mergeable(node):
                _refuse(node, rule)
        for path, found in part.sites.items():
            out[f"{path}/{part.number}lora"] = _lora(path, found, beside(params, path), rule, path in mixed)
    return tree.unflatten(out)


def _parts(adapters: Sequence[Variables]) -> list[Part]:
    parts: dict[str, Part] = {}
    for i, variables in enumerate(adapters):
        shared = _nodes(variables.get("shared", {}))
        for whole, node in _nodes(variables.get("peft", {})).items():
            path, _, key = whole.rpartition("/")
            number = re.match(r"(\d+_)?", key)[0]
            part = parts.setdefault(number, Part(number, {}, []))
            if node.kind == REPARAM:
                part.others.append(node)
                continue
            found = part.sites.setdefault(path, [None] * len(adapters))
            if found[i] is not None:
                raise _NoSum(f"{path} has two nodes of one method, which can't be told apart.")
            found[i] = At(key, node, shared.get(whole))
    return [parts[number] for number in sorted(parts)]


def _nodes(added: PyTree) -> dict[str, Any]:
    return tree.paths(added, is_leaf=is_node)


def _moved(params: PyTree, adapters: Sequence[Variables], path: str) -> bool:
    """Whether the kernel beside a node trained too."""
    kernel = beside(params, path).get("kernel")
    others = [beside(v["params"], path).get("kernel") for v in adapters]
    return kernel is not None and not all(jax.tree.all(jax.tree.map(same, kernel, other)) for other in others)


def _refuse(node: Any, rule: Rule) -> None:
    name, valid = type(bare(node)).__name__, "" if rule.exact else " Valid for bottlenecks: how=linear."
    raise _NoSum(f"{name} nodes have no weighted sum: {WHY[node.kind]}.{valid if node.kind == 'residual' else ''}")


# ----------------------------------------------------------------------------------------------- any change of a kernel


def _lora(path: str, found: Sequence[At | None], params: dict, rule: Rule, mixed: bool) -> Lora:
    """The sum of changes of a kernel as one LoRA, a layer at a time."""
    sums, params = [], {k: params[k] for k in ("kernel", "bias") if k in params}
    for i, name in enumerate(tree.layer_paths(path, jax.tree.leaves(params)[0])):
        own = one_layer(params, path, i)
        w = dense(own["kernel"], jnp.float32)
        changes = []
        for at in found:
            node = None if at is None else one_layer(at.node, path, i)
            node = node if at is None or at.shared is None else node.bind(at.shared)
            changes.append(None if node is None else _change(node, w, own.get("bias")))
        if mixed and any(isinstance(change, np.ndarray) for change in changes):
            raise _NoSum(f"{path} is changed by several methods, one of which depends on the others.")
        sums.append(_sum(changes, np.asarray(w), rule, name))
    rank = max(a.shape[1] for a, _ in sums)
    pad = lambda a, b: (np.pad(a, ((0, 0), (0, rank - a.shape[1]))), np.pad(b, ((0, rank - b.shape[0]), (0, 0))))  # noqa: E731
    return stacked(path, [Lora(*(jnp.asarray(x, jnp.float32) for x in (*pad(a, b), 1.0))) for a, b in sums])


def _change(node: Any, w: jax.Array, bias: jax.Array | None) -> Factors | np.ndarray:
    """What a node changes one kernel by: two factors where it says so itself, else an array."""
    bias = jnp.ones(w.shape[1]) if bias is None else bias
    new = _changed(node, w, bias)
    if "kernel" not in new:
        return np.asarray(new["a"], np.float64), np.asarray(new["b"], np.float64)
    if not np.array_equal(new["bias"], bias):
        raise _NoSum(f"{type(bare(node)).__name__} nodes have no weighted sum here: they change a bias as well.")
    return np.asarray(new["kernel"], np.float64) - np.asarray(w, np.float64)


@jax.jit
def _changed(node: Any, w: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
    cls = type(bare(node))
    if cls.input is LinearNode.input and cls.output is LinearNode.output:
        new = node.weight(w, None)
        if isinstance(new, LowRank) and new.w is w:
            return {"a": new.a, "b": new.b}
    return fold_linear([(node, None)], {"kernel": w, "bias": bias})


def _sum(changes: Sequence[Factors | np.ndarray | None], w: np.ndarray, rule: Rule, name: str) -> Factors:
    """The weighted sum for one kernel."""
    most, is_whole = min(w.shape), any(isinstance(change, np.ndarray) for change in changes)
    if not rule.prune and not is_whole:
        there = [(weight, *c) for weight, c in zip(rule.weights, changes, strict=True) if c is not None]
        a = np.concatenate([weight * a for weight, a, _ in there], axis=1)
        b = np.concatenate([b for _, _, b in there], axis=0)
        if rule.exact and a.shape[1] <= most:
            return a, b
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
        return _cut(qa @ u, s, vt @ qb.T, rule.rank or most)
    whole = [np.zeros(w.shape) if c is None else c if isinstance(c, np.ndarray) else c[0] @ c[1] for c in changes]
    u, s, vt = np.linalg.svd(rule(whole, name), full_matrices=False)
    noise = EPS * np.sqrt(np.mean(w**2)) * sum(np.sqrt(w.shape)) if is_whole else 0.0  # W + dW was rounded to fp32
    return _cut(u, s, vt, rule.rank or most, noise)


def _cut(u: np.ndarray, s: np.ndarray, vt: np.ndarray, most: int, noise: float = 0.0) -> Factors:
    """The largest singular values, of those that are not rounding; their roots go to both sides."""
    rank = max(1, min(most, int(np.sum(s > max(noise, EPS * s[0])))))
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
