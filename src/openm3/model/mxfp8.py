"""MXFP8 as checkpoints hold it: E4M3 values in groups of 32 along the last axis, each with an E8M0 power of two.

Source: OCP Microscaling Formats (MX) v1.0. Knows neither files nor names beyond a scale tensor's.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
DTYPE = "F8_E4M3"
"""How a safetensors header spells the values' dtype."""

SCALE_DTYPES = ("U8", "F8_E8M0")
SCALE_SUFFIX = "_scale_inv"
"""Added to a tensor's name, it names the tensor of its scales, which are factors for all that name says."""

_LARGEST = 448.0
_BIAS = 127


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of values of a shape: a last group may be shorter."""
    return (*shape[:-1], -(-shape[-1] // GROUP))


def decode(code: Tensor, exponent: Tensor) -> Tensor:
    """The values in float32, exactly: code times 2^(exponent - 127). Code 0x7f or 0xff, or exponent 255, is NaN.

    `code` is float8_e4m3fn [..., D], `exponent` uint8 or float8_e8m0fnu [..., D / 32, rounded up]. A product beyond
    float32's range is an infinity, as in any float32 product.
    """
    value, scale = code.float(), exponent.view(torch.float8_e8m0fnu).float()
    whole = value.shape[-1] // GROUP * GROUP
    value[..., :whole].unflatten(-1, (-1, GROUP)).mul_(scale[..., : whole // GROUP, None])
    value[..., whole:].mul_(scale[..., whole // GROUP :])
    return value


def encode(value: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes and their exponents (uint8), the smallest power of two that keeps a group's codes finite.

    Values must be finite.
    """
    width = value.shape[-1]
    padded = torch.nn.functional.pad(value.detach().float(), (0, -width % GROUP))
    part = padded.unflatten(-1, (-1, GROUP))
    fraction, power = torch.frexp(part.abs().amax(-1) / _LARGEST)
    power = (power - (fraction == 0.5).int()).clamp(-_BIAS, _BIAS)
    # A power of two beyond float32's normal numbers is reached in two steps.
    half = power // 2
    code = torch.ldexp(torch.ldexp(part, -half[..., None]), (half - power)[..., None])
    code = code.clamp(-_LARGEST, _LARGEST).flatten(-2)[..., :width].to(torch.float8_e4m3fn)
    return code, (power + _BIAS).to(torch.uint8)
