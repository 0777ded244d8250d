"""EVA: LoRA whose A starts along the directions in which its inputs vary most (Paischer et al., arXiv 2410.07170,
section 3).

    X' X = sum over batches of x' x = V S^2 V';    A = V_r, the r largest, B = 0

    after   peft {"q": {"eva": Lora(a[L, in, rho r], b[L, rho r, out], scale[L])}}

B = 0 makes a fresh one the base itself. `fit` runs the base on some batches of the run's own data; only rows that the
loss depends on count, which leaves out padding (and in a last layer whatever its task does not read). It takes the
exact V of the matrix X' X [in, in] of each site, not centred, where the authors' code updates a truncated decomposition
until it settles: more memory for wide inputs, no threshold. With rho > 1 ranks go where they explain the largest share
of a site's sum of squares, rank in all and rho rank at most at one site. A direction not taken is a column of zeros in
A: beside B's zeros it has no gradient and never moves, though it is counted and stored.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.nn.sites import LinearNode
from research.peft import tree
from research.peft.adalora import largest
from research.peft.lora import loras
from research.peft.method import Card, Method, Variables, at_least, is_node

CARD = Card(paper="2410.07170", kind="reparametrisation", small="batches=2")


@jax.custom_vjp
def probe(x: jax.Array, gram: jax.Array) -> jax.Array:
    """x [N, in]; the gradient for gram [in, in] is x' x over the rows that the loss depends on."""
    return x


def _probe_bwd(x: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = jnp.where(jnp.any(dx != 0, axis=-1, keepdims=True), x.astype(jnp.float32), 0.0)
    return dx, rows.T @ rows


probe.defvjp(lambda x, gram: (x, x), _probe_bwd)


class Probe(LinearNode):
    """gram [in, in] changes nothing but has a gradient."""

    gram: Any
    trained: ClassVar[tuple[str, ...]] = ("gram",)

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return probe(x, self.gram)


def eva(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "attn/(q|v)",
    dropout: float = 0.0,
    batches: int = 8,
    rho: float = 1.0,
) -> Method:
    """LoRA that starts from its inputs.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        dropout: rate on the update's input, in training.
        batches: how many of them `fit` looks at.
        rho: the largest rank at one site in units of r; 1 leaves all ranks equal.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    at_least("batches", batches, 1)
    at_least("rho", rho, 1)
    width = round(rho * rank)
    init = loras("eva", width, alpha, targets, dropout, scale=lambda alpha, _: alpha / rank)

    def fit(rng: jax.Array, variables: Variables, loss: Any, data: Any) -> Variables:
        nodes = tree.paths(variables["peft"], is_leaf=is_node)
        square = lambda a: jnp.zeros((*a.shape[:-1], a.shape[-2]), jnp.float32)  # noqa: E731
        probes = tree.unflatten({path: Probe(square(n.a)) for path, n in nodes.items()})
        grams = jax.jit(jax.grad(lambda probes, variables, batch: loss(variables | {"peft": probes}, batch, None).sum))
        total = probes
        for i in range(batches):
            total = jax.tree.map(jnp.add, total, grams(probes, variables, data(i)))
        values, vectors = {}, {}
        for path, found in tree.paths(total, is_leaf=is_node).items():
            squares, v = jnp.linalg.eigh(found.gram)  # ascending
            share = squares / jnp.maximum(jnp.sum(squares, axis=-1, keepdims=True), 1e-30)
            values[path], vectors[path] = share[..., : -width - 1 : -1], v[..., : -width - 1 : -1]
        kept = largest(values, rank * sum(v.size for v in values.values()) // width)
        start = lambda path, n: n.replace(a=jnp.where(kept[path][..., None, :], vectors[path], 0.0))  # noqa: E731
        return variables | {"peft": tree.unflatten({path: start(path, n) for path, n in nodes.items()})}

    return Method(init, fit=fit)
