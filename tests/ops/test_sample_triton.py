"""Sampling in Triton: the reference's tokens, on a GPU or in Triton's interpreter."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops.sample import SAMPLE, SampleParams, reference, sample


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Vocabularies of some hundred tokens in several pieces, as large ones are."""
    from openm3.ops.sample import triton as kernels

    monkeypatch.setattr(kernels, "LEAST", 64)
    return triton_device


def check(logit_RV: Tensor, params: SampleParams, *ids: Any) -> Tensor:
    """The reference's tokens, and its log-probabilities to the last bits."""
    id_R, logprob_R = sample(logit_RV, params, *ids)
    with openm3.use("reference"):
        wanted_R, wanted_logprob_R = sample(logit_RV, params, *ids)
    assert id_R.dtype == torch.int64 and logprob_R.dtype == torch.float32
    assert torch.equal(id_R, wanted_R)
    torch.testing.assert_close(logprob_R, wanted_logprob_R, rtol=1e-6, atol=2e-6)
    return id_R


@pytest.mark.parametrize("vocabulary", [1, 17, 290])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_tokens_are_the_references(vocabulary: int, spread: float, device: torch.device) -> None:
    """Ties, forbidden tokens, limits of all kinds together; top-k of more tokens than there are pieces, or tokens."""
    generator = torch.Generator().manual_seed(vocabulary)
    limits = list(itertools.product((0, 1, 4, 40, 10_000), (0.0, 0.47, 0.93, 1.0)))
    logit_RV = torch.randn((len(limits), vocabulary), generator=generator) * spread
    logit_RV[::2] = logit_RV[::2].round()
    logit_RV[::3, 5 : vocabulary - 4] = -torch.inf
    top_k, top_p = map(list, zip(*limits, strict=True))
    min_p, seed = [0.0, 0.0, 0.03, 0.03] * 5, list(range(len(limits)))
    params = SampleParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, step=3)
    check(logit_RV.to(device), params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_and_random_requests_in_one_batch(dtype: torch.dtype, device: torch.device) -> None:
    """Strided logits with many ties; the first of equals stands in an early piece or in the last."""
    logit_RV = torch.randint(0, 5, (6, 600)).to(device, dtype)[:, 1::2]
    logit_RV[0, 299] = logit_RV[1, 70] = 9
    params = SampleParams(temperature=[0.0, 0.0, 0.0, 1.0, 0.1, 30.0], seed=[0, 0, 0, -4, 2**63 - 1, 7], step=2**40)
    assert check(logit_RV, params)[:2].tolist() == [299, 70]


def test_limits_keep_exactly_these(device: torch.device) -> None:
    """Draws of some steps from 0.16, 0.3, 0.3, 0.12, 0.12: the reference's, of which these are all that can be."""
    cases = (
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.29}, {1}),
        ({"top_p": 0.61}, {0, 1, 2}),
        ({"min_p": 1.0}, {1, 2}),
        ({"top_k": 2, "top_p": 0.49}, {1}),
        ({"top_k": 2, "top_p": 0.51}, {1, 2}),
        ({"top_p": 0.9, "temperature": 0.25}, {1, 2}),
    )
    logit_RV = torch.tensor([0.16, 0.3, 0.3, 0.12, 0.12], device=device).log().expand(8, -1)
    for values, wanted in cases:
        params = SampleParams(**{"temperature": 1.0, "seed": 5, "step": list(range(8)), **values})
        assert set(check(logit_RV, params).tolist()) <= wanted


def test_tiny_temperatures_are_greedy(device: torch.device) -> None:
    logit_RV = torch.tensor([[1.0, 90.0, -70.0, 88.0]], device=device).expand(3, -1)
    for limits in ({}, {"top_k": 3}, {"top_p": 0.9}):
        assert check(logit_RV, SampleParams(temperature=[1e-30, 1e-6, 1e-3], **limits)).tolist() == [1, 1, 1]


def test_penalties_change_the_choice_but_not_the_logprobs(device: torch.device) -> None:
    logit_RV = torch.randn(4, 300).to(device)
    prompts, outputs = [[1, 2, 299]] * 4, [[], [3, 3, 3], list(range(0, 300, 2)), [0]]
    values = {"repetition": 1.3, "presence": [0.0, 1.5, 2.0, -2.0], "frequency": 0.5, "seed": [1, 2, 3, 4]}
    check(logit_RV, SampleParams(temperature=[0.0, 1.0, 0.7, 0.7], top_k=[0, 0, 20, 0], **values), prompts, outputs)


def test_draws_do_not_depend_on_the_batch(device: torch.device) -> None:
    logit_RV = (torch.randn(4, 300) * 3).to(device)
    values: dict[str, list[Any]] = {
        "temperature": [0.0, 0.7, 1.0, 1.5],
        "top_k": [0, 0, 40, 3],
        "top_p": [1.0, 0.9, 1.0, 0.8],
        "min_p": [0.0, 0.0, 0.05, 0.0],
        "seed": [1, 2, 3, -4],
    }
    whole = sample(logit_RV, SampleParams(**values))
    for rows in ([0], [3, 1], [2, 1, 3, 0]):
        part = sample(
            logit_RV[rows], SampleParams(**{name: [given[r] for r in rows] for name, given in values.items()})
        )
        assert all(torch.equal(x, y[rows]) for x, y in zip(part, whole, strict=True))


@pytest.mark.parametrize("limits", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}])
def test_impossible_logits_give_no_token_to_their_request_alone(limits: dict[str, Any], device: torch.device) -> None:
    """A NaN in a late piece, infinity, none that is allowed. The operator is called, as `sample` looks on the CPU."""
    logit_RV = torch.randn(5, 200).to(device)
    logit_RV[1, 150], logit_RV[2, 3], logit_RV[3] = math.nan, math.inf, -math.inf
    args = logit_RV, SampleParams(seed=8, **limits).values(logit_RV), (), ()
    id_R, logprob_R = SAMPLE(*args)
    assert id_R[1:4].tolist() == [-1] * 3 and logprob_R[1:4].isnan().all()
    good_R = torch.tensor([0, 4], device=device)
    assert torch.equal(id_R[good_R], sample(logit_RV[good_R], SampleParams(seed=8, **limits))[0])
    reference_R, reference_logprob_R = reference.sample(*args)
    assert torch.equal(reference_R, id_R) and reference_logprob_R[1:4].isnan().all()


def test_no_requests(device: torch.device) -> None:
    id_R, logprob_R = sample(torch.empty(0, 9, device=device), SampleParams(temperature=1.0))
    assert id_R.shape == logprob_R.shape == (0,)


def test_nothing_waits_and_a_captured_step_follows_its_logits(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    logit_RV = torch.randn(3, 5000, device=device)
    params = SampleParams(temperature=[0.0, 1.0, 1.0], top_k=[0, 0, 7], seed=3)
    sample(logit_RV, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logit_RV, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = params.values(logit_RV)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        id_R, _ = SAMPLE(logit_RV, values, (), ())
    for _ in range(2):
        logit_RV.normal_()
        graph.replay()
        assert torch.equal(id_R, reference.sample(logit_RV, values, (), ())[0])


def test_refusals(device: torch.device) -> None:
    implementation = next(i for i in SAMPLE.implementations if i.name == "triton")
    wide_RV = torch.zeros(1, 1, device=device).expand(1, (1 << 19) + 1)
    reason = "takes vocabularies of up to 524288 tokens, not 524289"
    assert implementation.supports(wide_RV, {}, (), ()) == reason
