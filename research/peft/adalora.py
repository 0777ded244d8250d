"""AdaLoRA: singular triplets of which the important ones stay (Zhang et al., arXiv 2303.10512, sections 3.1 to 3.3).

    h = x W + (alpha / r0) x P diag(lambda) Q,    r0 triplets a kernel at the start, r on average at the end
    I = |w dL/dw|,   I' <- b1 I' + (1 - b1) I,   U <- b2 U + (1 - b2) |I - I'|,   s(w) = I' U       (eq. 8 to 11)
    S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)                                              (eq. 7)
    lambda_i <- 0 but for the b(t) largest S_i of all kernels,   b(t) = r + (r0 - r) (1 - (t - t_i) / (T - t_f - t_i))^3

    in training  peft {"q": {"adalora": Svd(p[L, in, r0], lam[L, r0], q[L, r0, out], scale[L], state)}}
    realised     the same without state

P, Q ~ N(0, 0.02^2) and lambda = 0, as in the authors' code: a fresh one is the base itself. Up to step T - t_f a zeroed
lambda may grow again; then the choice is final. As in their code (and not eq. 4) the penalty is the mean, and not the
sum, of the norms, and not their squares, of P'P - I and QQ' - I. The steps' defaults have the proportions of their MNLI
run. A kernel that never had a gradient, in a layer that is off, takes no part. State, moving averages and the choice,
is twice the size of what trains; adapters hold none of it.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError
from research.nn.dot import low_rank
from research.nn.sites import LinearNode, Site
from research.peft import tree
from research.peft.lora import check_alpha, check_rank
from research.peft.method import (
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    constant,
    is_node,
    leaf,
    normal,
    place,
    select,
    zeros,
)  # fmt: skip

CARD = Card(paper="2303.10512", kind="reparametrisation", small="steps=8,tinit=1,tfinal=2,every=1")


class Svd(LinearNode):
    """p [in, r], lam [r] and q [r, out] train; scale [] is alpha / r0.

    state: {"smooth": {"p", "lam", "q"}, "unsure": the same, "kept": bool [r]} in training, else None; inert.
    """

    p: Any
    lam: Any
    q: Any
    scale: Any
    state: Any = None
    trained: ClassVar[tuple[str, ...]] = ("p", "lam", "q")
    inert: ClassVar[tuple[str, ...]] = ("state",)

    def weight(self, w: Any, rng: jax.Array | None) -> Any:
        return low_rank(w, self.p * (self.lam * self.scale), self.q)

    def after(self, grads: "Svd", beta1: Any, beta2: Any) -> "Svd":
        """With the moving averages of one more step."""
        w, g = ({name: getattr(node, name) for name in self.trained} for node in (self, grads))
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), w, g)
        smooth = jax.tree.map(lambda s, i: beta1 * s + (1 - beta1) * i, self.state["smooth"], now)
        far = lambda u, s, i: beta2 * u + (1 - beta2) * jnp.abs(i - s)  # noqa: E731
        unsure = jax.tree.map(far, self.state["unsure"], smooth, now)
        return self.replace(state=self.state | {"smooth": smooth, "unsure": unsure})

    def importance(self) -> jax.Array:
        """S [..., r]."""
        s = {name: self.state["smooth"][name] * self.state["unsure"][name] for name in self.trained}
        return s["lam"] + jnp.mean(s["p"], axis=-2) + jnp.mean(s["q"], axis=-1)


def largest(scores: dict[str, jax.Array], count: Any) -> dict[str, jax.Array]:
    """Marks the `count` largest of all scores, of equal ones the later; `count` may be traced."""
    flat = jnp.concatenate([s.ravel() for s in scores.values()])
    marks = jnp.argsort(jnp.argsort(flat)) >= flat.size - count
    parts = jnp.split(marks, np.cumsum([s.size for s in scores.values()])[:-1])
    return {path: part.reshape(s.shape) for part, (path, s) in zip(parts, scores.items(), strict=True)}


def adalora(
    rank: int = 8,
    init_rank: int | None = None,
    alpha: float = 16.0,
    targets: str = "attn/(q|v)",
    steps: int | None = None,
    tinit: int | None = None,
    tfinal: int | None = None,
    every: int = 10,
    orthogonality: float = 0.1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    *,
    run_steps: int | None = None,
) -> Method:
    """LoRA that spends a budget of ranks where they matter.

    Args:
        rank: r, the mean over all kernels at the end.
        init_rank: r0, each kernel's at the start; None is 1.5 times the rank.
        alpha: the update is scaled by alpha / init_rank.
        targets: pattern of linear sites; "all" is every one in the layers.
        steps: T, of the whole run; None is what the run says, or 1000.
        tinit: t_i, steps before the budget falls; None is a tenth of all.
        tfinal: t_f, steps after it has; None is half of all.
        every: steps between two choices.
        orthogonality: weight of the penalty.
        beta1: of the sensitivity's moving average.
        beta2: of its deviations'.
        run_steps: how many steps the run has.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    first = (3 * rank + 1) // 2 if init_rank is None else init_rank
    steps = steps or run_steps or 1000
    tinit, tfinal = (steps // n if t is None else t for t, n in ((tinit, 10), (tfinal, 2)))
    end = steps - tfinal
    for name, value, least in (("rank", rank, 1), ("init_rank", first, rank), ("every", every, 1), ("tinit", tinit, 0)):
        at_least(name, value, least)
    at_least("tfinal", tfinal, 0)
    at_least("orthogonality", orthogonality, 0)
    check_alpha(alpha)
    if tinit >= end:
        raise FlagError(
            f"tinit={tinit} and tfinal={tfinal} leave none of steps={steps} for the budget to fall: their sum is below "
            f"steps, such as tinit={steps // 10},tfinal={steps // 2}."
        )
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise FlagError(f"{name}={beta} is out of range: valid are 0 <= {name} < 1.")

    def node(site: Site, rng: jax.Array) -> Svd:
        (d_in, d_out), (key_p, key_q) = site.shape, jax.random.split(rng)
        check_rank(first, site, "init_rank")
        shapes = {"p": (d_in, first), "lam": (first,), "q": (first, d_out)}
        axes = {"p": (site.axes[0], None), "lam": (None,), "q": (None, site.axes[1])}
        average = {name: leaf(site, rng, zeros, shapes[name], axes[name]) for name in shapes}
        kept = leaf(site, rng, lambda rng, shape: jnp.ones(shape, bool), (first,))
        return Svd(
            leaf(site, key_p, normal(0.02), shapes["p"], axes["p"]),
            leaf(site, rng, zeros, shapes["lam"], axes["lam"]),
            leaf(site, key_q, normal(0.02), shapes["q"], axes["q"]),
            leaf(site, rng, constant(alpha / first), ()),
            {"smooth": average, "unsure": average, "kept": kept},
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "adalora", rng, node)

    def realise(variables: Variables, sites: Sites) -> Variables:
        bare = lambda node: node.replace(state=None)  # noqa: E731
        return variables | {"peft": jax.tree.map(bare, variables["peft"], is_leaf=is_node)}

    def penalty(variables: Variables, rng: jax.Array) -> jax.Array:
        nodes = tree.paths(variables["peft"], is_leaf=is_node).values()
        grams = [jnp.einsum("...nr,...ns->...rs", x, x) for n in nodes for x in (n.p, jnp.swapaxes(n.q, -1, -2))]
        squares = [jnp.sum((g - jnp.eye(first)) ** 2, axis=(-2, -1)).ravel() for g in grams]
        return orthogonality * jnp.mean(jnp.sqrt(jnp.concatenate(squares) + 1e-12))  # the root has no slope at 0

    def update(added: PyTree, grads: PyTree, step: jax.Array) -> PyTree:
        t = step + 1  # steps done, this one included
        rates = [jnp.where(t < end, beta, 1.0) for beta in (beta1, beta2)]  # the averages rest with the choice
        nodes, slopes = (tree.paths(x, is_leaf=is_node) for x in (added, grads))
        nodes = {path: node.after(slopes[path], *rates) for path, node in nodes.items()}
        live = {path: jnp.any(n.state["smooth"]["lam"] > 0, axis=-1, keepdims=True) for path, n in nodes.items()}
        kernels = sum(jnp.sum(x) for x in live.values())
        fall = jnp.clip(1 - (t - tinit) / (end - tinit), 0, 1) ** 3
        budget = kernels * rank + jnp.floor(kernels * (first - rank) * fall).astype(jnp.int32)
        choose = ((t > tinit) & (t < end) & (t % every == 0)) | (t == end)
        chosen = largest({path: jnp.where(live[path], n.importance(), -1.0) for path, n in nodes.items()}, budget)
        for path, n in nodes.items():
            kept = jnp.where(choose, chosen[path], n.state["kept"])
            lam = jnp.where(kept | ~(choose | (t > end)), n.lam, 0.0)
            nodes[path] = n.replace(lam=lam, state=n.state | {"kept": kept})
        return tree.unflatten(nodes)

    return Method(init, realise=realise, penalty=penalty, update=update)
