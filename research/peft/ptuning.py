"""P-tuning: virtual tokens that an encoder makes from trained ones (Liu et al., arXiv 2103.10385v1, section 3.2).

    lstm   p = relu([LSTM_forward(e), LSTM_backward(e)] W1 + b1) W2 + b2,    two layers of m a direction, W1 [2m, 2m]
    mlp    p = relu(relu(e W1 + b1) W2 + b2) W3 + b3,                        m wide

    in training  peft {"reparam": {"ptuning": Encoder(table[P, D], lstm, head)}}
    realised     peft {"embed": {"prompt": {"ptuning": VirtualTokens(table[P, D])}}}

What is kept is the realised table. The LSTM is the authors' code's for LAMA, m = D/2, and with `hidden` = D HF PEFT's;
the MLP is HF PEFT's, m = D. Everything starts as torch has it: e ~ N(0, 1), weights and biases U(-1/sqrt(n), 1/sqrt(n))
with n = m in the LSTM, else a kernel's input width; two biases a gate, as torch counts them. The paper puts its pseudo
tokens around the text by a template (3, 3, 3); here all stand before it, template (9, 0, 0). There is no dropout.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.errors import FlagError, did_you_mean
from research.nn.sites import Node
from research.peft.method import (
    REPARAM,
    Card,
    Method,
    PyTree,
    Sites,
    at_least,
    fold,
    leaf,
    normal,
    select,
    uniform,
)  # fmt: skip
from research.peft.prompt import realised

CARD = Card(paper="2103.10385", kind="additive", memory="yes", inference="extra input")
ENCODERS = ("lstm", "mlp")


class Encoder(Node):
    """table [P, D].

    lstm {layer: {"w_in" [2, in, 4m], "w_state" [2, m, 4m], "b_in", "b_state" [2, 4m]}}: forward and backward, gates in
    torch's order; empty for an MLP. head {layer: {"kernel" [in, out], "bias" [out]}}, relu between its layers.
    """

    table: Any
    lstm: Any
    head: Any
    kind: ClassVar[str] = REPARAM
    trained: ClassVar[tuple[str, ...]] = ("table", "lstm", "head")

    def __call__(self) -> jax.Array:
        """-> [P, D]."""
        x = self.table
        for layer in sorted(self.lstm):
            forward, backward = jax.vmap(lstm)(self.lstm[layer], jnp.stack([x, x[::-1]]))
            x = jnp.concatenate([forward, backward[::-1]], axis=-1)
        for i, layer in enumerate(sorted(self.head)):
            x = (jax.nn.relu(x) if i else x) @ self.head[layer]["kernel"] + self.head[layer]["bias"]
        return x


def lstm(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One direction of one layer: x [P, in] -> [P, m]."""

    def step(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple:
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ weights["w_state"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(weights["w_state"].shape[0], x.dtype)
    gates = x @ weights["w_in"] + weights["b_in"] + weights["b_state"]
    return jax.lax.scan(step, (zero, zero), gates)[1]


def ptuning(length: int = 9, encoder: str = "lstm", hidden: int | None = None) -> Method:
    """Virtual tokens behind an encoder that is dropped after training.

    Args:
        length: P pseudo tokens.
        encoder: "lstm" or "mlp".
        hidden: m; none is D/2 for the LSTM and D for the MLP.
    Raises FlagError for a value out of range and an unknown encoder.
    """
    at_least("length", length, 1)
    at_least("hidden", 1 if hidden is None else hidden, 1)
    if encoder not in ENCODERS:
        raise FlagError(f"unknown encoder {encoder!r}.{did_you_mean(encoder, ENCODERS)}")

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        site = next(iter(select(sites, "embed", ".*").values()))
        (d,) = site.shape
        m = hidden or (max(d // 2, 1) if encoder == "lstm" else d)
        draw = lambda name, limit, *shape: leaf(site, fold(rng, name), uniform(limit), shape)  # noqa: E731
        widths = (2 * m, 2 * m, d) if encoder == "lstm" else (d, m, m, d)
        head = {
            f"{i}": {
                "kernel": draw(f"head/{i}/kernel", n**-0.5, n, out),
                "bias": draw(f"head/{i}/bias", n**-0.5, out),
            }
            for i, (n, out) in enumerate(zip(widths, widths[1:], strict=False))
        }
        shapes = lambda n: {"w_in": (n, 4 * m), "w_state": (m, 4 * m), "b_in": (4 * m,), "b_state": (4 * m,)}  # noqa: E731
        cells = {
            f"{i}": {name: draw(f"lstm/{i}/{name}", m**-0.5, 2, *shape) for name, shape in shapes(n).items()}
            for i, n in enumerate((d, 2 * m) if encoder == "lstm" else ())
        }
        table = leaf(site, fold(rng, "table"), normal(1.0), (length, d))
        return {REPARAM: {"ptuning": Encoder(table, cells, head)}}

    return Method(init, realise=lambda variables, sites: realised(variables, sites, "ptuning"), identity=False)
