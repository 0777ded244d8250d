"""Every method on both models against the papers' formulas in fp64 NumPy: no line is shared with the library."""

import math

import numpy as np
import pytest

from research.peft import tree
from tests import tiny

SPECS = [
    "linear_probe",
    "lora:targets=all,alpha=3",
    "ia3",
    "houlsby:width=5",
    "pfeiffer:width=5",
    "prefix:hidden=0",
    "ptuning_v2",
    "prompt",
]
erf = np.vectorize(math.erf)


def norm(p: dict, path: str, x: np.ndarray, eps: float) -> np.ndarray:
    if f"{path}/bias" not in p:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{path}/scale"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{path}/scale"] + p[f"{path}/bias"]


def linear(p: dict, a: dict, path: str, x: np.ndarray) -> np.ndarray:
    """(x l_in) W + s x A B + b, times l_out."""
    l_in = a.get(f"{path}/ia3/l") if path.endswith("down") else None
    x = x if l_in is None else x * l_in
    y = x @ p[f"{path}/kernel"] + p.get(f"{path}/bias", 0)
    if f"{path}/lora/a" in a:
        y = y + 3 / 8 * (x @ a[f"{path}/lora/a"]) @ a[f"{path}/lora/b"]
    return y if l_in is not None else y * a.get(f"{path}/ia3/l", 1)


def bottleneck(a: dict, path: str, name: str, y: np.ndarray, h: np.ndarray) -> np.ndarray:
    """y + f(h W_down + b_down) W_up + b_up."""
    node = f"{path}/{name}/"
    if node + "down" not in a:
        return y
    h = h @ a[node + "down"] + a[node + "down_bias"]
    tanh_gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    h = np.maximum(h, 0) if name == "pfeiffer" else tanh_gelu
    return y + h @ a[node + "up"] + a[node + "up_bias"]


def turn(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotates the pairs (i, i + K/2) of x [T, H, K]."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * positions[:, None, None] * theta ** (-np.arange(half) / half)
    )
    return np.concatenate([z.real, z.imag], -1)


def attention(p, a, x, config, positions=None) -> np.ndarray:
    """x [T, D] -> [T, D]; with positions it is causal and rotated. Prefixes come first, unrotated and seen by all."""
    q, k, v = (linear(p, a, f"attn/{n}", x).reshape(len(x), -1, 8) for n in "qkv")
    if positions is not None:
        q, k = turn(q, positions, config.rope_theta), turn(k, positions, config.rope_theta)
    extra = 0
    for name in ("prefix", "ptuning_v2"):
        if f"attn/kv/{name}/k" in a:
            k, v = (np.concatenate([a[f"attn/kv/{name}/{n}"], y]) for n, y in (("k", k), ("v", v)))
            extra = len(k) - len(x)
    k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(8)
    if positions is not None:
        scores[:, np.triu(np.ones((len(x), len(k)), bool), 1 + extra)] = -np.inf
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hts,shk->thk", probs / probs.sum(-1, keepdims=True), v)
    return linear(p, a, "attn/o", y.reshape(len(x), -1))


def encoder(p: dict, layers: list, x: np.ndarray, positions: np.ndarray, config) -> np.ndarray:
    x = x + p["embed/positions/embedding"][positions] + p["embed/types/embedding"][0]
    x = norm(p, "embed/norm", x, config.norm_eps)
    for w, a in layers:
        y = attention(w, a, x, config)
        x = norm(w, "attn_norm", x + bottleneck(a, "attn_residual", "houlsby", y, y), config.norm_eps)
        h = linear(w, a, "mlp/up", x)
        y = linear(w, a, "mlp/down", h * (1 + erf(h / np.sqrt(2))) / 2)
        y = bottleneck(a, "mlp_residual", "houlsby", y, y)
        y = bottleneck(a, "mlp_residual", "pfeiffer", y, norm(w, "mlp_norm", x + y, config.norm_eps))
        x = norm(w, "mlp_norm", x + y, config.norm_eps)
    return x


def decoder(p: dict, layers: list, x: np.ndarray, positions: np.ndarray, config) -> np.ndarray:
    for w, a in layers:
        y = attention(w, a, norm(w, "attn_norm", x, config.norm_eps), config, positions)
        x = x + bottleneck(a, "attn_residual", "houlsby", y, y)
        h = norm(w, "mlp_norm", x, config.norm_eps)
        gate = linear(w, a, "mlp/gate", h)
        y = linear(w, a, "mlp/down", gate / (1 + np.exp(-gate)) * linear(w, a, "mlp/up", h))
        y = bottleneck(a, "mlp_residual", "houlsby", y, y)
        x = x + bottleneck(a, "mlp_residual", "pfeiffer", y, x + y)
    return norm(p, "norm", x, config.norm_eps) @ p["lm_head/kernel"]


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_formula(spec, family):
    case, data = tiny.case(spec, family), tiny.batch()
    p, a = ({k: np.asarray(x, np.float64) for k, x in tree.paths(case.point[c]).items()} for c in ("params", "peft"))
    a |= {k: np.full_like(x, 3 / 8) for k, x in a.items() if k.endswith("scale")}
    point = case.point | {
        "peft": tree.map_with_path(lambda k, x: x * 0 + 3 / 8 if k.endswith("scale") else x, case.point["peft"])
    }
    outputs = case.forward(point)
    cut = lambda tree, i: {k.removeprefix("layers/"): x[i] for k, x in tree.items() if k.startswith("layers/")}  # noqa: E731
    layers = [(cut(p, i), cut(a, i)) for i in range(case.config.num_layers)]
    virtual = next((x for k, x in a.items() if k.startswith("embed/prompt/prompt/")), np.zeros((0, 32)))
    shift = {"prefix:hidden=0": 10, "ptuning_v2": 20}.get(spec, 0)
    for row in range(tiny.ROWS):
        tokens = data["tokens"][row][data["mask"][row] == 1]
        x = np.concatenate([virtual, p["embed/tokens/embedding"][tokens]])
        expected = {"encoder": encoder, "decoder": decoder}[family](
            p, layers, x, np.arange(len(x)) + shift, case.config
        )
        np.testing.assert_allclose(outputs[row][: len(tokens)], expected[len(virtual) :], atol=2e-5, rtol=1e-5)
