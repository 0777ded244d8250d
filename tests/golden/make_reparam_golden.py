"""Writes reparam.npz: what one layer of Hugging Face PEFT gives with each reparametrisation method's tensors, which
tests/peft/test_reparam.py compares with.

Run with an environment that has torch and peft (made with torch 2.13, peft 0.21.2):

    python tests/golden/make_reparam_golden.py
"""

import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from peft.tuners.boft import layer as boft_layer

D_IN, D_OUT, ROWS = 24, 36, 5


class BlockDiagonal:
    """BOFT's CUDA kernel in torch: without one, HF PEFT allows a single butterfly factor."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


CASES = {
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 6}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 4}),
    "lokr_whole": (peft.LoKrConfig, {"r": 8, "alpha": 4}),
    "lokr_both": (peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 6}),
    "hira": (peft.HiraConfig, {"r": 3}),
    "miss": (peft.MissConfig, {"r": 7}),
    "miss_mini": (peft.MissConfig, {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss_bat": (peft.MissConfig, {"r": 6, "init_weights": "bat"}),
    "shira": (peft.ShiraConfig, {"r": 2, "random_seed": 5}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": True}),
    "oft_exact": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft_share": (peft.OFTConfig, {"oft_block_size": 6, "block_share": True}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "boft_factors": (peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hra_orthogonal": (peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 30, "scaling": 20.0}),
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    base = torch.nn.Linear(D_IN, D_OUT)
    x = torch.randn(ROWS, D_IN)
    arrays = {"x": x, "kernel": base.weight.T, "bias": base.bias}
    boft_layer.FastBlockDiag = BlockDiagonal
    for name, (config, options) in CASES.items():
        boft_layer.get_fbd_cuda = lambda several=name == "boft_factors": several
        model = torch.nn.ModuleDict({"q": torch.nn.Linear(D_IN, D_OUT)})
        model["q"].load_state_dict(base.state_dict())
        layer = peft.get_peft_model(model, config(target_modules=["q"], **options)).eval().base_model.model["q"]
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
        for key, value in layer.named_parameters():
            if value.requires_grad:
                arrays[f"{name}/{key.replace('.default', '')}"] = value
        if name == "fourierft":
            arrays["fourierft/indices"] = layer.indices["default"]
        if name == "shira":
            arrays["shira/indices"] = layer.shira_indices["default"]
        arrays[f"{name}/y"] = layer(x)
        print(f"{name:16} moves y by {(layer(x) - base(x)).abs().max():.2f}")
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("reparam.npz"), **arrays)


if __name__ == "__main__":
    main()
