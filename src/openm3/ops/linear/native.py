"""The linear layer natively, the weight read as it is stored. Source: cpu.cpp beside this file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openm3.ops import native
from openm3.ops.linear.quantised import QuantisedWeight, Weight

FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 4}
"""By the weight's dtype: from more on, PyTorch's product is faster than one without matrix tiles."""

FEW_TOKENS_ON_TILES = {torch.bfloat16: 256}
"""With them, only its bfloat16 product is, and only for many tokens: 0.95 ms against 1.1 for 512 tokens, 512 inputs and
2,048 outputs, but 0.30 against 0.25 for 64; in float32 6.5 to 7 ms against 4.1 for 512 tokens."""

SMALL, FEW_OF_SMALL, FEW_TOGETHER = 1 << 20, 4, 16
"""Float32 weights of fewer elements stay in a cache: PyTorch's product is faster from more tokens than this on, and one
call for several products saves more than that for up to 16: 16 requests of m3-tiny decode 4% faster."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    stored, scale = parts(weight)
    x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty((x_TD.shape[0], stored.shape[0]), dtype=x.dtype)
    native.loaded().linear(native.dense(x_TD), stored, scale, out, native.threads())
    return out if x.ndim == 2 else out.view(*x.shape[:-1], -1)


def linear_each(x_TD: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    stored, scales = zip(*map(parts, weights), strict=True)
    outs = [torch.empty((x_TD.shape[0], weight.shape[0]), dtype=x_TD.dtype) for weight in stored]
    native.loaded().linear_each(native.dense(x_TD), stored, scales, outs, native.threads())
    return outs


def parts(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """The numbers of a weight as they are stored, and their scales if they are codes."""
    if isinstance(weight, QuantisedWeight):
        return native.dense(weight.code), native.dense(weight.scale)
    return native.dense(weight), None


def supports(x: Tensor, weight: Weight, few_of_small: int = FEW_OF_SMALL) -> str | None:
    reason = refusal(x, weight)
    if reason is not None or isinstance(weight, QuantisedWeight) or x.dtype != weight.dtype:
        return reason
    few = (FEW_TOKENS_ON_TILES if native.loaded().has_tiles else FEW_TOKENS).get(weight.dtype)
    if weight.dtype == torch.float32 and weight.numel() < SMALL:
        few = few_of_small
    return None if few is None or x.numel() <= few * x.shape[-1] else f"PyTorch is faster from {few + 1} tokens on"


def supports_each(x_TD: Tensor, weights: Sequence[Weight]) -> str | None:
    if x_TD.shape[0] > FEW_TOGETHER:
        return f"gains nothing from {FEW_TOGETHER + 1} tokens on"
    return refusal(x_TD, *weights)


def refusal(x: Tensor, *weights: Weight) -> str | None:
    """Why native code cannot multiply x with these weights."""
    stored = [x]
    for weight in weights:
        if isinstance(weight, QuantisedWeight):
            groups = weight.scale.shape[-1]
            if groups != 1 and weight.shape[-1] % (16 * groups):
                return f"needs whole rows or multiples of 16 inputs a scale, not {groups} scales for {weight.shape[-1]}"
        else:
            stored.append(weight)
    return native.refusal(*stored)
