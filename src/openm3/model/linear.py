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

    def stored(self) -> Weight:
        """The weight as operators take it."""
        # `self.weight` and `self.weight_scale`, without the module's detours to them: a step asks for dozens.
        weight = self._parameters["weight"]
        assert weight is not None
        return joined(weight, self._buffers["weight_scale"])

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.stored())


def joined(weight: Tensor, scale: Tensor | None) -> Weight:
    """A weight as operators take it: with its scale if it has one."""
    return weight if scale is None else QuantisedWeight(weight, scale)
