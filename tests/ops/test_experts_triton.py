"""The mixture of experts in Triton: as near to float64 as the reference, on a GPU or in Triton's interpreter."""

from itertools import product

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops import triton
from openm3.ops.cases import EXPERTS as CASES
from openm3.ops.cases import ExpertCase, Routed, routed
from openm3.ops.experts import EXPERTS, MIXTURE, ROUTE, experts, mixture, reference, route, swiglu
from openm3.ops.linear import dequantise, quantise

ALPHA, LIMIT = 1.702, 7.0


def error(out: Tensor, truth: Tensor) -> float:
    """Root mean square."""
    return float((out.double() - truth).square().mean().sqrt()) if out.numel() else 0.0


def on(device: torch.device, e: Routed) -> Routed:
    return Routed(*(x.to(device) for x in e))


def hold_to_the_reference(e: Routed) -> Tensor:
    """What comes out, whose error against float64 is at most twice the reference's in the same dtype."""
    truth_TD = reference.experts(*(x if x.dtype == torch.int32 else x.double() for x in e), ALPHA, LIMIT)
    out_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    assert out_TD.dtype == e.x_TD.dtype and out_TD.shape == e.x_TD.shape and out_TD.is_contiguous()
    theirs = error(reference.experts(*e, ALPHA, LIMIT), truth_TD)
    size = float(truth_TD.abs().max()) if truth_TD.numel() else 1.0
    assert error(out_TD, truth_TD) <= 2 * theirs + 1e-7 * size
    return out_TD


HALF = [(case, torch.float16) for case in CASES[:1]]


@pytest.mark.parametrize(
    ("case", "dtype"), [*product(CASES, (torch.float32, torch.bfloat16)), *HALF], ids=lambda x: getattr(x, "name", x)
)
def test_experts_are_as_close_as_the_reference(
    case: ExpertCase, dtype: torch.dtype, triton_device: torch.device
) -> None:
    hold_to_the_reference(on(triton_device, routed(case, dtype=dtype)))


