"""Experts: routing's total order, and every implementation against a loop over tokens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops import native
from openm3.ops.cases import EXPERTS as CASES
from openm3.ops.cases import ExpertCase, Routed, routed
from openm3.ops.dispatch import Implementation
from openm3.ops.experts import EXPERTS, MIXTURE, ROUTE, SWIGLU, experts, mixture, reference, route, swiglu
from openm3.ops.experts import native as kernels
from openm3.ops.linear import dequantise, linear, quantise

ALPHA, LIMIT = 1.702, 7.0

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_implementation = pytest.mark.parametrize("implementation", EXPERTS.implementations, ids=lambda i: i.name)
each_route = pytest.mark.parametrize("implementation", ROUTE.implementations, ids=lambda i: i.name)


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has native code run at one instruction-set level; skips those that this machine lacks."""
    if native.missing() or request.param not in native.levels():
        pytest.skip(native.missing() or f"{request.param} is not compiled, or not what this processor runs")
    monkeypatch.setattr(native, "loaded", lambda: native.module(request.param))
    return str(request.param)


def defined_swiglu(gate: float, up: float) -> float:
    gate, up = min(gate, LIMIT), max(-LIMIT, min(up, LIMIT))
    return (up + 1) * gate / (1 + math.exp(-ALPHA * gate))


def defined(e: Routed) -> Tensor:
    """One token and one expert at a time, float64."""
    x_TD, expert_TA, weight_TA, gate_up_E2FD, down_EDF = (x if x.dtype == torch.int32 else x.double() for x in e)
    out_TD = torch.zeros_like(x_TD)
    for t, row in enumerate(expert_TA.tolist()):
        for expert, weight in zip(row, weight_TA[t], strict=True):
            gate_F, up_F = (gate_up_E2FD[expert] @ x_TD[t]).chunk(2)
            pairs = zip(gate_F.tolist(), up_F.tolist(), strict=True)
            hidden_F = torch.tensor([defined_swiglu(gate, up) for gate, up in pairs], dtype=torch.float64)
            out_TD[t] += weight * (down_EDF[expert] @ hidden_F)
    return out_TD


