"""Writes ptuning.npz: P-tuning encoders with random weights and the virtual tokens they give, from torch.

Run with an environment that has torch and HF PEFT (made with torch 2.13, peft 0.21.2):

    python tests/golden/make_ptuning_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from peft.tuners.p_tuning import PromptEncoder, PromptEncoderConfig

LENGTH, WIDTH = 5, 6


class Lama(torch.nn.Module):
    """The encoder of the paper's LAMA experiments: half the width a direction, so that the MLP keeps it."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(LENGTH, WIDTH)
        self.lstm_head = torch.nn.LSTM(WIDTH, WIDTH // 2, 2, bidirectional=True, batch_first=True)
        linear = torch.nn.Linear
        self.mlp_head = torch.nn.Sequential(linear(WIDTH, WIDTH), torch.nn.ReLU(), linear(WIDTH, WIDTH))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.mlp_head(self.lstm_head(self.embedding(indices))[0])


def theirs(kind: str) -> PromptEncoder:
    return PromptEncoder(
        PromptEncoderConfig(
            peft_type="P_TUNING",
            num_virtual_tokens=LENGTH,
            token_dim=WIDTH,
            num_transformer_submodules=1,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=4,
        )
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    arrays = {}
    for name, encoder in {"lama": Lama(), "lstm": theirs("LSTM"), "mlp": theirs("MLP")}.items():
        arrays |= {f"{name}/{key}": value.numpy() for key, value in encoder.state_dict().items()}
        with torch.no_grad():
            arrays[f"{name}/tokens"] = encoder(torch.arange(LENGTH)[None])[0].numpy()
    np.savez_compressed(Path(__file__).parent / "ptuning.npz", **arrays)
