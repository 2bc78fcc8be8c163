"""Sampling: exact limits, honest frequencies, and draws that depend on their own request alone."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import openm3
from openm3.ops.sample import SAMPLE, SampleParams, blocked, reference, sample, top_logprobs


def draws(logit_V: Tensor, count: int = 2000, **values: Any) -> Tensor:
    """Token ids of many steps of one request, each a row of one batch."""
    params = SampleParams(**{"temperature": 1.0, "seed": 5, "step": list(range(count)), **values})
    return sample(logit_V.expand(count, -1), params)[0]


def kept(logit_V: Tensor, **values: Any) -> set[int]:
    """Every token that can be drawn: enough draws to see all of a few likely ones."""
    return set(draws(logit_V, 400, temperature=values.pop("temperature", 1.0), **values).tolist())


def test_greedy_takes_the_largest_and_the_smaller_of_equals() -> None:
    logit_RV = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0], [-1.0, 5.0, 5.0]])
    id_R, logprob_R = sample(logit_RV, SampleParams())
    assert id_R.tolist() == [1, 0, 1] and id_R.dtype == torch.int64
    assert torch.equal(logprob_R, logit_RV.log_softmax(-1)[torch.arange(3), id_R])
    assert sample(torch.zeros(1, 100_000), SampleParams())[0].tolist() == [0]


def test_frequencies_follow_the_softmax() -> None:
    """Chi-squared of 4,000 draws over 6 tokens; 99.9% of honest samplers stay below 20.5."""
    logit_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    for temperature in (0.5, 1.0, 2.0):
        seen_V = torch.bincount(draws(logit_V, 4000, temperature=temperature), minlength=6)
        wanted_V = (logit_V / temperature).softmax(-1) * 4000
        assert float(((seen_V - wanted_V).square() / wanted_V).sum()) < 20.5


def test_seeds_draw_independently() -> None:
    """The same over seeds at one step, and pairs of neighbouring steps are uncorrelated."""
    params = SampleParams(temperature=1.0, seed=list(range(4000)), step=7)
    seen_V = torch.bincount(sample(torch.zeros(4000, 8), params)[0], minlength=8)
    assert float(((seen_V - 500).square() / 500).sum()) < 24.3
    first = draws(torch.zeros(2), 4001).float() * 2 - 1
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.06


def test_draws_do_not_depend_on_the_batch() -> None:
    logit_RV = torch.randn(6, 300) * 3
    values: dict[str, list[Any]] = {
        "temperature": [0.0, 0.7, 1.0, 1.5, 1.0, 0.3],
        "top_k": [0, 0, 40, 5, 0, 0],
        "top_p": [1.0, 0.9, 1.0, 0.8, 1.0, 0.5],
        "min_p": [0.0, 0.0, 0.05, 0.0, 0.0, 0.0],
        "repetition": [1.0, 1.3, 1.0, 1.0, 1.0, 1.0],
        "presence": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        "frequency": [0.0, 0.0, 0.0, 0.5, 0.0, 0.0],
        "seed": [1, 2, 3, -4, 2**63 - 1, 6],
        "step": [0, 1, 2, 3, 4, 5],
    }
    prompts, outputs = [[r, r + 1] for r in range(6)], [[r] * r for r in range(6)]
    id_R, logprob_R = sample(logit_RV, SampleParams(**values), prompts, outputs)
    for rows in ([0], [3], [5, 1], [4, 3, 2, 1, 0]):
        params = SampleParams(**{name: [given[r] for r in rows] for name, given in values.items()})
        got = sample(logit_RV[rows], params, [prompts[r] for r in rows], [outputs[r] for r in rows])
        assert torch.equal(got[0], id_R[rows]) and torch.equal(got[1], logprob_R[rows])


@pytest.mark.parametrize("vocabulary", [1, 17, 3000])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_blocked_takes_the_references_tokens(vocabulary: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, forbidden tokens and limits inside, at and beyond the candidates, which are few here."""
    monkeypatch.setattr(blocked, "CANDIDATES", 8)
    generator = torch.Generator().manual_seed(vocabulary)
    limits = list(itertools.product((0, 1, 8, 9, 2000, 10_000), (0.0, 0.5, 0.95, 1.0), (0.0, 0.02, 1.0)))
    logit_RV = torch.randn((len(limits), vocabulary), generator=generator) * spread
    logit_RV[::2] = logit_RV[::2].round()
    logit_RV[::3, 5 : vocabulary - 4] = -torch.inf
    top_k, top_p, min_p = map(list, zip(*limits, strict=True))
    params = SampleParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p, seed=list(range(len(limits))), step=3)
    assert SAMPLE.choose(logit_RV, params.values(logit_RV), (), ()).name == "blocked"
    for output_ids in ((), [[0, vocabulary - 1]] * len(limits)):
        with openm3.use("reference"):
            wanted = sample(logit_RV, params, (), output_ids)
        got = sample(logit_RV, params, (), output_ids)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_steps_and_seeds_change_the_draw_and_repeat_it() -> None:
    logit_V = torch.zeros(1000)
    assert draws(logit_V, 50).unique().numel() > 40
    assert draws(logit_V, 50, seed=list(range(50)), step=0).unique().numel() > 40
    assert torch.equal(draws(logit_V, 50), draws(logit_V, 50))
    # The numbers themselves are kept: a run recorded today must repeat tomorrow and on another device.
    assert draws(logit_V, 4).tolist() == [170, 146, 86, 591]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 999}, {0, 1, 2, 3, 4}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.29}, {1}),
        ({"top_p": 0.31}, {1, 2}),
        ({"top_p": 0.61}, {0, 1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {1, 2}),
        ({"min_p": 0.5}, {0, 1, 2}),
        ({"min_p": 0.0}, {0, 1, 2, 3, 4}),
        # Of what top-k leaves, token 1 holds half: top-p counts shares after top-k.
        ({"top_k": 2, "top_p": 0.49}, {1}),
        ({"top_k": 2, "top_p": 0.51}, {1, 2}),
        ({"top_k": 4, "min_p": 0.4}, {0, 1, 2}),
        # Temperature comes first: at 0.25 the two likeliest hold 0.97.
        ({"top_p": 0.9, "temperature": 0.25}, {1, 2}),
    ],
)
def test_limits_keep_exactly_these(values: dict[str, Any], wanted: set[int]) -> None:
    """Probabilities 0.16, 0.3, 0.3, 0.12, 0.12: the first of equals counts as likelier."""
    assert kept(torch.tensor([0.16, 0.3, 0.3, 0.12, 0.12]).log(), **values) == wanted