@each_implementation
@each_case
def test_experts_are_the_loop(case: ExpertCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    e = routed(case)
    wanted_TD = defined(e)
    out_TD = run(implementation, *e, ALPHA, LIMIT)
    assert out_TD.shape == e.x_TD.shape and out_TD.dtype == torch.float32
    size = float(wanted_TD.abs().max()) if wanted_TD.numel() else 1.0
    torch.testing.assert_close(out_TD.double(), wanted_TD, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_experts_are_computed_wide(dtype: torch.dtype) -> None:
    """Only the result is rounded to the dtype of x."""
    e = routed(CASES[-1], dtype=dtype)
    out_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    assert out_TD.dtype == dtype
    wanted_TD = defined(e)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out_TD.double(), wanted_TD, rtol=eps, atol=1e-6 * float(wanted_TD.abs().max()))


@each_implementation
def test_gradients_of_experts(implementation: Implementation, run: Callable[..., Any]) -> None:
    e = routed(ExpertCase(name="", num_tokens=11, num_experts=4))

    def gradients(function: Callable[..., Any], e: Routed) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (e.x_TD, e.weight_TA, e.gate_up_E2FD, e.down_EDF)]
        out = function(leaves[0], e.expert_TA, *leaves[1:], ALPHA, LIMIT)
        return list(torch.autograd.grad(out.square().sum(), leaves))

    wide = Routed(*(x if x.dtype == torch.int32 else x.double() for x in e))
    got = gradients(lambda *args: run(implementation, *args), e)
    for x, truth in zip(got, gradients(reference.experts, wide), strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


def test_gradients_of_the_reference_are_derivatives() -> None:
    e = routed(ExpertCase(name="", num_tokens=3, num_experts=3, width=2, inner=2), dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (e.x_TD, e.weight_TA, e.gate_up_E2FD, e.down_EDF)]

    def function(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return experts(x, e.expert_TA, weight, gate_up, down, alpha=ALPHA, limit=LIMIT)

    assert torch.autograd.gradcheck(function, leaves)


def test_experts_without_tokens_get_no_gradient_and_tokens_do_not_mix() -> None:
    e = routed(next(case for case in CASES if case.crowded))
    gate_up = e.gate_up_E2FD.clone().requires_grad_()
    experts(*e[:3], gate_up, e.down_EDF, alpha=ALPHA, limit=LIMIT).sum().backward()
    assert gate_up.grad is not None and gate_up.grad[:2].any() and not gate_up.grad[2:].any()
    poisoned = e.x_TD.clone()
    poisoned[3] = torch.nan
    out_TD = experts(poisoned, *e[1:], alpha=ALPHA, limit=LIMIT)
    assert out_TD[3].isnan().all() and int(out_TD.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("implementation", SWIGLU.implementations, ids=lambda i: i.name)
def test_swiglu_is_its_formula_and_clamps(implementation: Implementation, run: Callable[..., Any]) -> None:
    values = [-100.0, -7.0, -1.0, 0.0, 0.5, 7.0, 7.5, 100.0]
    gate_up = torch.tensor([[g, u] for g in values for u in values])
    wanted = torch.tensor([[defined_swiglu(g, u)] for g in values for u in values])
    torch.testing.assert_close(run(implementation, gate_up, ALPHA, LIMIT), wanted, rtol=1e-6, atol=1e-6)


def test_swiglu_of_bfloat16_is_rounded_once() -> None:
    gate_up = (torch.randn(50, 8) * 5).bfloat16()
    wanted = swiglu(gate_up.float(), alpha=ALPHA, limit=LIMIT).bfloat16()
    assert torch.equal(swiglu(gate_up, alpha=ALPHA, limit=LIMIT), wanted)


@each_route
def test_route_takes_the_largest_and_weighs_without_the_bias(
    implementation: Implementation, run: Callable[..., Any]
) -> None:
    x_TD, router_ED, bias_E = torch.randn(20, 6), torch.randn(9, 6), torch.randn(9) * 0.2
    expert_TA, weight_TA = run(implementation, x_TD, router_ED, bias_E, 3)
    assert expert_TA.dtype == torch.int32 and weight_TA.dtype == torch.float32
    for t in range(20):
        score_E = torch.sigmoid(router_ED @ x_TD[t])
        best = sorted(range(9), key=lambda e: -float((score_E + bias_E)[e]))[:3]
        assert expert_TA[t].tolist() == best
        torch.testing.assert_close(weight_TA[t], score_E[best] / score_E[best].sum())
    assert not torch.equal(expert_TA, run(implementation, x_TD, router_ED, torch.zeros(9), 3)[0])


@each_route
def test_route_ties_take_the_smaller_expert(implementation: Implementation, run: Callable[..., Any]) -> None:
    x_TD = torch.ones(2, 4)
    expert_TA, weight_TA = run(implementation, x_TD, torch.ones(8, 4), torch.zeros(8), 3)
    assert expert_TA.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weight_TA, torch.full((2, 3), 1 / 3))
    bias_E = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])
    assert run(implementation, x_TD, torch.ones(8, 4), bias_E, 3)[0].tolist() == [[1, 3, 5]] * 2
    assert run(implementation, x_TD, torch.ones(8, 4), torch.zeros(8), 8)[0].tolist() == [list(range(8))] * 2


def test_route_maths_are_in_the_routers_dtype() -> None:
    """Logits that bfloat16 cannot tell apart still choose the larger."""
    router_ED = torch.tensor([[1.0, 0.0], [1.0, 2**-12]])
    x_TD = torch.ones(1, 2, dtype=torch.bfloat16)
    expert_TA, weight_TA = route(x_TD, router_ED, torch.zeros(2), 1)
    assert expert_TA.tolist() == [[1]] and weight_TA.dtype == torch.float32


