"""Linear layers: what codes and scales mean, and every implementation against float64 sums."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import openm3
from openm3.errors import UnsupportedError
from openm3.ops import native
from openm3.ops.dispatch import Implementation
from openm3.ops.linear import LINEAR, LINEAR_EACH, QuantisedWeight, Weight, dequantise, linear, linear_each, quantise
from openm3.ops.linear import native as kernels
from openm3.ops.linear.quantised import at

KINDS = ("float32", "bfloat16", "int8 by 32", "int8 by row")
# Tokens, outputs and inputs: fewer and more than a tile, a panel, the columns of a panel and the tiles met at a time.
SHAPES = [(1, 1, 1), (1, 9, 64), (2, 5, 96), (3, 130, 33), (4, 8, 31), (5, 17, 515), (16, 33, 1056), (19, 40, 64)]
SHAPES += [(33, 1, 1), (48, 47, 2), (70, 150, 33), (97, 65, 1056), (530, 34, 48)]

each_implementation = pytest.mark.parametrize("implementation", LINEAR.implementations, ids=lambda i: i.name)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def made(shape: tuple[int, int, int], kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Weight]:
    """Tokens in a dtype, and a weight of a kind; groups of 32 where the inputs allow it."""
    tokens, outputs, inputs = shape
    generator = torch.Generator().manual_seed(inputs)
    x_TD = torch.randn((tokens, inputs), generator=generator).to(dtype)
    weight = torch.randn((outputs, inputs), generator=generator)
    if kind == "int8 by 32" and inputs % 32 == 0:
        return x_TD, quantise(weight, 32)
    return x_TD, quantise(weight, inputs) if kind.startswith("int8") else weight.to(getattr(torch, kind))


def check(out: Tensor, x: Tensor, weight: Weight) -> None:
    """At most twice the error of PyTorch's own product in the dtype, or one rounding of the sum of magnitudes."""
    assert (out.shape, out.dtype) == ((*x.shape[:-1], weight.shape[0]), x.dtype)
    wide = dequantise(weight)
    exact = x.double() @ wide.double().T
    torchs = (x.float() @ wide.float().T).to(x.dtype).double()
    magnitude = x.double().abs() @ wide.double().abs().T
    allowed = 2 * (torchs - exact).abs().max() + magnitude * torch.finfo(torch.float32).eps
    assert ((out.double() - exact).abs() <= allowed).all()


@each_implementation
@each_kind
@each_shape
def test_against_float64(
    implementation: Implementation, kind: str, shape: tuple[int, int, int], run: Callable[..., Any]
) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x_TD, weight = made(shape, kind, dtype)
    check(run(implementation, x_TD, weight), x_TD, weight)


@each_kind
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_levels(level: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_TD, weight = made(shape, kind, dtype)
    check(kernels.linear(x_TD, weight), x_TD, weight)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 16])
def test_several_weights_in_one_call_are_one_after_another(tokens: int, dtype: torch.dtype) -> None:
    x_TD = torch.randn(tokens, 2 * 96)[:, ::2].to(dtype)
    weights = [made((1, outputs, 96), kind, dtype)[1] for outputs, kind in zip((1, 300, 40, 8), KINDS, strict=True)]
    assert LINEAR_EACH.choose(x_TD, weights).name == "native"
    for out, weight in zip(linear_each(x_TD, weights), weights, strict=True):
        assert torch.equal(out, kernels.linear(x_TD, weight))


def test_several_weights_go_one_by_one_where_native_code_gains_nothing() -> None:
    x_TD, weights = torch.randn(17, 32), [torch.randn(8, 32), torch.randn(3, 32)]
    assert LINEAR_EACH.choose(x_TD, weights).name == "reference"
    assert all(torch.equal(out, linear(x_TD, w)) for out, w in zip(linear_each(x_TD, weights), weights, strict=True))
    with pytest.raises(ValueError, match=r"x \[17, 32\] and weight \[3, 31\]"):
        linear_each(x_TD, [weights[0], weights[1][:, 1:]])


@each_kind
@pytest.mark.parametrize(("most", "counts"), [(4, (1, 2, 3)), (8, (5, 7)), (16, (9, 11)), (90, (33, 48, 89))])
def test_a_token_does_not_depend_on_its_neighbours(level: str, kind: str, most: int, counts: tuple[int, ...]) -> None:
    x_TD, weight = made((most, 45, 608), kind)
    together = kernels.linear(x_TD, weight)
    for count in counts:
        for first in range(0, most - count, count):
            part = slice(first, first + count)
            assert kernels.linear(x_TD[part], weight).equal(together[part])


@each_kind
def test_threads_change_nothing(level: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1, 9, 70):
        x_TD, weight = made((tokens, 301, 1024), kind)
        outs = []
        for threads in (1, 2, 5):
            monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
            outs.append(kernels.linear(x_TD, weight))
        assert outs[1].equal(outs[0]) and outs[2].equal(outs[0])


