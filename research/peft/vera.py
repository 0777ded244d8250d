"""VeRA: one frozen random pair of matrices for all kernels, and two trained vectors each (Kopiczko et al., arXiv
2310.11454, sections 3.1 and 3.3).

    h = x W + ((x A[:in]) * d) B[:, :out] * b,    A [max in, r], B [r, max out] the same at every site

    after     peft {"q": {"vera": Vera(d[L, r], b[L, out])},
                    "reparam": {"vera": Projections(a[max in, r], b[r, max out])}}
    realised  the same, and shared {"q": {"vera": Projections(a[in, r], b[r, out])}}, which the layers' scan broadcasts

A and B are Kaiming uniform, U(-sqrt(6/n), sqrt(6/n)) for n inputs, from `seed` and not from the run's key: an adapter
stores d and b alone. d = 0.1 and b = 0 make a fresh one the base itself. Sites of unequal shapes take the first rows of
A and columns of B, as in Hugging Face's code; the paper adapts kernels of one shape.
"""

from typing import Any, ClassVar

import jax
from flax.linen import LogicallyPartitioned

from research.errors import FlagError
from research.nn.dot import low_rank
from research.nn.sites import LinearNode, Node, Site
from research.peft import tree
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    constant,
    leaf,
    place,
    select,
    uniform,
    zeros,
)  # fmt: skip

CARD = Card(paper="2310.11454", kind="reparametrisation")


class Projections(Node):
    """The frozen a [in, r] and b [r, out]."""

    a: Any
    b: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ()


class Vera(LinearNode):
    """d [r] and b [out] train; `shared` are the site's Projections while it is applied."""

    d: Any
    b: Any
    shared: Any = None
    trained: ClassVar[tuple[str, ...]] = ("d", "b")

    def bind(self, shared: Node) -> "Vera":
        return self.replace(shared=shared)

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return low_rank(w, self.shared.a * self.d, self.shared.b * self.b)


def vera(rank: int = 256, targets: str = "attn/(q|v)", d_init: float = 0.1, seed: int = 0) -> Method:
    """Two vectors a kernel around shared random matrices.

    Args:
        rank: r, which may be above a kernel's own.
        targets: pattern of linear sites; "all" is every one in the layers.
        d_init: d at the start.
        seed: of A and B.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("rank", rank, 1)
    at_least("seed", seed, 0)
    if d_init == 0:
        raise FlagError("d_init=0.0 beside b = 0 would never train: choose another value, such as 0.1.")

    def node(site: Site, rng: jax.Array) -> Vera:
        d = leaf(site, rng, constant(d_init), (rank,))
        return Vera(d, leaf(site, rng, zeros, site.shape[1:], site.axes[1:]))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        chosen = select(sites, "linear", targets)
        d_in, d_out = (max(site.shape[i] for site in chosen.values()) for i in (0, 1))
        key_a, key_b = jax.random.split(jax.random.key(seed))
        shared = Projections(
            LogicallyPartitioned(uniform((6 / d_in) ** 0.5)(key_a, (d_in, rank)), (None, None)),
            LogicallyPartitioned(uniform((6 / rank) ** 0.5)(key_b, (rank, d_out)), (None, None)),
        )
        return tree.merge_dicts(place(chosen, "vera", rng, node), {REPARAM: {"vera": shared}})

    def realise(variables: Variables, sites: Sites) -> Variables:
        shared = variables["peft"].get(REPARAM, {}).get("vera")
        if shared is None:
            return variables
        at = lambda site: Projections(shared.a[: site.shape[0]], shared.b[:, : site.shape[1]])  # noqa: E731
        chosen = select(sites, "linear", targets)
        return variables | {"shared": tree.unflatten({f"{path}/vera": at(site) for path, site in chosen.items()})}

    return Method(init, realise=realise)
