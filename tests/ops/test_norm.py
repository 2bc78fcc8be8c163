"""Norms and rotation: their formulas, what rotation keeps, and precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import openm3
from openm3.ops import native
from openm3.ops.dispatch import Implementation
from openm3.ops.norm import NORM_ROTATE, RMS_NORM, norm_rotate, rms_norm, rotary_table

EPS = 1e-6


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has native code run at one instruction-set level; skips those that this machine lacks."""
    if native.missing() or request.param not in native.levels():
        pytest.skip(native.missing() or f"{request.param} is not compiled, or not what this processor runs")
    monkeypatch.setattr(native, "loaded", lambda: native.module(request.param))
    return str(request.param)


@pytest.mark.parametrize("implementation", RMS_NORM.implementations, ids=lambda i: i.name)
def test_rms_norm_is_its_formula(implementation: Implementation, run: Callable[..., Any]) -> None:
    x, weight = torch.randn(5, 3, 7), torch.randn(7)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight.double())
    torch.testing.assert_close(run(implementation, x, weight, EPS).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", NORM_ROTATE.implementations, ids=lambda i: i.name)
def test_norm_rotate_is_its_formula(implementation: Implementation, run: Callable[..., Any]) -> None:
    """Channel i turns with channel W + i by position / theta**(2i / rotary_dim); the rest is only normed."""
    x_TNH, weight_H, rotary_dim, theta = torch.randn(4, 2, 11), torch.randn(11), 6, 100.0
    position_T = torch.tensor([0, 1, 17, 900])
    out_TNH = run(implementation, x_TNH, weight_H, *rotary_table(position_T, rotary_dim, theta), EPS)
    normed_TNH = rms_norm(x_TNH.double(), weight_H.double(), EPS)
    wanted_TNH = normed_TNH.clone()
    for t, position in enumerate(position_T.tolist()):
        for i in range(rotary_dim // 2):
            angle = position / theta ** (2 * i / rotary_dim)
            pair = torch.complex(normed_TNH[t, :, i], normed_TNH[t, :, i + 3])
            turned = pair * complex(math.cos(angle), math.sin(angle))
            wanted_TNH[t, :, i], wanted_TNH[t, :, i + 3] = turned.real, turned.imag
    torch.testing.assert_close(out_TNH.double(), wanted_TNH, rtol=0, atol=2e-4)
    torch.testing.assert_close(out_TNH[..., 6:].double(), wanted_TNH[..., 6:], rtol=0, atol=1e-6)


def test_rows_do_not_influence_each_other() -> None:
    x, weight = torch.randn(9, 16), torch.randn(16)
    together = rms_norm(x, weight, EPS)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, EPS), together[i : i + 1]) for i in range(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    """The result is the float32 one, rounded: no step in between is narrow."""
    x_TNH, weight_H = torch.randn(20, 4, 32).to(dtype), torch.randn(32).to(dtype)
    rope = rotary_table(torch.arange(20) * 1000, 16, 5e6)
    narrow = norm_rotate(x_TNH, weight_H, *rope, EPS)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, norm_rotate(x_TNH.float(), weight_H.float(), *rope, EPS).to(dtype))
    assert torch.equal(rms_norm(x_TNH, weight_H, EPS), rms_norm(x_TNH.float(), weight_H.float(), EPS).to(dtype))


def test_float64_stays_float64() -> None:
    x_TNH, weight_H = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    out_TNH = norm_rotate(x_TNH, weight_H, *rotary_table(torch.zeros(3, dtype=torch.long), 4, 1e4), EPS)
    wanted_TNH = x_TNH * (x_TNH.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1 + weight_H)
    torch.testing.assert_close(out_TNH, wanted_TNH, rtol=1e-14, atol=1e-14)


def test_zeros_and_tiny_inputs_stay_finite() -> None:
    weight = torch.zeros(8)
    assert not rms_norm(torch.zeros(2, 8), weight, EPS).any()
    assert rms_norm(torch.full((1, 8), 1e-30), weight, EPS).isfinite().all()
    assert rms_norm(torch.empty(0, 8), weight, EPS).shape == (0, 8)
    assert norm_rotate(torch.empty(0, 2, 8), weight, *rotary_table(torch.empty(0), 4, 1e4), EPS).shape == (0, 2, 8)