def test_top_p_of_one_keeps_the_rarest_token() -> None:
    """The running sum rounds to 1 before the last token: no draw count could show it, so look at what is kept."""
    logit_RV = torch.tensor([[0.0, -20.0, -30.0]])
    for top_p, wanted in ((1.0, 3), (0.999, 1)):
        limited_RV = reference._limited(logit_RV, SampleParams(top_p=top_p).values(logit_RV))
        assert int(limited_RV.isfinite().sum()) == wanted


def test_forbidden_tokens_are_never_drawn() -> None:
    logit_V = torch.full((20,), -torch.inf)
    logit_V[[3, 11]] = torch.tensor([-50.0, -50.5])
    assert kept(logit_V) == kept(logit_V, top_k=10, top_p=0.99) == {3, 11}
    one_V = torch.full((20,), -torch.inf)
    one_V[7] = -1e30
    id_R, logprob_R = sample(one_V[None], SampleParams(temperature=1.0, top_p=0.1, presence=2.0), (), [[7] * 9])
    assert id_R.tolist() == [7] and logprob_R.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert kept(torch.tensor([1.0, 90.0, -70.0, 88.0]), temperature=temperature) == {1}


def test_penalties() -> None:
    logit_RV = torch.tensor([[4.0, 3.0, -1.0, -1.5]])

    def chosen(prompt: list[int], output: list[int], **values: float) -> int:
        return int(sample(logit_RV, SampleParams(**values), [prompt], [output])[0])

    assert chosen([], [0, 0, 0]) == 0
    assert chosen([0], [], repetition=1.5) == 1 and chosen([], [0], repetition=1.5) == 1
    assert chosen([0], [], repetition=1.3) == 0
    assert chosen([0, 1, 2], [], repetition=100.0) == 0
    assert chosen([], [0], presence=1.5) == 1 and chosen([], [0], presence=0.9) == 0
    assert chosen([0], [], presence=2.0, frequency=2.0) == 0
    assert chosen([], [0, 0, 0], presence=0.9) == 0 and chosen([], [0, 0, 0], frequency=0.4) == 1
    assert chosen([], [1, 1], frequency=-0.6) == 1
    # Negative logits are multiplied: the repeated -1.0 falls behind -1.5.
    low_RV = torch.tensor([[-1.0, -1.5]])
    assert int(sample(low_RV, SampleParams(repetition=2.0), [[0]], [[]])[0]) == 1


