"""The linear layer as defined, in float32 (float64 for float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.ops.linear.quantised import Weight, dequantise


def linear(x: Tensor, weight: Weight) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(wide), dequantise(weight).to(wide)).to(x.dtype)
