"""Trainable tokens: chosen rows of the token table train (no paper; TRAINABLE_TOKENS of Hugging Face PEFT).

    before  {"params": {"embed": {"tokens": {"embedding": E[V, D]}}}}
    after   the same, of which the rows in `rows` train: its mask is [V, 1]

For tokens that a base has hardly seen, such as a chat format's, or that were added to it. The rows start as they are,
and an adapter stores n * D numbers and n indices. In a model with tied embeddings they are rows of the output
projection as well: the tokens' logits change with them.
"""

import numpy as np

from research.errors import FlagError
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Variables, base_leaves

CARD = Card(paper="-", kind="selective", small="rows=5|7|10-19")
TABLE = "embed/tokens/embedding"


def trainable_tokens(rows: str = "") -> Method:
    """Trains rows of the token table; nothing is added.

    Args:
        rows: token ids and ranges, as in 5|7|10-19; there is no default.
    Raises FlagError where that is no row at all, or one that the table has not.
    """
    numbers = _parse(rows)

    def trainable(variables: Variables) -> PyTree:
        def chosen(mask: bool, leaf: PyTree) -> bool | np.ndarray:
            if not mask:
                return mask
            if numbers[-1] >= (size := leaf.shape[0]):
                raise FlagError(f"rows={rows} is out of range: the token table has rows 0-{size - 1}.")
            return np.isin(np.arange(size), numbers)[:, None]

        mask = base_leaves(TABLE, variables)
        if not any(tree.paths(mask).values()):
            raise FlagError("trainable_tokens: this model has no token table, so there is nothing to train.")
        return mask | {"params": tree.map_with_path(lambda _, *x: chosen(*x), mask["params"], variables["params"])}

    return Method(init=lambda rng, sites: {}, trainable=trainable)


def _parse(rows: str) -> list[int]:
    """ "5|7|10-12" -> [5, 7, 10, 11, 12]."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in rows.split("|")]
        numbers = sorted({n for part in ends for n in range(part[0], part[-1] + 1) if len(part) <= 2})
    except ValueError:
        numbers = []
    if not numbers:
        raise FlagError(f"rows={rows} names no rows of the token table. Valid: rows=5|7|10-19.")
    return numbers
