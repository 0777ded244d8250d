"""Folding nodes into the base, and taking them out again by keeping the base.

A linear node folds where each hook it has is a change of the kernel: `weight` is one already, `fold_input` and
`fold_output` say what `input` and `output` are. A quantised kernel becomes a float one. Nothing is changed in place, so
a merge that fails has changed nothing and the base one still holds is the exact un-merge.
"""

import jax

from research.errors import ModelError
from research.nn.on import On
from research.nn.param import dense
from research.nn.sites import LinearNode
from research.peft import tree
from research.peft.method import PyTree, Variables, is_node


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
    """Folds the nodes into `params` and takes them out of `peft`; several at one place are folded together, in order.

    Raises ModelError naming the nodes that are no change of a kernel, unless `partial` leaves them where they are.
    """
    params, peft = _fold(variables["params"], variables.get("peft", {}))
    variables = variables | {"params": params, "peft": peft}
    left = sorted({type(n).__name__ for n in tree.paths(peft, is_leaf=is_node).values()})
    if left and not partial:
        raise ModelError(
            f"{', '.join(left)} can't be merged into the base's weights: keep the adapter beside the base."
        )
    return variables if left else {k: v for k, v in variables.items() if k != "peft"}


def _fold(params: PyTree, peft: PyTree) -> tuple[PyTree, PyTree]:
    nodes = {k: v for k, v in peft.items() if is_node(v)}
    rest = {k: v for k, v in peft.items() if not is_node(v)}
    if nodes and all(mergeable(n) for n in nodes.values()):
        params = params | fold_linear([nodes[k] for k in sorted(nodes)], params)
        nodes = {}
    out_params, out_peft = dict(params), dict(nodes)
    for key, inner in rest.items():
        out, left = _fold(params.get(key, {}), inner)
        if key in params:
            out_params[key] = out
        if left:
            out_peft[key] = left
    return out_params, out_peft


def fold_linear(nodes: list[LinearNode], params: dict) -> dict:
    """One projection's {"kernel": [(L,) in, out], "bias"?} with its nodes folded in, in fp32 and back to its dtype."""
    kernel = params["kernel"]
    dtype = kernel.dtype if isinstance(kernel, jax.Array) else kernel.dequantised_dtype

    def one(nodes: list, kernel: object, bias: jax.Array | None) -> tuple:
        for node in nodes:
            kernel = node.weight(kernel, None)
        kernel = dense(kernel, "float32")
        for node in reversed(nodes):
            kernel = node.fold_input(kernel)
        for node in nodes:
            kernel, bias = node.fold_output(kernel, bias)
        return kernel.astype(dtype), bias

    stacked = kernel.ndim == 3
    kernel, bias = (jax.vmap(one) if stacked else one)(nodes, kernel, params.get("bias"))
    return {"kernel": kernel} | ({} if bias is None else {"bias": bias})
