"""RMS norm with unit offset, and the per-head q/k norm with partial rotary positions that follows it.

`rms_norm(x, weight, eps)` scales the last axis to unit root mean square and multiplies by `1 + weight` (Gemma's form;
statistics in float32, result in the dtype of x).

`norm_rotate(x_TNH, weight_H, cos_TW, sin_TW, eps)` norms each head, then rotates its first 2W channels: channel i with
channel W+i by the token's angle (NeoX halves); the other channels pass. Float32 throughout, rounded once at the end.

`rotary_table(position_T, rotary_dim, theta)` gives cos and sin [T, rotary_dim / 2] in float32, of whole positions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from openm3.ops.dispatch import Implementation, Operator, always, compiled
from openm3.ops.norm import native, reference
from openm3.ops.triton import implementation as in_triton

RMS_NORM = Operator(
    "rms_norm",
    (
        Implementation("native", native.supports_rms_norm, native.rms_norm),
        in_triton("norm", "rms_norm"),
        Implementation("reference", always, reference.rms_norm),
        compiled(reference.rms_norm),
    ),
)
NORM_ROTATE = Operator(
    "norm_rotate",
    (
        Implementation("native", native.supports_norm_rotate, native.norm_rotate),
        in_triton("norm", "norm_rotate"),
        Implementation("reference", always, reference.norm_rotate),
        compiled(reference.norm_rotate),
    ),
)
OPERATORS = (RMS_NORM, NORM_ROTATE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last axis of x to unit root mean square, times `1 + weight`."""
    out: Tensor = RMS_NORM(x, weight, eps)
    return out


def norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> Tensor:
    """Norm each head of x, then rotate its first 2W channels to the token's position."""
    if 2 * cos_TW.shape[-1] > x_TNH.shape[-1]:
        raise ValueError(f"{2 * cos_TW.shape[-1]} rotary channels do not fit a head of {x_TNH.shape[-1]}")
    out: Tensor = NORM_ROTATE(x_TNH, weight_H, cos_TW, sin_TW, eps)
    return out


def rotary_table(position_T: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, rotary_dim / 2] (float32) of the rotary angles at whole-number positions."""
    angle_TW = position_T.float()[:, None] * _frequencies(rotary_dim, theta, position_T.device)
    return angle_TW.cos(), angle_TW.sin()


@functools.lru_cache(maxsize=8)
def _frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    # Whoever asks first may infer, and others train with the same numbers.
    with torch.inference_mode(False):
        exponent_W = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        return 1.0 / theta**exponent_W
