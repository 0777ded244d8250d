"""Writes what Hugging Face PEFT makes of small kernels, that tests/peft/test_lora_family.py compares with.

Run with an environment that has torch and peft (made with torch 2.13, peft 0.21.2):

    python tests/golden/make_lora_golden.py          # writes tests/golden/lora.npz

Torch's kernels are [out, in]: everything is stored transposed, as the project has it.
"""

import warnings
from pathlib import Path

import numpy as np
import peft
import torch

D_IN, D_OUT, RANK, TOKENS = 7, 6, 2, 5
STEPS, TINIT, TFINAL, EVERY = 12, 2, 3, 2


class Two(torch.nn.Module):
    """Two projections of one shape."""

    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(D_IN, D_OUT)
        self.v = torch.nn.Linear(D_IN, D_OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.v(x)


def adapted(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model with a LoRA, and its adapted q."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Two(), peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["q"], **options))
    return model, model.base_model.model.q


def moved(model: torch.nn.Module, std: float = 0.4) -> None:
    """A random point for everything that trains."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)


def starts() -> dict[str, torch.Tensor]:
    """What PiSSA and OLoRA leave in the base and put into the adapter."""
    torch.manual_seed(0)
    out = {"kernel": Two().q.weight.T}
    for name in ("pissa", "olora"):
        _, q = adapted(init_lora_weights=name)
        out[f"{name}_residual"] = q.base_layer.weight.T
        out[f"{name}_a"], out[f"{name}_b"] = q.lora_A["default"].weight.T, q.lora_B["default"].weight.T
    return out


def dora() -> dict[str, torch.Tensor]:
    """The output at a random point, and the gradients of its product with `slope`."""
    model, q = adapted(use_dora=True)
    start = q.lora_magnitude_vector["default"].weight.detach().clone()
    moved(model)
    generator = torch.Generator().manual_seed(2)
    x, slope = (torch.randn(shape, generator=generator) for shape in ((TOKENS, D_IN), (TOKENS, D_OUT)))
    y = q(x)
    (y * slope).sum().backward()
    a, b, m = q.lora_A["default"].weight, q.lora_B["default"].weight, q.lora_magnitude_vector["default"].weight
    out = {"x": x, "slope": slope, "y": y, "bias": q.base_layer.bias, "start": start, "a": a.T, "b": b.T, "m": m}
    out |= {"grad_a": a.grad.T, "grad_b": b.grad.T, "grad_m": m.grad}
    return {f"dora_{key}": value for key, value in out.items()}


def adalora() -> dict[str, torch.Tensor]:
    """A run of the allocator: step by step the gradients it was given, and each kernel's lambdas after it."""
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, lora_alpha=4, target_modules=["q", "v"], orth_reg_weight=0.5, total_step=STEPS,
        tinit=TINIT, tfinal=TFINAL, deltaT=EVERY,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(Two(), config)
    moved(model)
    layers = {name: getattr(model.base_model.model, name) for name in ("q", "v")}
    parts = {(name, p): getattr(layer, f"lora_{t}")["default"] for name, layer in layers.items() for p, t in zip(
        ("p", "lam", "q"), "AEB", strict=True)}  # fmt: skip
    flip = lambda p, x: x[..., 0] if p == "lam" else x.T  # noqa: E731
    out = {f"adalora_{name}_{p}": flip(p, x).detach().clone() for (name, p), x in parts.items()}
    x = torch.randn((TOKENS, D_IN), generator=torch.Generator().manual_seed(2))
    out |= {"adalora_x": x, "adalora_y": layers["q"](x)}
    norms = [torch.norm(c - torch.eye(3)) for (_, p), w in parts.items() if p != "lam"
             for c in [w @ w.T if p == "p" else w.T @ w]]  # fmt: skip
    out["adalora_penalty"] = 0.5 * sum(norms) / len(norms)
    generator = torch.Generator().manual_seed(3)
    grads, lams = {key: [] for key in parts}, {name: [] for name in layers}
    for step in range(1, STEPS + 1):
        for (name, p), parameter in parts.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.data -= 0.1 * parameter.grad
            grads[name, p].append(flip(p, parameter.grad))
        model.base_model.update_and_allocate(step)
        for name in layers:
            lams[name].append(flip("lam", parts[name, "lam"].detach().clone()))
    out |= {f"adalora_{name}_{p}_grads": torch.stack(g) for (name, p), g in grads.items()}
    return out | {f"adalora_{name}_lams": torch.stack(x) for name, x in lams.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    arrays = starts() | dora() | adalora()
    arrays = {key: np.ascontiguousarray(x.detach().numpy(), dtype=np.float32) for key, x in arrays.items()}
    np.savez_compressed(Path(__file__).parent / "lora.npz", **arrays)
    for name in ("q", "v"):
        print((arrays[f"adalora_{name}_lams"] != 0).astype(int).tolist())


if __name__ == "__main__":
    main()