def test_logprobs_are_the_models_own() -> None:
    logit_RV = torch.randn(4, 50)
    params = SampleParams(temperature=2.0, top_k=3, repetition=1.2, seed=[1, 2, 3, 4])
    id_R, logprob_R = sample(logit_RV, params, [[1, 2]] * 4, [[3]] * 4)
    torch.testing.assert_close(logprob_R, logit_RV.log_softmax(-1).gather(1, id_R[:, None])[:, 0])
    assert sample(logit_RV.bfloat16(), params)[1].dtype == torch.float32


def test_top_logprobs_are_sorted_and_break_ties_by_id() -> None:
    logit_RV = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    id_Rv, logprob_Rv = top_logprobs(logit_RV, 3)
    assert id_Rv.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(logprob_Rv, logit_RV.log_softmax(-1).gather(1, id_Rv))
    assert top_logprobs(logit_RV, 0)[0].shape == (2, 0) and top_logprobs(logit_RV, 4)[0].shape == (2, 4)
    for count in (-1, 5):
        with pytest.raises(ValueError, match="between 0 and the vocabulary of 4"):
            top_logprobs(logit_RV, count)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-math.inf), min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 100.0]),
    top_k=st.integers(0, 10),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    step=st.integers(0, 2**40),
)
def test_one_possible_token_always_remains(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, step: int
) -> None:
    logit_RV = torch.tensor([logits])
    params = SampleParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, step=step)
    if max(logits) == -math.inf:
        with pytest.raises(ValueError, match="forbid every token"):
            sample(logit_RV, params)
        return
    id_R, logprob_R = sample(logit_RV, params)
    chosen = logits[int(id_R)]
    assert chosen > -math.inf and not logprob_R.isnan().any()
    assert sum(x > chosen for x in logits) < (top_k or len(logits))
    if temperature < 1e-6 or top_k == 1 or min_p == 1:
        assert chosen == max(logits)


def test_no_requests() -> None:
    id_R, logprob_R = sample(torch.empty(0, 9), SampleParams(temperature=1.0))
    assert id_R.shape == logprob_R.shape == (0,)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "request 1 hold NaN"),
        (math.inf, r"request 1 hold \+inf"),
        (-math.inf, "request 1 forbid every token"),
    ],
)
def test_impossible_logits_are_refused(bad: float, message: str) -> None:
    logit_RV = torch.zeros(3, 4)
    logit_RV[1] = bad
    for call in (lambda: sample(logit_RV, SampleParams()), lambda: top_logprobs(logit_RV, 1)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_single_nan_is_refused() -> None:
    logit_RV = torch.zeros(1, 4)
    logit_RV[0, 2] = math.nan
    with pytest.raises(ValueError, match="hold NaN"):
        sample(logit_RV, SampleParams(temperature=1.0))


@pytest.mark.parametrize("shape", [(4,), (2, 0), (1, 2, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected logits \[R, V\]"):
        sample(torch.zeros(shape), SampleParams())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": [1.0, math.inf]}, "temperature must be at least 0, not inf"),
        ({"top_p": 1.1}, "top_p must be between 0 and 1, not 1.1"),
        ({"top_p": [0.5, -0.5]}, "top_p"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition": 0}, "repetition must be between 0.01 and 100, not 0"),
        ({"presence": 3}, "presence must be between -2 and 2, not 3"),
        ({"frequency": math.nan}, "frequency"),
        ({"seed": 2**63}, "seed must be a whole number of 64 bits"),
        ({"seed": 0.5}, "seed"),
        ({"step": -1}, "step"),
    ],
)
def test_impossible_parameters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleParams(**values)


def test_counts_must_match_the_requests() -> None:
    logit_RV = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="2 requests need as many values of seed, not 3"):
        sample(logit_RV, SampleParams(seed=[1, 2, 3]))
    with pytest.raises(ValueError, match="2 requests need as many prompt_ids, not 1"):
        sample(logit_RV, SampleParams(), [[1]])
    with pytest.raises(ValueError, match="output_ids holds 5, outside the vocabulary of 5"):
        sample(logit_RV, SampleParams(), [], [[1], [5]])