@given(positions=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rotation_keeps_norms_and_passes_the_rest(positions: list[int], seed: int) -> None:
    x_TNH = torch.randn((len(positions), 2, 24), generator=torch.Generator().manual_seed(seed))
    weight_H = torch.zeros(24)
    out_TNH = norm_rotate(x_TNH, weight_H, *rotary_table(torch.tensor(positions), 16, 5e6), EPS)
    plain_TNH = rms_norm(x_TNH, weight_H, EPS)
    torch.testing.assert_close(out_TNH.norm(dim=-1), plain_TNH.norm(dim=-1), rtol=1e-5, atol=1e-5)
    pairs = (out_TNH[..., :8].square() + out_TNH[..., 8:16].square()).sqrt()
    torch.testing.assert_close(pairs, (plain_TNH[..., :8].square() + plain_TNH[..., 8:16].square()).sqrt())
    assert torch.equal(out_TNH[..., 16:], plain_TNH[..., 16:])


@given(near=st.integers(0, 4000), distance=st.integers(0, 4000), shift=st.integers(0, 4000))
def test_scores_depend_on_the_distance_alone(near: int, distance: int, shift: int) -> None:
    q, k = torch.randn((2, 1, 1, 16), generator=torch.Generator().manual_seed(near))
    weight_H = torch.zeros(16)

    def score(first: int, second: int) -> float:
        cos_TW, sin_TW = rotary_table(torch.tensor([first, second]), 16, 1e4)
        turned_q = norm_rotate(q, weight_H, cos_TW[:1], sin_TW[:1], EPS)
        turned_k = norm_rotate(k, weight_H, cos_TW[1:], sin_TW[1:], EPS)
        return float((turned_q * turned_k).sum())

    assert score(near + distance, near) == pytest.approx(score(near + distance + shift, near + shift), abs=1e-2)


def test_position_zero_turns_nothing_and_full_width_is_allowed() -> None:
    cos_TW, sin_TW = rotary_table(torch.tensor([0]), 8, 1e4)
    assert cos_TW.dtype == torch.float32 and cos_TW.tolist() == [[1.0] * 4] and sin_TW.tolist() == [[0.0] * 4]
    x_TNH, weight_H = torch.randn(1, 3, 8), torch.randn(8)
    assert torch.equal(norm_rotate(x_TNH, weight_H, cos_TW, sin_TW, EPS), rms_norm(x_TNH, weight_H, EPS))


def test_the_first_angle_is_the_position_even_far_out() -> None:
    position_T = torch.tensor([1, 1000, (1 << 20) - 1])
    cos_TW, sin_TW = rotary_table(position_T, 64, 5e6)
    wanted = [math.cos(p) for p in position_T.tolist()]
    assert cos_TW[:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.allclose(cos_TW.square() + sin_TW.square(), torch.ones(3, 32))


def test_too_many_rotary_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="16 rotary channels do not fit a head of 8"):
        norm_rotate(torch.randn(1, 1, 8), torch.zeros(8), *rotary_table(torch.tensor([0]), 16, 1e4), EPS)


def test_gradients_are_derivatives() -> None:
    rope = rotary_table(torch.tensor([0, 5]), 4, 10.0)
    x_TNH = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)
    weight_H = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: norm_rotate(x, weight, *rope, EPS), (x_TNH, weight_H))


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).abs().max())


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 31, 64, 192, 517])
def test_native_norms_are_as_close_as_the_reference(width: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(200, width) * 3).to(dtype), torch.randn(width).to(dtype)
    truth = rms_norm(x.double(), weight.double(), EPS)
    with openm3.use("reference"):
        allowed = 2 * error(rms_norm(x, weight, EPS), truth)
    with openm3.use("native"):
        out = rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert error(out, truth) <= max(allowed, 1e-7)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "rotary_dim"), [(5, 2), (11, 6), (64, 32), (64, 64), (96, 0), (128, 64), (77, 70)])
def test_native_rotations_are_as_close_as_the_reference(width: int, rotary_dim: int, dtype: torch.dtype) -> None:
    x_TNH, weight_H = torch.randn(60, 3, width).to(dtype), torch.randn(width).to(dtype)
    rope = rotary_table(torch.arange(60) * 1000, rotary_dim, 5e6)
    truth = norm_rotate(x_TNH.double(), weight_H.double(), *rope, EPS)
    with openm3.use("reference"):
        allowed = 2 * error(norm_rotate(x_TNH, weight_H, *rope, EPS), truth)
    with openm3.use("native"):
        out_TNH = norm_rotate(x_TNH, weight_H, *rope, EPS)
    assert out_TNH.dtype == dtype
    assert error(out_TNH, truth) <= max(allowed, 1e-7)


@pytest.mark.usefixtures("level")
def test_native_norms_take_strides_and_mixed_dtypes() -> None:
    wide_TNH, weight_H = torch.randn(6, 4, 48).bfloat16(), torch.randn(20)
    rope = rotary_table(torch.arange(6), 8, 1e4)
    for x_TNH in (wide_TNH[..., 5:25], wide_TNH[:, 1::2, :20], wide_TNH[::2, :, :40:2].repeat(2, 1, 1)):
        dense_TNH = x_TNH.contiguous()
        with openm3.use("native"):
            assert torch.equal(rms_norm(x_TNH, weight_H, EPS), rms_norm(dense_TNH, weight_H, EPS))
            turned_TNH = norm_rotate(x_TNH, weight_H, *rope, EPS)
            assert torch.equal(turned_TNH, norm_rotate(dense_TNH, weight_H, *rope, EPS))
        assert turned_TNH.is_contiguous() and turned_TNH.shape == x_TNH.shape


def test_native_norms_are_the_same_for_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TNH, weight_H, rope = torch.randn(300, 4, 64), torch.randn(64), rotary_table(torch.arange(300), 32, 1e4)
    alone = [rms_norm(x_TNH, weight_H, EPS), norm_rotate(x_TNH, weight_H, *rope, EPS)]
    monkeypatch.setattr(native, "threads", lambda: 3)
    together = [rms_norm(x_TNH, weight_H, EPS), norm_rotate(x_TNH, weight_H, *rope, EPS)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_native_norms_refuse_what_they_cannot_do() -> None:
    x_TNH, weight_H, rope = torch.randn(2, 1, 8), torch.zeros(8), rotary_table(torch.arange(2), 4, 1e4)
    norm, rotate = RMS_NORM.implementations[0], NORM_ROTATE.implementations[0]
    assert norm.supports(x_TNH.half(), weight_H, EPS) == "takes float32 and bfloat16, not float16"
    assert norm.supports(x_TNH.requires_grad_(), weight_H, EPS) == "has no gradients"
    assert rotate.supports(x_TNH.detach(), weight_H, *(x.bfloat16() for x in rope), EPS) == (
        "takes rotary tables in float32"
    )
    with openm3.use("native"), pytest.raises(ValueError, match="5 weights do not fit rows of 8"):
        rms_norm(x_TNH.detach(), torch.zeros(5), EPS)
