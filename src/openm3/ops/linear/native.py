"""The linear layer natively: a few tokens read the weight once, as it is stored; more go through PyTorch's product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from openm3.ops import native
from openm3.ops.linear.blocked import panels
from openm3.ops.linear.quantised import QuantisedWeight, Weight

FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 4, torch.int8: 32}
"""By the weight's dtype: up to here one reading of the weight takes longer than the arithmetic of the kernel."""

SMALL = {torch.float32: 1 << 20, torch.bfloat16: 0}
"""By the weight's dtype: fewer elements stay in a cache, where PyTorch is as fast. Its bfloat16 product starts late."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    stored, scale = weight if isinstance(weight, QuantisedWeight) else (weight, None)
    if isinstance(weight, QuantisedWeight) and x.numel() > FEW_TOKENS[torch.int8] * x.shape[-1]:
        return panels(x, weight, dequantise)
    x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty((x_TD.shape[0], stored.shape[0]), dtype=x.dtype)
    native.loaded().linear(
        to_dlpack(native.dense(x_TD)),
        to_dlpack(native.dense(stored)),
        None if scale is None else to_dlpack(native.dense(scale)),
        to_dlpack(out),
        native.threads(),
    )
    return out if x.ndim == 2 else out.view(*x.shape[:-1], -1)


def dequantise(weight: QuantisedWeight) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32)
    native.loaded().dequantise(weight.code, weight.scale, out, native.threads())
    return out


def supports(x: Tensor, weight: Weight) -> str | None:
    if isinstance(weight, QuantisedWeight):
        groups = weight.scale.shape[-1]
        if groups != 1 and weight.shape[-1] % (16 * groups):
            return f"needs whole rows or multiples of 16 inputs a scale, not {groups} scales for {weight.shape[-1]}"
        return native.refusal(x)
    reason = native.refusal(x, weight)
    if reason is not None or x.dtype != weight.dtype:
        return reason
    few = FEW_TOKENS[weight.dtype]
    if x.numel() > few * x.shape[-1]:
        return f"PyTorch is faster from {few + 1} tokens on"
    small = SMALL[weight.dtype]
    return None if weight.numel() >= small else f"PyTorch is as fast below {small:,} weights"
