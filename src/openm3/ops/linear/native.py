"""The linear layer natively, the weight read as it is stored. Source: cpu.cpp beside this file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from openm3.ops import native
from openm3.ops.linear.quantised import QuantisedWeight, Weight

FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 4}
"""By the weight's dtype: from more on, PyTorch's product is faster than one without matrix tiles."""

FEW_TOKENS_ON_TILES = {torch.bfloat16: 256}
"""With them, only its bfloat16 product is, and only for many tokens: 0.95 ms against 1.1 for 512 tokens, 512 inputs and
2,048 outputs, but 0.30 against 0.25 for 64; in float32 6.5 to 7 ms against 4.1 for 512 tokens."""

SMALL = {torch.float32: 1 << 20, torch.bfloat16: 0}
"""By the weight's dtype: fewer elements stay in a cache, where PyTorch is as fast. Its bfloat16 product starts late."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty((x_TD.shape[0], weight.shape[0]), dtype=x.dtype)
    code, scale = stored(weight)
    native.loaded().linear(
        to_dlpack(native.dense(x_TD)),
        to_dlpack(code),
        None if scale is None else to_dlpack(scale),
        to_dlpack(out),
        native.threads(),
    )
    return out if x.ndim == 2 else out.view(*x.shape[:-1], -1)


def stored(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """The numbers of a weight as they are stored, and their scales if they are codes."""
    if isinstance(weight, QuantisedWeight):
        return native.dense(weight.code), native.dense(weight.scale)
    return native.dense(weight), None


def refusal(weights: tuple[Weight, ...], *others: Tensor) -> str | None:
    """Why native code cannot take these weights, which may be quantised, with these tensors."""
    for weight in weights:
        if isinstance(weight, QuantisedWeight):
            groups = weight.scale.shape[-1]
            if groups != 1 and weight.shape[-1] % (16 * groups):
                return f"needs whole rows or multiples of 16 inputs a scale, not {groups} scales for {weight.shape[-1]}"
    return native.refusal(*others, *(weight for weight in weights if isinstance(weight, Tensor)))


def supports(x: Tensor, weight: Weight) -> str | None:
    reason = refusal((weight,), x)
    if reason is not None or isinstance(weight, QuantisedWeight) or x.dtype != weight.dtype:
        return reason
    few = (FEW_TOKENS_ON_TILES if native.loaded().has_tiles else FEW_TOKENS).get(weight.dtype)
    if few is not None and x.numel() > few * x.shape[-1]:
        return f"PyTorch is faster from {few + 1} tokens on"
    small = SMALL[weight.dtype]
    return None if weight.numel() >= small else f"PyTorch is as fast below {small:,} weights"
