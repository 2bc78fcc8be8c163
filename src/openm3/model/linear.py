"""A linear layer whose weight may be kept as int8 codes."""

from __future__ import annotations

from torch import Tensor, nn

from openm3.ops.linear import QuantisedWeight, Weight, linear


class Linear(nn.Linear):
    """A linear layer without bias. Quantised, `weight` holds int8 codes and `weight_scale` their scales."""

    weight_scale: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, joined(self.weight, self.weight_scale))


def joined(weight: Tensor, scale: Tensor | None) -> Weight:
    """A weight as operators take it: with its scale if it has one."""
    return weight if scale is None else QuantisedWeight(weight, scale)
