"""FAR, freeze and reconfigure: the hidden units of the feed-forward that learn most train (Vucetic et al., arXiv
2205.01541).

    s_u = sum_d |W1[d, u] - W0[d, u]| after a few steps;    the units u of the largest s train, in each matrix its own

    in training  peft {"reparam": {"far": Elements(chosen={"layers": {"mlp": {"up": {"kernel": bool[L, 1, F]},
                                                                              "down": {"kernel": bool[L, F, 1]}}}})}}
    realised     nothing is added

`fit` is the priming: full fine-tuning by Adam on base and head, which then are what they were. Units are columns of
the way up (and of a gate), with their bias, and rows of the way down, whose bias belongs to no unit and stays. The
paper takes each matrix apart into a trained and a frozen one, so that frozen rows have no gradient; here it stays whole
under a mask: the same numbers train, without the savings in memory and time. All else is frozen; an adapter stores
whole units. A quantised base is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError
from research.peft import tree
from research.peft.elements import changes, check_fraction, check_phase, finite, from_data, share_of
from research.peft.method import REPARAM, Card, Method, PyTree, Sites, Variables, leaf, select

CARD = Card(paper="2205.01541", kind="selective", memory="maybe", inference="none", small="steps=3")


def far(
    fraction: float = 0.1, steps: int = 20, learning_rate: float = 5e-5, targets: str = r"layers(_\d+)?/mlp/\w+"
) -> Method:
    """Trains the hidden units that a short fine-tuning moves most.

    Args:
        fraction: the share of each matrix' units that trains.
        steps: of the priming.
        learning_rate: of the priming.
        targets: pattern of linear sites of the feed-forward.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    check_fraction(fraction)
    check_phase(steps, learning_rate)

    def start(sites: Sites) -> PyTree:
        none = {}
        for path, site in select(sites, "linear", targets).items():
            if "mlp" not in site.axes:
                raise FlagError(f"targets={targets}: {path} has no hidden units. Valid: mlp/up|mlp/down.")
            shape = [size if axis == "mlp" else 1 for size, axis in zip(site.shape, site.axes, strict=True)]
            axes = [axis if axis == "mlp" else None for axis in site.axes]
            none[f"{path}/kernel"] = leaf(site, None, lambda rng, shape: jnp.zeros(shape, bool), shape, axes)
        return tree.unflatten(none)

    def choose(rng: jax.Array, variables: Variables, loss: Callable, data: Callable) -> PyTree:
        moved = tree.paths(changes(rng, variables, loss, data, steps, learning_rate))
        none = tree.paths(variables["peft"][REPARAM]["far"].chosen)
        chosen = {path: best(moved[path], m.shape.index(1, m.ndim - 2), fraction) for path, m in none.items()}
        return tree.unflatten(chosen)

    def mask(chosen: PyTree, params: PyTree) -> PyTree:
        kernels = tree.paths(chosen)

        def of(path: str, leaf: Any) -> Any:
            owner, _, name = path.rpartition("/")
            units = kernels.get(f"{owner}/kernel")
            if units is None or (name == "bias" and units.shape[-1] == 1):
                return False
            return units if name == "kernel" else _bias(units)

        return tree.map_with_path(of, params)

    return from_data("far", choose, start, mask)


def best(moved: jax.Array, over: int, fraction: float) -> np.ndarray:
    """moved [..., in, out] -> bool [..., 1, out] or [..., in, 1]: the units whose sum over axis `over` is largest."""
    scores = np.sum(finite(moved), axis=over, keepdims=True)
    along = 2 * scores.ndim - 3 - over  # the other one of the last two axes
    order = np.argsort(-scores, axis=along, kind="stable")
    return np.argsort(order, axis=along) < share_of(fraction, scores.shape[along])


def _bias(units: Any) -> Any:
    """[..., 1, F] -> [..., F]."""
    drop = lambda m: m[..., 0, :]  # noqa: E731
    return jax.eval_shape(drop, units) if isinstance(units, jax.ShapeDtypeStruct) else drop(units)