@each_kind
@pytest.mark.parametrize("tokens", [6, 50])
def test_views_are_read_in_place(level: str, kind: str, tokens: int) -> None:
    x_TD, weight = made((tokens, 40, 128), kind)
    rows = at(weight, slice(3, 32))
    wide_TD = torch.full((2 * tokens, 256), torch.nan)
    wide_TD[::2, ::2] = x_TD
    assert kernels.linear(wide_TD[::2, ::2], rows).equal(kernels.linear(x_TD, weight)[:, 3:32])
    x_1TD = x_TD[None, :2]
    assert kernels.linear(x_1TD, rows).shape == (1, 2, 29)
    assert kernels.linear(x_TD[0], rows).equal(kernels.linear(x_TD[:1], rows)[0])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_nan_and_infinity_stay_where_they_are(level: str, kind: str, dtype: torch.dtype) -> None:
    x_TD, weight = made((40, 40, 64), kind, dtype)
    x_TD[1, 63], x_TD[2, 0], x_TD[39, 5] = torch.inf, torch.nan, -torch.inf
    out_TO = kernels.linear(x_TD, weight)
    told = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([1, 2, 39]), True)
    assert out_TO[~told].isfinite().all() and not out_TO[told].isfinite().any() and out_TO[2].isnan().all()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_native_float32_is_kept_to_its_last_bits(level: str, tokens: int) -> None:
    """One product a sum, at many magnitudes: what three parts of bfloat16 would lose shows."""
    x_TD = torch.rand(tokens, 1) * 2.0 ** torch.randint(-60, 60, (tokens, 1))
    weight = torch.rand(300, 1) * 2.0 ** torch.randint(-30, 30, (300, 1))
    torch.testing.assert_close(kernels.linear(x_TD, weight), x_TD @ weight.T, rtol=2**-22, atol=0)


@each_implementation
def test_nan_and_infinity_pass(implementation: Implementation, run: Callable[..., Any]) -> None:
    x_TD, weight = made((3, 2048, 40), "bfloat16", torch.bfloat16)
    assert isinstance(weight, Tensor)
    x_TD[1, 39], weight[7, 39] = torch.inf, torch.nan
    out_TO = run(implementation, x_TD, weight)
    assert out_TO[:, 7].isnan().all() and out_TO[1].isfinite().sum() == 0
    finite = torch.ones(2048, dtype=torch.bool).index_fill(0, torch.tensor([7]), False)
    assert out_TO[0, finite].isfinite().all() and out_TO[2, finite].isfinite().all()


def test_nothing_gives_nothing() -> None:
    assert linear(torch.zeros(0, 64), torch.zeros(3, 64)).shape == (0, 3)
    for weight in (torch.zeros(0, 64), quantise(torch.zeros(0, 64), 32)):
        assert linear(torch.zeros(2, 64), weight).shape == (2, 0)
    for tokens in (1, 20, 70):
        assert linear(torch.zeros(tokens, 64), quantise(torch.ones(3, 64), 32)).equal(torch.zeros(tokens, 3))


def test_float64_stays_float64() -> None:
    x_TD, weight = made((4, 50, 96), "int8 by 32")
    out_TO = linear(x_TD.double(), weight)
    assert out_TO.equal(x_TD.double() @ dequantise(weight).double().T)


def test_gradients_flow_through_float_weights() -> None:
    x_TD, weight = (torch.randint(-9, 10, shape).float().requires_grad_() for shape in ((2, 256), (300, 256)))
    linear(x_TD, weight).sum().backward()
    assert x_TD.grad is not None and x_TD.grad.equal(weight.sum(0).expand(2, -1))
    assert weight.grad is not None and weight.grad.equal(x_TD.sum(0).expand(300, -1))
    with torch.no_grad():
        assert linear(x_TD, weight).equal(x_TD @ weight.T)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"x \[2, 3\] and weight \[4, 5\] must be"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="must be"):
        linear(torch.zeros(2, 5), torch.zeros(1, 4, 5))


def test_reasons() -> None:
    if native.missing():
        pytest.skip(str(native.missing()))
    one, many, weight = torch.zeros(1, 1024), torch.zeros(99, 1024), torch.zeros(1024, 1024)
    has_tiles = native.loaded().has_tiles
    for x, other, told in (
        (one, weight, None),
        (one, weight[:8], None),
        (many[:5], weight[:8], "PyTorch is faster from 5 tokens on"),
        (one.bfloat16(), weight[:8].bfloat16(), None),
        (many, weight, None if has_tiles else "PyTorch is faster from 17 tokens on"),
        (many.bfloat16(), weight.bfloat16(), None if has_tiles else "PyTorch is faster from 5 tokens on"),
        (weight.bfloat16(), weight.bfloat16(), f"PyTorch is faster from {257 if has_tiles else 5} tokens on"),
        (many, quantise(weight, 32), None),
        (many, quantise(weight, 8), "multiples of 16 inputs a scale, not 128 scales for 1024"),
        (one, weight.clone().requires_grad_(), "has no gradients"),
        (one.double(), quantise(weight, 32), "takes float32 and bfloat16, not float64"),
    ):
        reason = kernels.supports(x, other)
        assert reason is None if told is None else told in str(reason)


