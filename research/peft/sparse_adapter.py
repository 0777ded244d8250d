"""SparseAdapter: adapters pruned before they train (He et al., arXiv 2210.04284, section 2).

    y <- y + relu(y (W_down * M_down) + b_down) (W_up * M_up) + b_up,    M: the (1 - sparsity) of all adapters' weights
                                                                        with the highest score
    score = |w sum_batches dloss/dw|  (snip),  |w|  (magnitude),  or random

    after   peft {"attn_residual": {"sparse_adapter": Pruned(adapter=Bottleneck(down[L, D, m], down_bias[L, m],
                                                             up[L, m, D], up_bias[L, D]),
                                                             down_kept[L, D, m] bool, up_kept[L, m, D] bool)},
                  "mlp_residual": ...}

`fit` sets the masks: one threshold over the whole model, biases are never pruned (the authors' code). A pruned weight
is 0 and stays 0. Large-Sparse is a wider bottleneck at the same count: `width=128,sparsity=0.5` in place of `width=64`,
or `width=256,sparsity=0.75`. Sites as in Houlsby; weights start at N(0, 0.02^2), biases at 0, as the authors' adapters
do; the layer norms stay frozen. Stored are all weights and a byte for each that says whether it is there, which costs
less than indices unless most are pruned.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, did_you_mean
from research.nn.sites import ResidualNode, Site
from research.peft import tree
from research.peft.elements import highest, share_of
from research.peft.houlsby import bottleneck
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    fold,
    is_node,
    leaf,
    normal,
    place,
    select,
    trained_fields,
)  # fmt: skip

CARD = Card(paper="2210.04284", kind="hybrid", memory="yes", inference="extra FFN")
SCORES = ("snip", "magnitude", "random")


class Pruned(ResidualNode):
    """adapter: a Bottleneck; down_kept, up_kept: which of its weights there are."""

    adapter: Any
    down_kept: Any
    up_kept: Any
    trained: ClassVar[tuple[str, ...]] = ("adapter",)

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        return self.pruned().residual(stream, x, y, norm, rng)

    def pruned(self) -> Any:
        """The adapter with 0 for each weight that is not kept."""
        down, up = jnp.where(self.down_kept, self.adapter.down, 0.0), jnp.where(self.up_kept, self.adapter.up, 0.0)
        return self.adapter.replace(down=down, up=up)


def sparse_adapter(
    width: int = 64,
    sparsity: float = 0.4,
    how: str = "snip",
    batches: int = 4,
    activation: str = "relu",
    targets: str = "(attn|mlp)_residual",
    std: float = 0.02,
) -> Method:
    """A bottleneck after each sublayer, of whose weights a part is pruned before training.

    Args:
        width: m.
        sparsity: the share of weights that is pruned.
        how: what decides: snip, magnitude or random.
        batches: how many of them snip takes its gradient from.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        std: of the initial weights.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    if not 0 < sparsity < 1:
        raise FlagError(f"sparsity={sparsity} is out of range: valid are 0 < sparsity < 1, or --peft=houlsby for 0.")
    if how not in SCORES:
        raise FlagError(f"unknown score how={how}.{did_you_mean(how, SCORES)}")
    at_least("batches", batches, 1)
    inner = bottleneck(width, activation, False, normal(std))

    def node(site: Site, rng: jax.Array) -> Pruned:
        (d,), all_of = site.shape, lambda rng, shape: jnp.ones(shape, bool)
        return Pruned(
            inner(site, rng),
            leaf(site, rng, all_of, (d, width), (*site.axes, None)),
            leaf(site, rng, all_of, (width, d), (None, *site.axes)),
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "residual", targets), "sparse_adapter", rng, node)

    def trainable(variables: Variables) -> PyTree:
        def kept(mask: Any, node: Any) -> Any:
            if not isinstance(node, Pruned):
                return mask
            down, up = (np.asarray(m) if isinstance(m, jax.Array) else m for m in (node.down_kept, node.up_kept))
            return mask.replace(adapter=mask.adapter.replace(down=down, up=up))

        mask = trained_fields(variables)
        return mask | {"peft": jax.tree.map(kept, mask["peft"], variables["peft"], is_leaf=is_node)}

    def fit(rng: jax.Array, variables: Variables, loss: Callable, data: Callable) -> Variables:
        nodes = tree.paths(variables["peft"], is_leaf=is_node)
        scores = {path: jnp.abs(w) for path, w in weights(nodes).items()}
        if how == "random":
            scores = {path: jax.random.uniform(fold(rng, path), w.shape) for path, w in scores.items()}
        elif how == "snip":
            slopes = gradient(variables, loss, [data(i) for i in range(batches)])
            scores = {path: w * jnp.abs(slopes[path]) for path, w in scores.items()}
        kept = jax.tree.map(jnp.asarray, highest(scores, share_of(1 - sparsity, tree.count(scores))))
        for path, n in nodes.items():
            n = n.replace(down_kept=kept[f"{path}/down"], up_kept=kept[f"{path}/up"])
            nodes[path] = n.replace(adapter=n.pruned())
        return variables | {"peft": tree.unflatten(nodes)}

    return Method(init, trainable=trainable, fit=fit, identity=False)


def weights(nodes: dict[str, Pruned]) -> dict[str, jax.Array]:
    """All that may be pruned: {path/down: [D, m], path/up: [m, D], ...}."""
    return {f"{path}/{name}": getattr(n.adapter, name) for path, n in nodes.items() for name in ("down", "up")}


def gradient(variables: Variables, loss: Callable, batches: list[PyTree]) -> dict[str, jax.Array]:
    """The weights' gradient of the mean loss, summed over the batches; no dropout."""
    trained, rest = tree.partition(variables["peft"], trained_fields(variables)["peft"])

    def mean(trained: PyTree, batch: PyTree) -> jax.Array:
        return loss(variables | {"peft": tree.combine(trained, rest)}, batch, None).mean()

    slope = jax.jit(jax.grad(mean))
    total = jax.tree.map(lambda *g: sum(g), *(slope(trained, batch) for batch in batches))
    return weights(tree.paths(total, is_leaf=is_node))
