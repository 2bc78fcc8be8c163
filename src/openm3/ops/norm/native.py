"""Norms in native code. Source: cpu.cpp beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dim() != 2:
        return rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    out = torch.empty(x.shape, dtype=x.dtype)
    native.loaded().rms_norm(native.dense(x), native.dense(weight), eps, out, native.threads())
    return out


def norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> Tensor:
    out_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype)
    rope = (native.dense(cos_TW), native.dense(sin_TW))
    native.loaded().norm_rotate(native.dense(x_TNH), native.dense(weight_H), *rope, eps, out_TNH, native.threads())
    return out_TNH


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return native.refusal(x, weight)


def supports_norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> str | None:
    reason = native.refusal(x_TNH, weight_H, cos_TW, sin_TW)
    if reason is None and not cos_TW.dtype == sin_TW.dtype == torch.float32:
        return "takes rotary tables in float32"
    return reason
