"""OLoRA: LoRA that starts from the kernel's QR decomposition (Büyükakyüz, arXiv 2406.01775, section 3).

    W' = Q R;   A0 = R_r' [in, r], B0 = Q_r' [r, out], r the first rows and columns
    h = x (W - s A0 B0) + s x A B,    A = A0 and B = B0 at the start, s = alpha / r

    after   peft {"q": {"olora": Start(a[L, in, r], b[L, r, out], a0, b0, scale[L])}}

B's rows are orthonormal; W' since the paper's kernel is [out, in]. As in PiSSA the base is not changed, a fresh one is
the base itself, and a file holds the start too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from research.peft.lora import from_kernels, loras
from research.peft.method import Card, Method, Variables
from research.peft.pissa import Start

CARD = Card(paper="2406.01775", kind="reparametrisation")


def olora(rank: int = 8, alpha: float = 16.0, targets: str = "attn/(q|v)") -> Method:
    """LoRA that starts from orthonormal columns of the kernel.

    Args:
        rank: r, at most the smaller side of a kernel.
        alpha: the update is scaled by alpha / rank.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    init = loras("olora", rank, alpha, targets, make=lambda site, a, b, scale: Start(a, b, a, b, scale))

    def start(node: Start, w: jax.Array) -> Start:
        q, r = jnp.linalg.qr(w.T)
        return node.at(r[:rank].T, q[:, :rank].T)

    def fit(rng: jax.Array, variables: Variables, loss: Any, batches: Any) -> Variables:
        return from_kernels(variables, start)

    return Method(init, fit=fit)