def test_route_gives_no_gradient_to_the_bias() -> None:
    bias_E, router_ED = torch.zeros(4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    _, weight_TA = route(torch.randn(5, 3), router_ED, bias_E, 2)
    weight_TA[:, 0].sum().backward()
    assert bias_E.grad is None and router_ED.grad is not None and router_ED.grad.any()


def test_route_of_no_tokens() -> None:
    expert_TA, weight_TA = route(torch.empty(0, 3), torch.randn(4, 3), torch.zeros(4), 2)
    assert expert_TA.shape == weight_TA.shape == (0, 2)


@pytest.mark.parametrize("num_active", [0, 5])
def test_impossible_counts_are_refused(num_active: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the 4 experts, not {num_active}"):
        route(torch.randn(1, 3), torch.randn(4, 3), torch.zeros(4), num_active)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(5, 9)}, r"x \[T, D\]"),
        ({"gate_up_E2FD": torch.zeros(1, 12, 16)}, r"gate_up \[E, 2F, D\]"),
        ({"expert_TA": torch.zeros(5, 2, dtype=torch.int32)}, r"experts and weights \[5, A\]"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Tensor], message: str) -> None:
    e = routed(next(case for case in CASES if case.name == "one_expert"))._replace(**change)
    with pytest.raises(ValueError, match=message):
        experts(*e, alpha=ALPHA, limit=LIMIT)


def error(out: Tensor, truth: Tensor) -> float:
    """Root mean square."""
    return float((out.double() - truth).square().mean().sqrt()) if out.numel() else 0.0


def crowd(num_tokens: int, *, width: int, inner: int, dtype: torch.dtype = torch.float32) -> Routed:
    """Tokens of which all choose expert 0, every third expert 1 too, and the others one of the six after it."""
    e = routed(ExpertCase(name="", num_tokens=num_tokens, width=width, inner=inner), dtype=dtype)
    second_T = torch.arange(num_tokens) % 18 // 3 + 2
    second_T[::3] = 1
    return e._replace(expert_TA=torch.stack((torch.zeros_like(second_T), second_T), -1).to(torch.int32))


def hold_native_to_the_reference(e: Routed) -> None:
    """The native error against float64 is at most twice the reference's in the same dtype."""
    truth_TD = reference.experts(*(x if x.dtype == torch.int32 else x.double() for x in e), ALPHA, LIMIT)
    with openm3.use("native"):
        out_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    assert out_TD.dtype == e.x_TD.dtype and out_TD.shape == e.x_TD.shape
    assert error(out_TD, truth_TD) <= 2 * error(reference.experts(*e, ALPHA, LIMIT), truth_TD)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_native_experts_are_as_close_as_the_reference(case: ExpertCase, dtype: torch.dtype) -> None:
    hold_native_to_the_reference(routed(case, dtype=dtype))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 16, 17, 47, 49, 100, 450])
def test_native_experts_take_any_number_of_tokens(num_tokens: int) -> None:
    """Dot products of one to four tokens, tiles of one to three vectors, several tiles, several chunks of tiles."""
    hold_native_to_the_reference(crowd(num_tokens, width=37, inner=21))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "width", "inner"), [(3, 1000, 70), (60, 1000, 35), (60, 64, 809)])
def test_native_experts_take_any_width(num_tokens: int, width: int, inner: int, weights: torch.dtype) -> None:
    """Depths and panels that are cut into several pieces, the weights in another dtype than the tokens."""
    e = crowd(num_tokens, width=width, inner=inner)
    scaled = ((x / x.shape[-1] ** 0.5).to(weights) for x in (e.gate_up_E2FD, e.down_EDF))
    hold_native_to_the_reference(Routed(*e[:3], *scaled))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("num_tokens", [0, 3, 40, 450])
def test_native_experts_take_codes(num_tokens: int, group: int | None, dtype: torch.dtype) -> None:
    e = crowd(num_tokens, width=160, inner=96, dtype=dtype)
    codes = [quantise(x.float() / x.shape[-1] ** 0.5, group or x.shape[-1]) for x in (e.gate_up_E2FD, e.down_EDF)]
    with openm3.use("native"):
        out_TD = experts(*e[:3], *codes, alpha=ALPHA, limit=LIMIT)
    wide = [dequantise(code) for code in codes]
    truth_TD = reference.experts(
        e.x_TD.double(), e.expert_TA, e.weight_TA.double(), *(x.double() for x in wide), ALPHA, LIMIT
    )
    assert error(out_TD, truth_TD) <= 2 * error(reference.experts(*e[:3], *wide, ALPHA, LIMIT), truth_TD)


