"""The linear layer through PyTorch's own product; a quantised weight is widened a panel of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.ops.linear.quantised import Weight, dequantise

PANEL = 1 << 18
"""Weights widened at a time: 1 MB in float32, which stays in a core's cache until it is used."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    outputs, inputs = weight.shape
    wide = x.float()
    step = max(1, PANEL // inputs)
    parts = [F.linear(wide, dequantise(weight.at(slice(first, first + step)))) for first in range(0, outputs, step)]
    return torch.cat(parts, -1).to(x.dtype) if parts else x.new_zeros((*x.shape[:-1], 0))


def supports(x: Tensor, weight: Weight) -> str | None:
    if isinstance(weight, Tensor):
        return None if weight.dtype == x.dtype else f"needs a weight of x's dtype, {name(x)}, not {name(weight)}"
    return None if x.dtype != torch.float64 else "widens quantised weights to float32, not float64"


def name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
