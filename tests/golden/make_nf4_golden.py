"""Makes nf4.npz: NF4 codes, scales and values of bitsandbytes 0.50.2 on a CPU (with torch 2.13).

    python tests/golden/make_nf4_golden.py

Each column of a kernel [in, out] is contiguous in its transpose, so that blocks of 64 run along the input as ours do.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

torch.manual_seed(0)
kernel = torch.randn(128, 5) * torch.rand(5)
packed, state = bnb.quantize_4bit(kernel.T.contiguous(), blocksize=64, quant_type="nf4")
packed_bytes = packed.numpy().ravel()
codes = np.stack([packed_bytes >> 4, packed_bytes & 15], axis=-1).reshape(5, 128).T
values = bnb.dequantize_4bit(packed, state).numpy().T
np.savez_compressed(
    Path(__file__).with_name("nf4.npz"),
    kernel=kernel.numpy(),
    codes=codes,
    scale=state.absmax.numpy().reshape(5, 2).T,
    values=values,
    table=state.code.numpy(),
)
