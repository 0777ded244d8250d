"""(IA)3: three learnt vectors a layer rescale keys, values and the feed-forward's hidden units (Liu et al., arXiv
2205.05638, section 3.3).

    softmax(q (l_k * k)' / sqrt(K)) (l_v * v)    and    (l_ff * gamma(x W1)) W2,    l = 1

    after   peft {"attn": {"k": {"ia3": Scale(l[L, out])}, "v": ...}, "mlp": {"down": {"ia3": ScaleInput(l[L, in])}}}

With l = 1 a fresh (IA)3 is the base itself. Folds into the columns (rows) of the kernels. Cross-attention is rescaled
like self-attention where a model has it. The authors' code scales the output of T5's wi_1, one factor of the product
that `down` reads: the same.
"""

from typing import Any, ClassVar

import jax

from research.errors import FlagError
from research.nn.sites import LinearNode, Site
from research.peft import tree
from research.peft.method import Card, Method, PyTree, Sites, constant, leaf, place, select

CARD = Card(paper="2205.05638", kind="additive", memory="yes", inference="extra gating")


class Scale(LinearNode):
    """y * l with l [out], after the bias."""

    l: Any  # noqa: E741
    trained: ClassVar[tuple[str, ...]] = ("l",)

    def output(self, x: jax.Array, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        return y * self.l.astype(y.dtype)

    def fold_output(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return w * self.l, None if bias is None else bias * self.l


class ScaleInput(LinearNode):
    """x * l with l [in], before the kernel."""

    l: Any  # noqa: E741
    trained: ClassVar[tuple[str, ...]] = ("l",)

    def input(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return x * self.l.astype(x.dtype)

    def fold_input(self, w: jax.Array) -> jax.Array:
        return w * self.l[:, None]


def ia3(targets: str = "(cross_)?attn/(k|v)", feedforward: str = "mlp/down") -> Method:
    """Rescales keys, values and hidden units.

    Args:
        targets: pattern of the linear sites whose output is scaled; empty for none.
        feedforward: pattern of those whose input is, which is the hidden layer after its activation; empty for none.
    Raises FlagError for a pattern without a match, and where both are empty.
    """
    if not targets and not feedforward:
        raise FlagError("ia3: targets and feedforward are both empty, so there is nothing to scale: name one of them.")

    def scale(site: Site, rng: jax.Array) -> Scale:
        return Scale(leaf(site, rng, constant(1.0), site.shape[1:], site.axes[1:]))

    def scale_input(site: Site, rng: jax.Array) -> ScaleInput:
        return ScaleInput(leaf(site, rng, constant(1.0), site.shape[:1], site.axes[:1]))

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        outputs = select(sites, "linear", targets) if targets else {}
        inputs = select(sites, "linear", feedforward, "feedforward") if feedforward else {}
        if both := sorted(set(outputs) & set(inputs)):
            raise FlagError(f"targets={targets} and feedforward={feedforward} both match {both[0]}.")
        return tree.merge_dicts(place(outputs, "ia3", rng, scale), place(inputs, "ia3", rng, scale_input))

    return Method(init)
