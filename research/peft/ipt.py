"""IPT: a prompt in the small space that the prompts of other tasks span (Qin et al., arXiv 2110.07867, section 3).

    P = tanh(z W1 + b1) W2 + b2,    z [d_I], W1 [d_I, hidden], W2 [hidden, P*D];   only z trains

    in training  peft {"reparam": {"ipt": Intrinsic(code[d_I], w1, b1, w2, b2)}}
    realised     peft {"embed": {"prompt": {"ipt": VirtualTokens(table[P, D])}}}

What is kept is the realised table. `sources` are trained prompts: `fit` trains the autoencoder of a linear encoder and
the decoder above on them by their squared error, and z starts at the mean of their codes. The paper adds the source
tasks' own losses, for which `fit` would need their data. Without sources the decoder is a random nonlinear projection,
weights U(-1/sqrt(n), 1/sqrt(n)) for n inputs and biases 0, and no task's subspace; z ~ N(0, 1) then gives prompts about
as large as prompt tuning's. With d_I = 250 and hidden = 768 the autoencoder of 100 tokens on BART-base has the 78M
parameters that the survey counts; the decoder is frozen, but in memory while z trains.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from research.errors import FlagError
from research.nn.sites import Node
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    Variables,
    at_least,
    fold,
    leaf,
    normal,
    select,
    uniform,
    zeros,
)  # fmt: skip
from research.peft.prompt import realised
from research.peft.spot import trained

CARD = Card("2110.07867", "additive", "yes", "extra FFN and input", small="length=5,code=6,hidden=8")
STEPS, RATE = 1000, 1e-3


class Intrinsic(Node):
    """code [d_I] trains; w1 [d_I, hidden], b1 [hidden], w2 [hidden, P, D], b2 [P, D] are frozen."""

    code: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ("code",)

    def __call__(self) -> jax.Array:
        """-> [P, D]."""
        return jnp.tensordot(jnp.tanh(self.code @ self.w1 + self.b1), self.w2, 1) + self.b2


def ipt(length: int = 20, code: int = 250, hidden: int = 768, sources: str = "", steps: int = STEPS) -> Method:
    """A prompt decoded from a trained code.

    Args:
        length: P.
        code: d_I.
        hidden: width of the decoder.
        sources: adapter directories of soft prompts on the same base, as in runs/a|runs/b; only `fit` reads them.
        steps: of the autoencoder's training (Adam at 1e-3, all prompts a step).
    Raises FlagError for a value out of range, and steps without sources; `fit` raises as `spot` does.
    """
    for name, value in (("length", length), ("code", code), ("hidden", hidden), ("steps", steps)):
        at_least(name, value, 1)
    directories = [name.strip() for name in sources.split("|")] if sources else []
    if not all(directories):
        raise FlagError(f"sources={sources} has an empty name: name directories, as in sources=runs/a|runs/b.")
    if steps != STEPS and not directories:
        raise FlagError(f"steps={steps} is not used without sources: leave it out, or name sources=runs/a|runs/b.")

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        site = next(iter(select(sites, "embed", ".*").values()))
        keys, shape, axes = jax.random.split(fold(rng, "ipt"), 3), (length, *site.shape), (None, *site.axes)
        return {
            REPARAM: {
                "ipt": Intrinsic(
                    leaf(site, keys[0], normal(1.0), (code,)),
                    leaf(site, keys[1], uniform(code**-0.5), (code, hidden)),
                    leaf(site, keys[1], zeros, (hidden,)),
                    leaf(site, keys[2], uniform(hidden**-0.5), (hidden, *shape), (None, *axes)),
                    leaf(site, keys[2], zeros, shape, axes),
                )
            }
        }

    def fit(rng: jax.Array, variables: Variables, *_: Any) -> Variables:
        node = variables["peft"][REPARAM]["ipt"]
        tables = jnp.stack([trained(directory, *node.b2.shape) for directory in directories])
        node = autoencoded(fold(rng, "encoder"), node, tables, steps)
        return variables | {"peft": variables["peft"] | {REPARAM: {"ipt": node}}}

    realise = lambda variables, sites: realised(variables, sites, "ipt")  # noqa: E731
    return Method(init, fit=fit if directories else None, realise=realise, identity=False)


def autoencoded(rng: jax.Array, node: Intrinsic, prompts: jax.Array, steps: int) -> Intrinsic:
    """The decoder trained on prompts [S, P, D] together with a linear encoder, and the mean of their codes."""
    flat = prompts.reshape(len(prompts), -1)
    n = flat.shape[1]
    start = {
        "w": uniform(n**-0.5)(rng, (n, node.code.shape[0])),
        "b": jnp.zeros_like(node.code),
        "decoder": node,
    }
    encode = lambda p: flat @ p["w"] + p["b"]  # noqa: E731

    def error(p: dict) -> jax.Array:
        decoded = jax.vmap(lambda z: p["decoder"].replace(code=z)())(encode(p))
        return jnp.mean((decoded - prompts) ** 2)

    tx = optax.adam(RATE)

    def step(carry: tuple, _: None) -> tuple:
        p, state = carry
        updates, state = tx.update(jax.grad(error)(p), state)
        return (optax.apply_updates(p, updates), state), None

    p = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(start)
    return p["decoder"].replace(code=encode(p).mean(axis=0))
