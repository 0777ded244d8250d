"""Diff pruning: a change of every weight behind a gate that learns to close (Guo et al., arXiv 2012.07463, section 3).

    W' = W + z delta,    z = min(1, max(0, s (r - l) + l)),    s = sigmoid(log u - log(1 - u) + log_alpha), u ~ U(0, 1)
    penalty  c mean P(z > 0),    P(z > 0) = sigmoid(log_alpha - log(-l / r)),    l = -1.5, r = 1.5

    after   peft {"q": {"diff_pruning": Diff(delta[L, in, out], log_alpha[L, in, out])}}, and group[L] if structured

In evaluation u is 1/2 (Louizos et al., arXiv 1712.01312, section 2.2). `structured` multiplies z with one more gate for
each kernel, as the authors' code has it. l, r, and log_alpha = 5 at the start are the authors', and so is a gate's own
learning rate: 0.1 there, beside 1e-5; here a factor of the run's. delta = 0 at first: a fresh one is the base itself.

The paper's penalty is the sum of P times 1.25e-7; over the 302M elements of BERT-large's kernels this is 38 times their
mean, which asks of a model of any size the same. Its last phase is `prune`: only the largest z delta stay, their gates
wide open and all others shut, where training may go on. Kernels only: the paper has a change of all parameters, here
embeddings, norms and biases stay. Stored are delta and log_alpha, twice the kernels, and not the few that are left.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError
from research.nn.dot import Dropped, LowRank
from research.nn.param import dense
from research.nn.sites import LinearNode, Site
from research.peft import tree
from research.peft.elements import check_fraction, highest, share_of
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    constant,
    is_node,
    leaf,
    place,
    select,
    zeros,
)  # fmt: skip

CARD = Card(paper="2012.07463", kind="selective", memory="no", inference="none", small="start=1", random=True)
LOW, HIGH = -1.5, 1.5
SHUT = -100.0  # no u that a float has opens it, nor shuts one at -SHUT


class Diff(LinearNode):
    """delta and log_alpha [in, out] train, and group [], the log_alpha of all of them, where there is one."""

    delta: Any
    log_alpha: Any
    group: Any = None
    trained: ClassVar[tuple[str, ...]] = ("delta", "log_alpha", "group")

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        if isinstance(w, LowRank | Dropped):
            return w.replace(w=self.weight(w.w, rng))
        return dense(w, jnp.float32) + self.change(rng)

    def change(self, rng: jax.Array | None = None) -> jax.Array:
        """z delta."""
        keys = (None, None) if rng is None else jax.random.split(rng)
        z = gate(self.log_alpha, keys[0])
        return self.delta * (z if self.group is None else z * gate(self.group, keys[1])[..., None, None])


def gate(log_alpha: jax.Array, rng: jax.Array | None) -> jax.Array:
    """z of each log_alpha."""
    noise = 0.0 if rng is None else jax.random.logistic(rng, log_alpha.shape)
    return jnp.clip(jax.nn.sigmoid(noise + log_alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)


def diff_pruning(
    sparsity: float = 38.0,
    structured: bool = False,
    start: float = 5.0,
    ratio: float = 100.0,
    targets: str = "all",
) -> Method:
    """A gated change of chosen kernels.

    Args:
        sparsity: c, what all gates open would cost.
        structured: whether each kernel has a gate as a whole, too.
        start: log_alpha at first; above 1.6 a gate is open.
        ratio: the gates' learning rate in units of the run's.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("sparsity", sparsity, 0)
    if not ratio > 0:
        raise FlagError(f"ratio={ratio} is out of range: it is above 0, such as 100.")
    if not gate(jnp.float32(start), None) > 0:
        raise FlagError(f"start={start} is out of range: gates at 0 or below are shut, choose one above 0, such as 5.")

    def node(site: Site, rng: jax.Array) -> Diff:
        log_alpha = leaf(site, rng, constant(start), site.shape, site.axes)
        group = leaf(site, rng, constant(start), ()) if structured else None
        return Diff(leaf(site, rng, zeros, site.shape, site.axes), log_alpha, group)

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "diff_pruning", rng, node)

    def penalty(variables: Variables, rng: jax.Array) -> jax.Array:
        nodes = tree.paths(variables["peft"], is_leaf=is_node).values()
        gates = [x for n in nodes for x in (n.log_alpha, n.group) if x is not None]
        open_ = sum(jnp.sum(jax.nn.sigmoid(x - jnp.log(-LOW / HIGH))) for x in gates)
        return sparsity * open_ / tree.count(gates)

    def rates(variables: Variables) -> PyTree:
        def of(n: Any) -> Any:
            return n.replace(delta=1.0, log_alpha=ratio, group=None if n.group is None else ratio)

        return tree.constant(variables, 1.0) | {"peft": jax.tree.map(of, variables["peft"], is_leaf=is_node)}

    return Method(init, penalty=penalty, rates=rates)


def prune(variables: Variables, fraction: float) -> Variables:
    """Keeps that fraction of the changes, those of the largest |z delta| of all kernels together, and fixes all gates.

    Raises FlagError for a value out of range and where there is no diff pruning.
    """
    check_fraction(fraction)
    is_diff = lambda x: isinstance(x, Diff)  # noqa: E731
    nodes = tree.paths(variables["peft"], is_leaf=is_diff)
    moved = {path: n.change() for path, n in nodes.items() if is_diff(n)}
    if not moved:
        raise FlagError("prune: there is no diff_pruning among what was added.")
    kept = highest({path: jnp.abs(x) for path, x in moved.items()}, share_of(fraction, tree.count(moved)))

    def fixed(path: str, n: Any) -> Any:
        if path not in kept:
            return n
        group = None if n.group is None else jnp.full_like(n.group, -SHUT)
        return Diff(jnp.where(kept[path], moved[path], 0.0), jnp.where(kept[path], jnp.float32(-SHUT), SHUT), group)

    return variables | {"peft": tree.map_with_path(fixed, variables["peft"], is_leaf=is_diff)}
