"""UniPELT: LoRA, prefix and adapter together, each behind a gate of its own (Mao et al., arXiv 2110.07577, section 3).

    q, v:   y <- y + g(x) (alpha / r) x A B
    k, v:   prefixes g(x) P_K and g(x) P_V for the query of token x       (scores and values are both multiplied)
    FFN:    y <- y + g(h) (relu(h W_down + b_down) W_up + b_up),    h = norm(stream + y)
    g(x) = sigmoid(x w + c), w and c of each place

    in training  peft {"reparam": {"prefix": PrefixMlp}, "embed": {"prompt": {"prefix": Shift(P)}},
                       "attn": {"q": {"unipelt": GatedLora(a, b, scale, w[L, in], c[L])}, "v": ...,
                                "kv": {"unipelt": GatedPrefix(prefix=None, w[L, D], c[L])}},
                       "mlp_residual": {"unipelt": GatedAdapter(adapter=Bottleneck, w[L, D], c[L])}}
    realised     the same without "reparam", and GatedPrefix(prefix=Prefix(k, v), ...)

The parts are `lora`, `prefix` and `pfeiffer` as their own files have them, with the paper's sizes. Deviation: the
authors average a gate over the sequence; here each token has its own, because an average would let padding in and, in
a decoder, later tokens. w starts at N(0, 0.02^2) and c at 0: gates half open. The low-rank update is gated by the
input, so it is no change of a kernel and can't be merged.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax

from research.nn.sites import AttentionNode, LinearNode, ResidualNode, Virtual
from research.peft import tree
from research.peft.lora import lora
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    fold,
    is_node,
    leaf,
    normal,
    select,
    zeros,
)
from research.peft.pfeiffer import pfeiffer
from research.peft.prefix import prefix

CARD = Card(paper="2110.07577", kind="hybrid", memory="yes", inference="extra FFN and input")


def gate(x: jax.Array, w: jax.Array, c: jax.Array) -> jax.Array:
    """x [..., D], w [D], c [] -> [...] between 0 and 1."""
    return jax.nn.sigmoid(x @ w.astype(x.dtype) + c.astype(x.dtype))


class GatedLora(LinearNode):
    """a [in, r], b [r, out], scale [], w [in], c []."""

    a: Any
    b: Any
    scale: Any
    w: Any
    c: Any
    trained: ClassVar[tuple[str, ...]] = ("a", "b", "w", "c")

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        a, b = (self.a * self.scale).astype(x.dtype), self.b.astype(x.dtype)
        return y + gate(x, self.w, self.c)[:, None] * ((x @ a) @ b)


class GatedPrefix(AttentionNode):
    """prefix: a Prefix, or None while an MLP stands for it; w [D], c []."""

    prefix: Any
    w: Any
    c: Any
    trained: ClassVar[tuple[str, ...]] = ("prefix", "w", "c")

    def keys_values(self, x: jax.Array, project: Callable) -> Virtual:
        return self.prefix.keys_values(x, project)._replace(gate=gate(x, self.w, self.c))


class GatedAdapter(ResidualNode):
    """adapter: a Bottleneck; w [D], c []."""

    adapter: Any
    w: Any
    c: Any
    trained: ClassVar[tuple[str, ...]] = ("adapter", "w", "c")

    def residual(
        self, stream: jax.Array, x: jax.Array, y: jax.Array, norm: Callable, rng: jax.Array | None
    ) -> jax.Array:
        h = self.adapter.reads(stream, y, norm)
        return y + gate(h, self.w, self.c)[..., None] * self.adapter.change(h)


GATED = {
    "linear": lambda lora, w, c: GatedLora(lora.a, lora.b, lora.scale, w, c),
    "attention": GatedPrefix,
    "residual": GatedAdapter,
}


def unipelt(rank: int = 8, alpha: float = 16.0, length: int = 10, hidden: int = 512, width: int = 48) -> Method:
    """Gated LoRA on q and v, prefix, and adapter after the feed-forward.

    Args:
        rank, alpha: of LoRA.
        length, hidden: virtual tokens of the prefix, and the width of its MLP (0 trains keys and values themselves).
        width: of the adapter's bottleneck.
    Raises FlagError for a value out of range.
    """
    before = prefix(length, hidden)
    parts = {"lora": lora(rank, alpha), "prefix": before, "pfeiffer": pfeiffer(width)}

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        (d,) = next(iter(select(sites, "embed", ".*").values())).shape
        added = tree.merge_dicts(*(part.init(fold(rng, name), sites) for name, part in parts.items()))
        waiting = {f"{path}/prefix": None for path in select(sites, "attention", "attn/kv")}  # for the MLP
        out = {}
        for path, node in (waiting | tree.paths(added, is_leaf=is_node)).items():
            where = path.rpartition("/")[0]
            site = sites.get(where)
            if site is None or site.kind not in GATED:
                out[path] = node
                continue
            size = site.shape[0] if site.kind == "linear" else d
            w = leaf(site, fold(fold(rng, "gate"), where), normal(0.02), (size,))
            out[f"{where}/unipelt"] = GATED[site.kind](node, w, leaf(site, rng, zeros, ()))
        return tree.unflatten(out)

    def realise(variables: Variables, sites: Sites) -> Variables:
        if REPARAM not in variables["peft"]:
            return variables
        nodes = tree.paths(before.realise(variables, sites)["peft"], is_leaf=is_node)
        for path in [p for p, node in nodes.items() if isinstance(node, GatedPrefix)]:
            nodes[path] = nodes[path].replace(prefix=nodes.pop(path.removesuffix("unipelt") + "prefix"))
        return variables | {"peft": tree.unflatten(nodes)}

    return Method(init, realise=realise if hidden else None, identity=False)
