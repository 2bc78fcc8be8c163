"""Sampling, as defined: penalise, scale, keep, add Gumbel noise, take the largest. Float32; the noise in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = -7046029254386353131
"""2**64 divided by the golden ratio, as a signed number: the stride of splitmix64."""


def sample(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    scaled_RV = scaled(logit_RV, values, prompt_ids, output_ids)
    token_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    drawn_RV = _limited(scaled_RV, values) + gumbel(values["seed"], values["step"], token_V)
    id_R = torch.where(values["temperature"][:, None] > 0, drawn_RV, scaled_RV).argmax(-1)
    logprob_R = logit_RV.float().log_softmax(-1).gather(1, id_R[:, None])[:, 0]
    possible_R = logit_RV.amax(-1).isfinite()
    return id_R.where(possible_R, -1), logprob_R.where(possible_R, torch.nan)


def top_logprobs(logit_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = logit_RV.float().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    return best.indices[:, :count], best.values[:, :count]


def scaled(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> Tensor:
    """Logits after penalties and temperature (1 where it is 0), the largest of each request at zero."""
    score_RV = penalised(logit_RV.float(), values, prompt_ids, output_ids)
    temperature_R1 = values["temperature"][:, None]
    return (score_RV - score_RV.amax(-1, keepdim=True)) / temperature_R1.where(temperature_R1 > 0, 1.0)


def penalised(
    score_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> Tensor:
    """Scores after repetition, frequency and presence penalties."""
    if not any(len(row) for row in (*prompt_ids, *output_ids)):
        return score_RV
    prompt_RV, output_RV = _counts(prompt_ids, score_RV), _counts(output_ids, score_RV)
    factor_R1 = values["repetition"][:, None]
    repeated_RV = torch.where(score_RV > 0, score_RV / factor_R1, score_RV * factor_R1)
    score_RV = torch.where(prompt_RV + output_RV > 0, repeated_RV, score_RV)
    score_RV = score_RV - values["frequency"][:, None] * output_RV
    return score_RV - values["presence"][:, None] * (output_RV > 0)


def _counts(ids: Sequence[Sequence[int]], score_RV: Tensor) -> Tensor:
    """How often each request holds each token, float32."""
    place = [r * score_RV.shape[1] + token for r, row in enumerate(ids) for token in row]
    place_C = torch.tensor(place, dtype=torch.int64, device=score_RV.device)
    count_RV = torch.zeros_like(score_RV, memory_format=torch.contiguous_format)
    count_RV.view(-1).index_add_(0, place_C, torch.ones_like(place_C, dtype=count_RV.dtype))
    return count_RV


def _limited(scaled_RV: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """-inf for every token that top-k, top-p or min-p drops."""
    order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True).indices
    top_k_R1, vocabulary = values["top_k"][:, None], scaled_RV.shape[1]
    rank_V = torch.arange(vocabulary, device=scaled_RV.device)
    kept_RV = rank_V < top_k_R1.where(top_k_R1 > 0, vocabulary)
    share_RV = _masked(scaled_RV, order_RV, kept_RV).softmax(-1).gather(1, order_RV)
    kept_RV &= likely(share_RV, values["top_p"][:, None], values["min_p"][:, None])
    return _masked(scaled_RV, order_RV, kept_RV)


def _masked(scaled_RV: Tensor, order_RV: Tensor, kept_RV: Tensor) -> Tensor:
    """-inf for every token that is not kept; `kept_RV` is in the order of `order_RV`."""
    return scaled_RV.masked_fill(~torch.empty_like(kept_RV).scatter_(1, order_RV, kept_RV), -torch.inf)


def likely(share_RC: Tensor, top_p_R1: Tensor, min_p_R1: Tensor) -> Tensor:
    """Whether top-p and min-p keep the tokens of these shares, of which the largest come first: true, then false."""
    before_RC = F.pad(share_RC.cumsum(-1)[:, :-1], (1, 0))
    # Rounding can bring the running sum to 1 before the last token; top_p 1 must still keep that one.
    kept_RC = (before_RC < top_p_R1) | (top_p_R1 >= 1)
    kept_RC &= share_RC >= min_p_R1 * share_RC[:, :1]
    kept_RC[:, 0] = True
    return kept_RC


def gumbel(seed_R: Tensor, step_R: Tensor, token_C: Tensor) -> Tensor:
    """Gumbel noise [R, C] (float64) that is a pure function of seed, step and token: splitmix64 of the three."""
    key_R1 = _mix(_mix(seed_R) + step_R)[:, None]
    bits_RC = _shift(_mix(key_R1 + (token_C + 1) * GOLDEN), 12)
    uniform_RC = (bits_RC.double() + 0.5) * 2.0**-52
    return -(-uniform_RC.log()).log()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap as its unsigned ones do."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of a signed number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
