"""FISH Mask: the parameters of the largest Fisher information train (Sung et al., arXiv 2111.09839).

    F_i = 1/N sum_n (d log p(y_n | x_n) / d theta_i)^2,    those theta_i train whose F_i are the largest

    in training  peft {"reparam": {"fishmask": Elements(chosen={"layers": {"attn": {"q": {"kernel": bool[L, in, out]}}},
                                                                "embed": ...})}}
    realised     nothing is added

The empirical Fisher information's diagonal, at the labels of the data and not in expectation over the model's, which
the authors' code also has. One row's gradient at a time is squared, which takes the memory of two. Embeddings, norms
and biases compete too; a task's head trains whole, as in the authors' code, but does not count in the fraction (there
it does). 32 batches of 32 are the 1024 examples of the authors' runs on GLUE. No dropout. A quantised base is refused.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.peft import tree
from research.peft.elements import check_fraction, from_data, highest, share_of
from research.peft.method import Card, Method, PyTree, Variables, at_least

CARD = Card(paper="2111.09839", kind="selective", memory="maybe", inference="none", small="fraction=0.02,batches=2")


def fishmask(fraction: float = 0.005, batches: int = 32) -> Method:
    """Trains the elements of the base that matter most to the task.

    Args:
        fraction: the share of all parameters of the base that trains.
        batches: how many of them the Fisher information is taken from.
    Raises FlagError for a value out of range.
    """
    check_fraction(fraction)
    at_least("batches", batches, 1)

    def choose(rng: jax.Array, variables: Variables, loss: Callable, data: Callable) -> PyTree:
        return highest(fisher(variables, loss, data, batches), share_of(fraction, tree.count(variables["params"])))

    return from_data("fishmask", choose)


def fisher(variables: Variables, loss: Callable, data: Callable, batches: int) -> PyTree:
    """The sum over all rows of the squared gradients: N F, in the base's structure."""

    @jax.jit
    def add(total: PyTree, variables: Variables, batch: PyTree) -> PyTree:
        def mean(params: PyTree, row: PyTree) -> jax.Array:
            return loss(variables | {"params": params}, row, None).mean()

        def one(total: PyTree, row: PyTree) -> tuple[PyTree, None]:
            slopes = jax.grad(mean)(variables["params"], row)
            return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, slopes), None

        return jax.lax.scan(one, total, jax.tree.map(lambda x: jnp.asarray(x)[:, None], batch))[0]

    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), variables["params"])
    for i in range(batches):
        total = add(total, variables, data(i))
    return total
