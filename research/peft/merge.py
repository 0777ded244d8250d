"""Folding nodes into the base, and taking them out again by keeping the base.

A linear node folds where each hook it has is a change of the kernel: `weight` is one already, `fold_input` and
`fold_output` say what `input` and `output` are. A quantised kernel becomes a float one. Nothing is changed in place, so
a merge that fails has changed nothing and the base one still holds is the exact un-merge.
"""

import jax

from research.errors import ModelError
from research.nn.on import On
from research.nn.param import dense
from research.nn.sites import LinearNode, Node
from research.peft import tree
from research.peft.method import REPARAM, PyTree, Variables, is_node


def mergeable(node: object) -> bool:
    """Whether the node is a change of kernel and bias."""
    if isinstance(node, On):
        return mergeable(node.node)
    if not isinstance(node, LinearNode):
        return False
    cls = type(node)
    return all(
        getattr(cls, hook) is getattr(LinearNode, hook) or getattr(cls, fold) is not getattr(LinearNode, fold)
        for hook, fold in (("input", "fold_input"), ("output", "fold_output"))
    )


def merge(variables: Variables, partial: bool = False) -> Variables:
    """Folds the nodes of realised variables into `params` and takes them out of `peft`, with what they alone share;
    several at one place are folded together, in order.

    Raises ModelError naming the nodes that are no change of a kernel, unless `partial` leaves them where they are.
    """
    params, peft = _fold(variables["params"], variables.get("peft", {}), variables.get("shared", {}))
    left = sorted({type(n).__name__ for n in tree.paths(peft, is_leaf=is_node).values() if n.kind != REPARAM})
    if left and not partial:
        raise ModelError(
            f"{', '.join(left)} can't be merged into the base's weights: keep the adapter beside the base."
        )
    spent = () if left else ("peft", "shared")
    return {k: v for k, v in (variables | {"params": params, "peft": peft}).items() if k not in spent}


def _fold(params: PyTree, peft: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
    nodes = {k: v for k, v in peft.items() if is_node(v)}
    rest = {k: v for k, v in peft.items() if not is_node(v)}
    if nodes and all(mergeable(n) for n in nodes.values()):
        both = [(nodes[k], shared.get(k)) for k in sorted(nodes)]
        params = params | fold_linear(both, params)
        nodes = {}
    out_params, out_peft = dict(params), dict(nodes)
    for key, inner in rest.items():
        out, left = _fold(params.get(key, {}), inner, shared.get(key, {}))
        if key in params:
            out_params[key] = out
        if left:
            out_peft[key] = left
    return out_params, out_peft


def fold_linear(nodes: list[tuple[LinearNode, Node | None]], params: dict) -> dict:
    """One projection's {"kernel": [(L,) in, out], "bias"?} with its nodes, each beside what it shares or None, folded
    in, in fp32 and back to its dtype.
    """
    kernel = params["kernel"]
    dtype = kernel.dtype if isinstance(kernel, jax.Array) else kernel.dequantised_dtype
    shares = [share for _, share in nodes]

    def one(nodes: list, kernel: object, bias: jax.Array | None) -> tuple:
        nodes = [node if share is None else node.bind(share) for node, share in zip(nodes, shares, strict=True)]
        for node in nodes:
            kernel = node.weight(kernel, None)
        kernel = dense(kernel, "float32")
        for node in nodes:  # before the inputs' changes: `output` reads an input that has been changed already
            kernel, bias = node.fold_output(kernel, bias)
        for node in reversed(nodes):
            kernel = node.fold_input(kernel)
        return kernel.astype(dtype), bias

    stacked = kernel.ndim == 3
    kernel, bias = (jax.vmap(one) if stacked else one)([node for node, _ in nodes], kernel, params.get("bias"))
    return {"kernel": kernel} | ({} if bias is None else {"bias": bias})
