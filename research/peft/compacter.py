"""Compacter: PHM adapters with one rule for the whole model and factors of rank one (Karimi Mahabadi et al., arXiv
2106.04647, sections 3.2-3.3).

    W = sum_i A_i (x) (s_i t_i),    i = 1..n,    A_i [n, n] shared, s_i [in/n, r], t_i [r, out/n] of each layer

    after   peft {"reparam": {"compacter": Rule(rule[n, n, n])},
                  "attn_residual": {"compacter": Compacter(down_left[L, n, D/n, r], down_right[L, n, r, m/n],
                                                           down_bias[L, m], up_left[L, n, m/n, r],
                                                           up_right[L, n, r, D/n], up_bias[L, D])},
                  "mlp_residual": ...}
    realised  the same, and  shared {"attn_residual": {"compacter": Rule}, ...}, which the scan over layers broadcasts

Sites, width, layer norms and starts are those of `phm`; the factors start at Glorot's uniform distribution. Where the
adapter stands in Compacter++ (after the feed-forward alone) is `compacterpp`.
"""

from typing import Any, ClassVar

import jax
from flax import struct
from flax.linen import LogicallyPartitioned

from research.errors import FlagError
from research.nn.sites import Node, ResidualNode, Site
from research.peft import tree
from research.peft.layernorm import with_norms
from research.peft.method import (
    REPARAM,
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
    zeros,
)  # fmt: skip
from research.peft.phm import Phm, glorot, in_range, widths

CARD = Card(paper="2106.04647", kind="hybrid", memory="yes", inference="extra FFN")


class Rule(Node):
    """The A_i of every layer: rule [n, n, n]."""

    rule: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ("rule",)


class Compacter(ResidualNode):
    """What a site has of its own; `bind` gives it the rule."""

    down_left: Any
    down_right: Any
    down_bias: Any
    up_left: Any
    up_right: Any
    up_bias: Any
    activation: str = struct.field(pytree_node=False, default="gelu")
    trained: ClassVar[tuple[str, ...]] = ("down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias")

    def bind(self, shared: Rule) -> Phm:
        down, up = (self.down_left, self.down_right), (self.up_left, self.up_right)
        return Phm(shared.rule, down, self.down_bias, shared.rule, up, self.up_bias, self.activation)


def compacter(
    reduction: int = 32,
    division: int = 4,
    rank: int = 1,
    activation: str = "gelu",
    targets: str = "(attn|mlp)_residual",
    norms: bool = True,
    std: float = 0.01,
) -> Method:
    """A Compacter layer after each sublayer.

    Args:
        reduction: D / m.
        division: n, a divisor of D.
        rank: r, at most the smaller side of a B_i.
        activation: gelu, relu, swish or tanh.
        targets: pattern of residual sites.
        norms: whether the layer norms train too, as the paper has it.
        std: of the initial A.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    in_range(reduction, division, activation, std)
    at_least("rank", rank, 1)

    def node(site: Site, rng: jax.Array) -> Compacter:
        (d,), n = site.shape, division
        wide, narrow = widths(d, reduction, n)
        if rank > narrow:
            raise FlagError(f"rank={rank} is above the smaller side of a B_i [{wide}, {narrow}]: at most {narrow}.")
        keys = jax.random.split(rng, 4)
        return Compacter(
            leaf(site, keys[0], glorot(wide, rank), (n, wide, rank)),
            leaf(site, keys[1], glorot(rank, narrow), (n, rank, narrow)),
            leaf(site, rng, zeros, (n * narrow,)),
            leaf(site, keys[2], glorot(narrow, rank), (n, narrow, rank)),
            leaf(site, keys[3], glorot(rank, wide), (n, rank, wide)),
            leaf(site, rng, zeros, (d,), site.axes),
            activation,
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        rule = normal(std)(fold(rng, REPARAM), (division, division, division))
        shared = {REPARAM: {"compacter": Rule(LogicallyPartitioned(rule, (None, None, None)))}}
        return tree.merge_dicts(place(select(sites, "residual", targets), "compacter", rng, node), shared)

    def realise(variables: Variables, sites: Sites) -> Variables:
        nodes = tree.paths(variables["peft"], is_leaf=is_node)
        rule = nodes[f"{REPARAM}/compacter"]
        bound = {path: rule for path, node in nodes.items() if isinstance(node, Compacter)}
        others = tree.paths(variables.get("shared", {}), is_leaf=is_node)
        return variables | {"shared": tree.unflatten(others | bound)}

    return Method(init, trainable=with_norms(norms), realise=realise, identity=False)
