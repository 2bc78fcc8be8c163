"""Normalisation and rotation, as defined: pure PyTorch, computed in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, weight, eps).to(x.dtype)


def norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> Tensor:
    wide_TNH = _normed(x_TNH, weight_H, eps)
    half = cos_TW.shape[-1]
    cos, sin = cos_TW[:, None].to(wide_TNH.dtype), sin_TW[:, None].to(wide_TNH.dtype)
    a, b, rest = wide_TNH[..., :half], wide_TNH[..., half : 2 * half], wide_TNH[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x_TNH.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * (1.0 + weight.to(wide.dtype))