def test_blocked_needs_one_dtype() -> None:
    with openm3.use("blocked"), pytest.raises(UnsupportedError, match="needs a weight of x's dtype, float32, not bfl"):
        linear(torch.zeros(1, 64), torch.zeros(8, 64, dtype=torch.bfloat16))


def test_native_checks_what_it_reads(level: str) -> None:
    module, x, out = native.loaded(), torch.zeros(2, 64), torch.zeros(2, 8)
    code, scale = quantise(torch.zeros(8, 64), 32)
    wrong: list[tuple[Any, ...]] = [
        (x[0], code, scale, out),
        (x, code[:7], scale, out),
        (x[:, :32], code, scale, out),
        (x, code, scale[:7], out),
        (x, code, scale[:, :0], out),
        (x, code, torch.zeros(8, 3), out),
        (x, code, torch.zeros(8, 8), out),
        (x, code, None, out),
        (x, code.float(), scale, out),
        (x, code.short(), None, out),
        (x, code, scale.double(), out),
        (x.double(), code, scale, out),
        (x, code, scale, out[:1]),
        (x, code, scale, out.bfloat16()),
        (x, code, scale, torch.zeros(8, 2).T),
    ]
    for args in wrong:
        with pytest.raises(ValueError):
            module.linear(*args, 1)
    with pytest.raises(ValueError, match="threads"):
        module.linear(x, code, scale, out, 0)
    with pytest.raises(ValueError, match="every weight needs"):
        module.linear_each(x, [code, code], [scale], [out, out], 1)


# ---- codes and scales


def test_dequantised_is_code_times_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(-127, 128, (3, 5, 64), generator=generator, dtype=torch.int8)
    for groups in (1, 2, 64):
        scale = torch.rand((3, 5, groups), generator=generator)
        wide = dequantise(QuantisedWeight(code, scale))
        expected = code.numpy().astype(np.float32) * np.repeat(scale.numpy(), 64 // groups, -1)
        np.testing.assert_array_equal(wide.numpy(), expected)
    weight = torch.randn(4, 4)
    assert dequantise(weight) is weight


def test_codes_are_the_nearest() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.4, 0.0, -127.0], [0.0] * 6])
    code, scale = quantise(weight, 6)
    assert scale.tolist() == [[1.0], [0.0]]
    assert code.tolist() == [[127, 0, 2, -2, 0, -127], [0] * 6]
    code, scale = quantise(weight, 3)
    assert scale.shape == (2, 2) and code[0, 5] == -127


@given(st.integers(-140, 120), st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 32]))
def test_codes_lose_at_most_half_a_scale(exponent: int, seed: int, group: int) -> None:
    weight = torch.randn((3, 32), generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    quantised = quantise(weight, group)
    assert int(quantised.code.abs().max()) <= 127
    lost = (dequantise(quantised).double() - weight.double()).abs().unflatten(-1, (-1, group))
    scale = weight.double().abs().unflatten(-1, (-1, group)).amax(-1, keepdim=True) / 127
    # Below float32's normal numbers the scale itself is coarse.
    assert (lost <= 0.5 * scale * (1 + 1e-5) + 127 * 2.0**-149).all()


def test_quantising_codes_again_changes_nothing() -> None:
    once = quantise(torch.randn(9, 64), 32)
    again = quantise(dequantise(once), 32)
    assert again.code.equal(once.code)
    torch.testing.assert_close(again.scale, once.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_cannot_be_quantised(value: float) -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="NaN and infinities cannot be quantised"):
        quantise(weight, 4)


@pytest.mark.parametrize("group", [0, -4, 3, 16])
def test_groups_divide_the_inputs(group: int) -> None:
    with pytest.raises(ValueError, match=f"8 inputs cannot be cut into groups of {group}"):
        quantise(torch.zeros(2, 8), group)


def test_parts_of_a_quantised_weight() -> None:
    weight = quantise(torch.randn(4, 6, 64), 32)
    assert weight.shape == (4, 6, 64)
    wide = dequantise(weight)
    for where in itertools.chain((2, slice(1, 3)), [(3, slice(2, 5))]):
        assert dequantise(at(weight, where)).equal(at(wide, where))
