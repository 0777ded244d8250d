"""SHiRA: a few entries of a kernel train, at random places (Bhardwaj et al., arXiv 2406.13175, section 3).

    W + S,    S zero but for r (in + out) entries

    after   peft {"q": {"shira": Shira(values[L, n], index[L, n])}},    n = r (in + out)

As many entries as LoRA of rank r has, in an update that is sparse but of high rank. They start at 0: a fresh SHiRA is
the base itself. The places are the paper's random mask; those by magnitude, gradient or SNIP are left out. They come
from `seed`, the site and the layer alone, so that no adapter stores them; places read from a file may be others.

HF's shira_weight is values, its shira_indices (2, n), rows of (out, in), are index = in * OUT + out with OUT the width.
"""

import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError
from research.nn.dot import Plus
from research.nn.sites import LinearNode, Site
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Sites, at_least, leaf, select, zeros

CARD = Card(paper="2406.13175", kind="reparametrisation", small="rank=4")


class Shira(LinearNode):
    """values [n] train; index [n] int32 is flat into [in, out]."""

    values: Any
    index: Any
    trained: ClassVar[tuple[str, ...]] = ("values",)

    def weight(self, w: Any, rng: jax.Array | None) -> Plus:
        update = jnp.zeros(w.shape).reshape(-1).at[self.index].set(self.values, unique_indices=True)
        return Plus(w, update.reshape(w.shape))


def places(seed: int, name: str, size: int, count: int) -> np.ndarray:
    """`count` different places of `size`, in order: where random words are smallest. Raw words of a counter-based
    generator, because numpy's own choice may change from one version to the next.
    """
    words = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw(size)
    return np.sort(np.argpartition(words, count - 1)[:count]).astype(np.int32)


def shira(rank: int = 32, seed: int = 0, targets: str = "attn/(q|v)") -> Method:
    """Random entries of chosen projections.

    Args:
        rank: r; r (in + out) entries, at most all of them.
        seed: of the places.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    at_least("seed", seed, 0)

    def node(path: str, site: Site, rng: jax.Array) -> Shira:
        (d_in, d_out), count = site.shape, rank * sum(site.shape)
        if count > d_in * d_out:
            most = d_in * d_out // (d_in + d_out)
            raise FlagError(f"rank={rank} is more than all of a kernel [{d_in}, {d_out}]: at most {most}.")
        index = lambda rng, shape: jnp.asarray(  # noqa: E731
            np.reshape([places(seed, name, d_in * d_out, count) for name in tree.layer_paths(path, site.stack)], shape)
        )
        return Shira(leaf(site, rng, zeros, (count,)), leaf(site, rng, index, (count,)))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        chosen = select(sites, "linear", targets)
        return tree.unflatten({f"{path}/shira": node(path, site, rng) for path, site in chosen.items()})

    return Method(init)
