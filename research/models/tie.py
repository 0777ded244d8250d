"""Untying the output projection from the token table, so that one can be adapted without the other.

{"embed": {"tokens": {"embedding": E[V, D]}}}  ->  the same and {"lm_head": {"kernel": E'[D, V]}}
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from research.errors import ModelError

PyTree = Any


def untie(params: PyTree, config: Any) -> tuple[PyTree, Any]:
    """The same function with an output projection of its own. ModelError where it has one, or none at all."""
    if not getattr(config, "tie_embeddings", False):
        raise ModelError("this model's output is not tied to its embeddings: leave untie out.")
    kernel = jnp.array(params["embed"]["tokens"]["embedding"].T)
    return params | {"lm_head": {"kernel": kernel}}, dataclasses.replace(config, tie_embeddings=False)
