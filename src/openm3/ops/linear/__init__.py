"""Linear layers: `linear(x, weight)` gives `x @ weight^T`, where x is [..., D] and the weight [O, D].

The weight is float, or a `QuantisedWeight`: int8 codes of shape [O, D] and float32 scales [O, G], where weight
[o, d] is code[o, d] * scale[o, d * G // D]. Products are summed in float32 whatever the inputs (float64 for float64),
with the result in the dtype of x; where both are bfloat16 and PyTorch's own product is faster (native.py says from how
many tokens on), it is used and sums as PyTorch does.

`linear_each(x_TD, weights)` is the list of `linear(x_TD, weight)`, in one call where the tokens are few.

`quantise(weight, group)` makes such a weight, `dequantise(weight)` is its meaning in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.linear import blocked, native, reference
from openm3.ops.linear.quantised import QuantisedWeight as QuantisedWeight
from openm3.ops.linear.quantised import Weight as Weight
from openm3.ops.linear.quantised import dequantise as dequantise
from openm3.ops.linear.quantised import quantise as quantise

LINEAR = Operator(
    "linear",
    (
        Implementation("native", native.supports, native.linear),
        Implementation("blocked", blocked.supports, blocked.linear),
        Implementation("reference", always, reference.linear),
    ),
)


def _one_by_one(x_TD: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    return [LINEAR(x_TD, weight) for weight in weights]


LINEAR_EACH = Operator(
    "linear_each",
    (
        Implementation("native", native.supports_each, native.linear_each),
        Implementation("reference", always, _one_by_one),
    ),
)
OPERATORS = (LINEAR, LINEAR_EACH)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight^T`: [..., D] times [O, D] gives [..., O]."""
    _check(x, weight)
    out: Tensor = LINEAR(x, weight)
    return out


def linear_each(x_TD: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """`linear(x_TD, weight)` for each of some weights."""
    for weight in weights:
        _check(x_TD, weight)
    outs: list[Tensor] = LINEAR_EACH(x_TD, weights)
    return outs


def _check(x: Tensor, weight: Weight) -> None:
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [..., D] and [O, D]")