@pytest.mark.usefixtures("level")
def test_native_experts_take_more_tokens_than_they_hold_at_once() -> None:
    hold_native_to_the_reference(crowd(4200, width=8, inner=4))


@pytest.mark.usefixtures("level")
def test_native_experts_take_strides_and_an_expert_twice() -> None:
    e = crowd(30, width=24, inner=12)
    wide = Routed(
        e.x_TD.repeat(1, 2)[:, :24],
        e.expert_TA.clone().fill_(3),
        torch.rand(2, 30).T,
        e.gate_up_E2FD.repeat(1, 1, 2)[..., 7:31],
        e.down_EDF.repeat(1, 2, 1)[:, 10:34],
    )
    hold_native_to_the_reference(wide)


@pytest.mark.usefixtures("level")
def test_native_experts_are_the_same_for_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_tokens in (1, 90):
        e = crowd(num_tokens, width=200, inner=300)
        monkeypatch.setattr(native, "threads", lambda: 1)
        alone_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
        monkeypatch.setattr(native, "threads", lambda: 5)
        assert torch.equal(experts(*e, alpha=ALPHA, limit=LIMIT), alone_TD)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_native_tokens_do_not_mix(num_tokens: int) -> None:
    e = crowd(num_tokens, width=16, inner=12)
    clean_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    e.x_TD[1] = torch.nan
    out_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    others = torch.arange(num_tokens) != 1
    assert out_TD[1].isnan().all() and torch.equal(out_TD[others], clean_TD[others])


@pytest.mark.parametrize("expert", [-1, 8])
def test_native_experts_refuse_experts_that_do_not_exist(expert: int) -> None:
    e = crowd(3, width=16, inner=12)
    e.expert_TA[1, 1] = expert
    if native.missing() is None:
        with pytest.raises(ValueError, match=f"expert {expert} is not one of the 8"):
            experts(*e, alpha=ALPHA, limit=LIMIT)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("num_tokens", [1, 3, 5, 40, 130])
@pytest.mark.parametrize(("num_experts", "num_active"), [(1, 1), (8, 2), (70, 5)])
def test_native_routes_are_the_reference(num_experts: int, num_active: int, num_tokens: int) -> None:
    """Whole numbers, so that sums are exact and ties many; NaN and infinities among them."""
    x_TD = torch.randint(-1, 2, (num_tokens, 33)).float()
    x_TD[num_tokens // 2, 0], x_TD[num_tokens // 3, 1] = torch.nan, torch.inf
    router_ED = torch.randint(-1, 2, (num_experts, 33)) * (torch.arange(33) < 8)
    router_ED, bias_E = router_ED.float(), torch.randint(0, 2, (num_experts,)).float()
    for tokens in (x_TD, x_TD.bfloat16(), x_TD.repeat(1, 2)[:, :33]):
        expert_TA, weight_TA = reference.route(tokens, router_ED, bias_E, num_active)
        with openm3.use("native"):
            native_TA, native_weight_TA = route(tokens, router_ED, bias_E, num_active)
        assert native_TA.dtype == torch.int32 and torch.equal(native_TA, expert_TA)
        torch.testing.assert_close(native_weight_TA, weight_TA, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_swiglu_is_as_close_as_the_reference(dtype: torch.dtype) -> None:
    for shape in ((0, 8), (1, 2), (3, 5, 38), (70, 600)):
        gate_up = (torch.randn(shape) * 6).to(dtype)
        truth = reference.swiglu(gate_up.double(), ALPHA, LIMIT)
        with openm3.use("native"):
            out = swiglu(gate_up, alpha=ALPHA, limit=LIMIT)
            assert torch.equal(swiglu(gate_up.repeat_interleave(2, 0)[::2], alpha=ALPHA, limit=LIMIT), out)
        assert out.dtype == dtype and out.shape == truth.shape
        assert error(out, truth) <= max(2 * error(reference.swiglu(gate_up, ALPHA, LIMIT), truth), 1e-7)


@pytest.mark.usefixtures("level")
def test_native_swiglu_takes_any_number() -> None:
    gate_up = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan], [torch.inf, -torch.inf], [-80.0, 3.0], [-1e30, 7.0]])
    with openm3.use("native"):
        out = swiglu(gate_up, alpha=ALPHA, limit=LIMIT)
    torch.testing.assert_close(out, reference.swiglu(gate_up, ALPHA, LIMIT), equal_nan=True)


