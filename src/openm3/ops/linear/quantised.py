"""Weights as int8 codes with float32 scales, shared by linear layers and experts."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

LARGEST = 127


class QuantisedWeight(NamedTuple):
    """A weight [..., O, D]: int8 codes, times one float32 scale for every D / G neighbouring inputs of an output.

    `code` is [..., O, D] and `scale` [..., O, G]. One group a row (G = 1) is what "per output channel" means.
    """

    code: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that this stands for."""
        return self.code.shape

    def at(self, where: int | slice | tuple[int | slice, ...]) -> QuantisedWeight:
        """A view of a part of the leading axes: whole rows."""
        return QuantisedWeight(self.code[where], self.scale[where])


Weight: TypeAlias = Tensor | QuantisedWeight
"""A weight in floating point, or quantised."""


def at(weight: Weight, where: int | slice | tuple[int | slice, ...]) -> Weight:
    """A view of a part of a weight's leading axes, quantised or not."""
    return weight.at(where) if isinstance(weight, QuantisedWeight) else weight[where]


def quantise(weight: Tensor, group: int) -> QuantisedWeight:
    """The nearest codes, where the largest value of each `group` neighbouring inputs of an output gets code 127.

    Raises ValueError for NaN and infinities, which no code stands for, and where `group` does not divide the inputs.
    """
    if group < 1 or weight.shape[-1] % group:
        raise ValueError(f"{weight.shape[-1]} inputs cannot be cut into groups of {group}")
    part = weight.detach().float().unflatten(-1, (-1, group))
    scale = part.abs().amax(-1) / LARGEST
    if not scale.isfinite().all():
        raise ValueError("NaN and infinities cannot be quantised")
    code = (part / scale.where(scale > 0, 1.0)[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return QuantisedWeight(code.to(torch.int8).flatten(-2), scale)


def dequantise(weight: Weight) -> Tensor:
    """The weight in floating point: code times scale, rounded to float32 once; a float weight is itself."""
    if isinstance(weight, Tensor):
        return weight
    groups = weight.scale.shape[-1]
    wide: Tensor = weight.code.unflatten(-1, (groups, -1)) * weight.scale[..., None]
    return wide.flatten(-2)
