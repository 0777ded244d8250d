"""Last layers: only the top of the stack trains (the "variable fine-tuning" of Houlsby et al., arXiv 1902.00751,
section 3).

    before  {"params": {"layers": {"attn": {"q": {"kernel": W[L, in, out]}}}}}
    after   the same, of which W[L - count:] trains: its mask is [L, 1, 1]; in an unrolled stack layers_{L - count} and
            those after it train whole

Whole layers, their norms too, and nothing outside the stack: embeddings, last norm and pooler stay as they are. In a
scanned stack the gradient of all layers is formed and then masked; in an unrolled one it stops at the first layer that
trains. The survey names it as the earliest selective method, without figures.
"""

from typing import Any

import numpy as np

from research.errors import FlagError
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Variables, at_least, base_leaves

CARD = Card(paper="1902.00751", kind="selective")


def last_layers(count: int = 1) -> Method:
    """Trains the last layers; nothing is added.

    Args:
        count: how many of them.
    Raises FlagError for a count below 1 or above the model's.
    """
    at_least("count", count, 1)

    def trainable(variables: Variables) -> PyTree:
        mask = base_leaves(r"layers(_\d+)?/.*", variables)
        depths = _depths(variables["params"])
        if count > (least := min(depths.values(), default=0)):
            raise FlagError(f"count={count} is out of range: the model has {least} layers, so at most {least}.")

        def chosen(path: str, mask: bool, leaf: Any) -> Any:
            name = tree.stack_name(path)
            first = depths.get(path.partition(name)[0], 0) - count if name else 0
            if not mask or name != "layers":
                return mask and int(name.removeprefix("layers_")) >= first
            return (np.arange(len(leaf)) >= first).reshape(-1, *(1,) * (leaf.ndim - 1))

        return mask | {"params": tree.map_with_path(chosen, mask["params"], variables["params"])}

    return Method(init=lambda rng, sites: {}, trainable=trainable)


def _depths(params: PyTree) -> dict[str, int]:
    """The number of layers of each stack, scanned or unrolled, by what comes before it in its paths."""
    found: dict[str, int] = {}
    for path, leaf in tree.paths(params).items():
        if name := tree.stack_name(path):
            depth = leaf.shape[0] if name == "layers" else int(name.removeprefix("layers_")) + 1
            where = path.partition(name)[0]
            found[where] = max(depth, found.get(where, 0))
    return found
