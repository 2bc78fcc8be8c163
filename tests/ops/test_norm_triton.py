"""Norms in Triton: as near to float64 as the reference, on a GPU or in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops.norm import NORM_ROTATE, RMS_NORM, norm_rotate, rms_norm, rotary_table

EPS = 1e-6


def check(got: Tensor, function: Any, x: Tensor, weight: Tensor, *rest: Any) -> None:
    """The error against float64 is at most twice the reference's in this dtype."""
    with openm3.use("reference"):
        theirs = function(x, weight, *rest).double()
        wide = [r.double() if isinstance(r, Tensor) else r for r in rest]
        exact = function(x.double(), weight.double(), *wide)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert (got.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 300), (40, 64)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device) -> None:
    x, weight = torch.randn(shape).to(triton_device, dtype), torch.randn(shape[-1]).to(triton_device, dtype)
    check(rms_norm(x, weight, EPS), rms_norm, x, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "width", "rotary"), [(2, 11, 6), (1, 8, 8), (4, 64, 32)])
def test_norm_rotate(heads: int, width: int, rotary: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    """Heads that are slices of a wider projection, turned far from the start."""
    x_TNH = torch.randn(33, heads + 1, width + 2).to(triton_device, dtype)[:, 1:, 2:]
    weight_H = torch.randn(width).to(triton_device, dtype)
    rope = rotary_table(torch.arange(33, device=triton_device) * 1000, rotary, 5e6)
    check(norm_rotate(x_TNH, weight_H, *rope, EPS), norm_rotate, x_TNH, weight_H, *rope, EPS)


def test_nothing_in_nothing_out(triton_device: torch.device) -> None:
    weight = torch.zeros(8, device=triton_device)
    assert rms_norm(torch.empty(0, 8, device=triton_device), weight, EPS).shape == (0, 8)


def test_refusals(triton_device: torch.device) -> None:
    wide = torch.ones(1, 1 << 16, device=triton_device)
    normed, turned = (
        next(i for i in operator.implementations if i.name == "triton") for operator in (RMS_NORM, NORM_ROTATE)
    )
    assert normed.supports(wide, wide[0], EPS) == "takes rows of up to 32768 numbers, not 65536"
    x_TNH, cos_TW = torch.ones(1, 1, 8, device=triton_device), torch.ones(1, 2, device=triton_device)
    assert turned.supports(x_TNH, x_TNH[0, 0], cos_TW, cos_TW, EPS) is None
    narrow = cos_TW.bfloat16()
    assert turned.supports(x_TNH, x_TNH[0, 0], narrow, narrow, EPS) == "takes rotary tables in float32"