def mixed(tokens: int, dtype: torch.dtype, group: int | None) -> tuple[tuple[Any, ...], dict[str, float]]:
    """Arguments of a mixture of 5 experts and a shared one, wider than they are; int8 weights with a group."""
    width, inner, generator = 64, 32, torch.Generator().manual_seed(tokens)
    shapes = ((5, 2 * inner, width), (5, width, inner), (2 * 48, width), (width, 48))
    floats = [torch.randn(shape, generator=generator) for shape in shapes]
    weights = [x.to(dtype) if group is None else quantise(x, group) for x in floats]
    x_TD = torch.randn((tokens, width), generator=generator).to(dtype)
    router = torch.randn((5, width), generator=generator), torch.randn(5, generator=generator)
    return (x_TD, router, 2, tuple(weights[:2]), tuple(weights[2:])), {"scale": 2.5, "alpha": ALPHA, "limit": LIMIT}


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 4, 70])
def test_a_native_mixture_is_its_parts(tokens: int, dtype: torch.dtype, group: int | None) -> None:
    args, numbers = mixed(tokens, dtype, group)
    x_TD, router, num_active, routed, shared = args
    native_layers = tokens <= 4 or group or (dtype == torch.bfloat16 and native.loaded().has_tiles)
    assert MIXTURE.choose(*args, *numbers.values()).name == ("native" if native_layers else "reference")
    out_TD = mixture(*args, **numbers)
    routed_TD = experts(x_TD, *route(x_TD, *router, num_active), *routed, alpha=ALPHA, limit=LIMIT)
    shared_TD = linear(swiglu(linear(x_TD, shared[0]), alpha=ALPHA, limit=LIMIT), shared[1])
    wanted_TD = shared_TD.float() + 2.5 * routed_TD.float()
    size = float(wanted_TD.abs().max()) if tokens else 1.0
    torch.testing.assert_close(out_TD, wanted_TD.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6 * size)
    with openm3.use("reference"):
        defined_TD = mixture(*args, **numbers)
    torch.testing.assert_close(out_TD, defined_TD, rtol=0, atol=(1e-6 if dtype == torch.float32 else 2e-2) * size)


def test_a_mixture_has_gradients() -> None:
    args, numbers = mixed(2, torch.float32, None)
    x_TD = args[0].clone().requires_grad_()
    mixture(x_TD, *args[1:], **numbers).sum().backward()
    assert x_TD.grad is not None and x_TD.grad.abs().sum() > 0


@pytest.mark.usefixtures("level")
def test_a_native_mixture_checks_what_it_reads() -> None:
    (x_TD, router, num_active, routed, shared), numbers = mixed(2, torch.float32, None)
    narrow = shared[1][:60].contiguous()
    for wrong in (
        (x_TD, router, 0, routed, shared),
        (x_TD, router, 6, routed, shared),
        (x_TD, (router[0][:, :60], router[1]), num_active, routed, shared),
        (x_TD, router, num_active, (routed[0][:, :60], routed[1]), shared),
        (x_TD, router, num_active, routed, (shared[0][:90], shared[1])),
        (x_TD, router, num_active, routed, (shared[0], narrow)),
    ):
        with pytest.raises(ValueError):
            kernels.mixture(*wrong, *numbers.values())
