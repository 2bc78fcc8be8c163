"""Sampling, as defined: penalise, scale, keep, add Gumbel noise, take the largest. Float32; the noise in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""2**64 divided by the golden ratio, as a signed number: the stride of splitmix64."""


def sample(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    score_RV = _penalised(logit_RV.float(), values, prompt_ids, output_ids)
    temperature_R1 = values["temperature"][:, None]
    score_RV = score_RV - score_RV.amax(-1, keepdim=True)
    scaled_RV = score_RV / temperature_R1.where(temperature_R1 > 0, 1.0)
    kept_RV = _limited(scaled_RV, values)
    drawn_RV = kept_RV + _gumbel(values["seed"], values["step"], score_RV.shape[1])
    id_R = torch.where(temperature_R1 > 0, drawn_RV, score_RV).argmax(-1)
    return id_R, logit_RV.float().log_softmax(-1).gather(1, id_R[:, None])[:, 0]


def top_logprobs(logit_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = logit_RV.float().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    return best.indices[:, :count], best.values[:, :count]


def _penalised(
    score_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> Tensor:
    prompt_RV, output_RV = _counts(prompt_ids, score_RV), _counts(output_ids, score_RV)
    factor_R1 = values["repetition"][:, None]
    repeated_RV = torch.where(score_RV > 0, score_RV / factor_R1, score_RV * factor_R1)
    score_RV = torch.where(prompt_RV + output_RV > 0, repeated_RV, score_RV)
    score_RV = score_RV - values["frequency"][:, None] * output_RV
    return score_RV - values["presence"][:, None] * (output_RV > 0)


def _counts(ids: Sequence[Sequence[int]], score_RV: Tensor) -> Tensor:
    """How often each request holds each token, float32."""
    count_RV = torch.zeros_like(score_RV)
    for r, row in enumerate(ids):
        token = torch.as_tensor(row, dtype=torch.int64, device=score_RV.device)
        count_RV[r].index_add_(0, token, torch.ones_like(token, dtype=count_RV.dtype))
    return count_RV


def _limited(scaled_RV: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """-inf for every token that top-k, top-p or min-p drops."""
    vocabulary = scaled_RV.shape[1]
    best_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    top_k_R1 = values["top_k"][:, None]
    rank_V = torch.arange(vocabulary, device=scaled_RV.device)
    kept_RV = rank_V < top_k_R1.where(top_k_R1 > 0, vocabulary)
    share_RV = best_RV.masked_fill(~kept_RV, -torch.inf).softmax(-1)
    before_RV = share_RV.cumsum(-1) - share_RV
    # Rounding can bring the running sum to 1 before the last token; top_p 1 must still keep that one.
    top_p_R1 = values["top_p"][:, None]
    kept_RV &= (before_RV < top_p_R1) | (top_p_R1 >= 1)
    kept_RV &= share_RV >= values["min_p"][:, None] * share_RV[:, :1]
    kept_RV[:, 0] = True
    return scaled_RV.masked_fill(~torch.empty_like(kept_RV).scatter_(1, order_RV, kept_RV), -torch.inf)


def _gumbel(seed_R: Tensor, step_R: Tensor, count: int) -> Tensor:
    """Gumbel noise [R, count] (float64) that is a pure function of seed, step and token: splitmix64 of the three."""
    key_R1 = _mix(_mix(seed_R) + step_R)[:, None]
    token_V = torch.arange(1, count + 1, device=seed_R.device)
    bits_RV = _shift(_mix(key_R1 + token_V * GOLDEN), 12)
    uniform_RV = (bits_RV.double() + 0.5) * 2.0**-52
    return -(-uniform_RV.log()).log()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap as its unsigned ones do."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of a signed number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