@pytest.mark.parametrize(
    ("given", "stored"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_tokens_and_weights_may_differ_in_dtype(
    given: torch.dtype, stored: torch.dtype, triton_device: torch.device
) -> None:
    e = on(triton_device, routed(CASES[-1], dtype=stored))
    hold_to_the_reference(e._replace(x_TD=e.x_TD.to(given)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("groups", "num_tokens"), [((32, 96), 5), ((72, 43), 40)], ids=str)
def test_experts_take_codes(
    groups: tuple[int, int], num_tokens: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """Several scales a row, also not of as many inputs as a power of two; one scale a row, of any width."""
    width, inner = (64, 192) if groups[0] == 32 else groups
    e = on(triton_device, routed(ExpertCase(name="", num_tokens=num_tokens, width=width, inner=inner), dtype=dtype))
    codes = [quantise(x.float() / 8, group) for x, group in zip(e[3:], groups, strict=True)]
    wide = [dequantise(code).double() for code in codes]
    truth_TD = reference.experts(e.x_TD.double(), e.expert_TA, e.weight_TA.double(), *wide, ALPHA, LIMIT)
    out_TD = experts(*e[:3], *codes, alpha=ALPHA, limit=LIMIT)
    theirs = error(reference.experts(*e[:3], *codes, ALPHA, LIMIT), truth_TD)
    assert error(out_TD, truth_TD) <= 2 * theirs + 1e-7 * float(truth_TD.abs().max())


def test_large_tiles_wide_layers_and_workspaces_in_pieces(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 128 rows, one expert crowded; layers of several tiles; 100 tokens and 256 columns at a time."""
    from openm3.ops.experts import triton as kernels

    e = routed(ExpertCase(name="", num_tokens=130, num_experts=3, width=330, inner=140), dtype=torch.bfloat16)
    e = on(triton_device, e._replace(expert_TA=e.expert_TA.clone().clamp(max=1)))
    whole_TD = hold_to_the_reference(e)
    monkeypatch.setattr(kernels, "WORKSPACE", 100 * 2 * 140 * 2)
    part_TD = hold_to_the_reference(e)
    torch.testing.assert_close(part_TD, whole_TD, rtol=2**-7, atol=0.02 * float(whole_TD.abs().max()))


def test_tiles_follow_the_average_expert() -> None:
    from openm3.ops.experts.triton import choose_tiles

    decoding, middle, prompt = (choose_tiles(4 * tokens, 128, 2, False, triton.HOPPER) for tokens in (64, 1024, 8192))
    assert (decoding.rows, decoding.columns, middle.rows, prompt.rows, prompt.columns) == (16, 64, 64, 128, 256)
    assert prompt.num_stages * (128 + 256) * 64 * 2 <= triton.HOPPER.shared_bytes
    small = choose_tiles(4 * 8192, 128, 2, False, triton.HOPPER._replace(shared_bytes=99 << 10))
    assert (small.rows, small.columns, small.num_stages) == (128, 128, 2)
    assert choose_tiles(4 * 8192, 128, 4, False, triton.HOPPER).rows == 32


def test_strides_and_an_expert_twice(triton_device: torch.device) -> None:
    e = on(triton_device, routed(ExpertCase(name="", num_tokens=30, width=24, inner=12)))
    hold_to_the_reference(
        Routed(
            e.x_TD.repeat(1, 2)[:, :24],
            e.expert_TA.T.clone().fill_(3).T,
            torch.rand(2, 30, device=triton_device).T,
            e.gate_up_E2FD.repeat(1, 1, 2)[..., 7:31],
            e.down_EDF.repeat(1, 2, 1)[:, 10:34],
        )
    )


def test_tokens_do_not_mix_and_the_batch_changes_nothing(triton_device: torch.device) -> None:
    e = on(triton_device, routed(next(case for case in CASES if case.crowded), dtype=torch.bfloat16))
    clean_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    order = torch.randperm(40, device=triton_device)
    turned_TD = experts(*(x[order] for x in e[:3]), *e[3:], alpha=ALPHA, limit=LIMIT)
    assert torch.equal(turned_TD, clean_TD[order])
    e.x_TD[1] = torch.nan
    out_TD = experts(*e, alpha=ALPHA, limit=LIMIT)
    others = torch.arange(40, device=triton_device) != 1
    assert out_TD[1].isnan().all() and torch.equal(out_TD[others], clean_TD[others])


def test_experts_that_do_not_exist_add_nothing(triton_device: torch.device) -> None:
    e = on(triton_device, routed(CASES[2]))
    e.expert_TA[::2, 0], e.expert_TA[1::2, 0] = -1, 8
    alone = e._replace(expert_TA=e.expert_TA[:, 1:], weight_TA=e.weight_TA[:, 1:])
    assert torch.equal(*(experts(*x, alpha=ALPHA, limit=LIMIT) for x in (e, alone)))


def test_refusals(triton_device: torch.device) -> None:
    e = on(triton_device, routed(CASES[0]))
    sums, choice = (next(i for i in operator.implementations if i.name == "triton") for operator in (EXPERTS, ROUTE))
    codes = quantise(e.down_EDF, 4)
    assert sums.supports(*e[:4], codes, ALPHA, LIMIT) == "needs multiples of 32 inputs a scale, not 4"
    many_ED = torch.zeros(1025, 16, device=triton_device)
    assert choice.supports(e.x_TD, many_ED, many_ED[:, 0], 2) == "takes up to 1024 experts, not 1025"
    half_ED = many_ED[:4].half()
    assert choice.supports(e.x_TD, half_ED, half_ED[:, 0], 2) == "routes in float32"


@pytest.mark.parametrize("num_tokens", [0, 1, 70])
@pytest.mark.parametrize(("num_experts", "num_active"), [(1, 1), (70, 5)])
def test_routes_are_the_reference(
    num_experts: int, num_active: int, num_tokens: int, triton_device: torch.device
) -> None:
    """Whole numbers, so that sums are exact and ties many; NaN and infinities among them."""
    x_TD = torch.randint(-1, 2, (num_tokens, 33)).float()
    if num_tokens > 1:
        x_TD[num_tokens // 2, 0], x_TD[num_tokens // 3, 1] = torch.nan, torch.inf
    router_ED = torch.randint(-1, 2, (num_experts, 33)) * (torch.arange(33) < 8)
    router_ED, bias_E = router_ED.float().to(triton_device), torch.randint(0, 2, (num_experts,)).float()
    bias_E = bias_E.repeat_interleave(2).to(triton_device)[::2]
    x_TD = x_TD.to(triton_device)
    for tokens in (x_TD, x_TD.bfloat16(), x_TD.repeat(1, 2)[:, :33]):
        wanted_TA, weight_TA = reference.route(tokens, router_ED, bias_E, num_active)
        expert_TA, got_TA = route(tokens, router_ED, bias_E, num_active)
        assert expert_TA.dtype == torch.int32 and torch.equal(expert_TA, wanted_TA)
        torch.testing.assert_close(got_TA, weight_TA, rtol=2e-6, atol=1e-7, equal_nan=True)


def test_routes_of_wide_tokens_are_precise_and_the_same_in_every_batch(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several splits, the last not whole; float32 to the last bits; tiles of both sizes; 40 tokens at a time."""
    from openm3.ops.experts import triton as kernels

    x_TD, router_ED = torch.randn(70, 1100).to(triton_device), torch.randn(9, 1100).to(triton_device) / 33
    bias_E = torch.zeros(9, device=triton_device)
    expert_TA, weight_TA = route(x_TD, router_ED, bias_E, 3)
    exact_TA, exact_weight_TA = reference.route(x_TD.double(), router_ED.double(), bias_E.double(), 3)
    assert torch.equal(expert_TA, exact_TA)
    torch.testing.assert_close(weight_TA.double(), exact_weight_TA, rtol=3e-6, atol=0)
    alone = route(x_TD[5:6], router_ED, bias_E, 3)
    assert torch.equal(alone[0][0], expert_TA[5]) and torch.equal(alone[1][0], weight_TA[5])
    monkeypatch.setattr(kernels, "WORKSPACE", 3 * 9 * 4 * 40)
    pieces = route(x_TD, router_ED, bias_E, 3)
    assert torch.equal(pieces[0], expert_TA) and torch.equal(pieces[1], weight_TA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_is_as_close_as_the_reference(dtype: torch.dtype, triton_device: torch.device) -> None:
    for shape in ((0, 8), (1, 2), (3, 5, 38), (7, 600), (2, 2200)):
        gate_up = (torch.randn(shape) * 6).to(triton_device, dtype)
        truth = reference.swiglu(gate_up.double(), ALPHA, LIMIT)
        out = swiglu(gate_up, alpha=ALPHA, limit=LIMIT)
        assert torch.equal(swiglu(gate_up.repeat_interleave(2, 0)[::2], alpha=ALPHA, limit=LIMIT), out)
        assert out.dtype == dtype and out.shape == truth.shape
        assert error(out, truth) <= max(2 * error(reference.swiglu(gate_up, ALPHA, LIMIT), truth), 1e-7)


def test_swiglu_takes_any_number(triton_device: torch.device) -> None:
    rows = [[torch.nan, 1.0], [1.0, torch.nan], [torch.inf, -torch.inf], [-80.0, 3.0], [-1e30, 7.0], [-torch.inf, 1.0]]
    gate_up = torch.tensor(rows, device=triton_device)
    out = swiglu(gate_up, alpha=ALPHA, limit=LIMIT)
    torch.testing.assert_close(out, reference.swiglu(gate_up, ALPHA, LIMIT), equal_nan=True)


def test_a_mixture_is_its_parts(triton_device: torch.device) -> None:
    x_TD, router_ED = torch.randn(5, 16, device=triton_device), torch.randn(4, 16, device=triton_device)
    routed_weights = [torch.randn(shape, device=triton_device) for shape in ((4, 24, 16), (4, 16, 12))]
    shared = [torch.randn(shape, device=triton_device) for shape in ((24, 16), (16, 12))]
    args = (x_TD, (router_ED, router_ED[:, 0]), 2, routed_weights, shared, 2.0, ALPHA, LIMIT)
    with openm3.use("reference"):
        wanted_TD = MIXTURE(*args)
    got_TD = mixture(*args[:5], scale=2.0, alpha=ALPHA, limit=LIMIT)
    torch.testing.assert_close(got_TD, wanted_TD, rtol=0, atol=2e-6 * float(wanted_TD.abs().max()))


def test_a_captured_mixture_follows_its_tokens(triton_device: torch.device) -> None:
    if triton_device.type != "cuda":
        pytest.skip("needs a GPU")
    e = on(triton_device, routed(CASES[3], dtype=torch.bfloat16))
    router_ED, bias_E = torch.randn(8, 16, device=triton_device), torch.zeros(8, device=triton_device)

    def step() -> Tensor:
        return experts(e.x_TD, *route(e.x_TD, router_ED, bias_E, 2), *e[3:], alpha=ALPHA, limit=LIMIT)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = step()
    for _ in range(2):
        e.x_TD.normal_()
        graph.replay()
        assert torch.equal(out_TD, step())
