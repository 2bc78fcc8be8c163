"""Sampling on a CPU, request by request: of a large vocabulary only the likeliest tokens are sorted and given noise.

A token is chosen by the reference's own numbers, so it is the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openm3.ops.sample.reference import gumbel, likely, scaled

CANDIDATES = 512
"""How many of the likeliest tokens are sorted at first; 32 times as many whenever limits keep them all."""


def sample(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    scaled_RV = scaled(logit_RV, values, prompt_ids, output_ids)
    id_R = scaled_RV.argmax(-1)
    for r in values["temperature"].nonzero()[:, 0].tolist():
        top_k, top_p, min_p = (values[name][r].item() for name in ("top_k", "top_p", "min_p"))
        token_C = _kept(scaled_RV[r], int(top_k), top_p, min_p)
        noise_C = gumbel(values["seed"][r : r + 1], values["step"][r : r + 1], token_C)[0]
        id_R[r] = token_C[(scaled_RV[r, token_C] + noise_C).argmax()]
    return id_R, logit_RV.float().log_softmax(-1).gather(1, id_R[:, None])[:, 0]


def supports(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> str | None:
    return None if logit_RV.is_cpu else f"needs CPU tensors, not {logit_RV.device.type}"


def _kept(scaled_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The tokens that top-k, top-p and min-p keep, among them perhaps forbidden ones."""
    vocabulary = scaled_V.shape[0]
    if not top_k and top_p >= 1 and min_p == 0:
        return torch.arange(vocabulary)
    most, count = top_k or vocabulary, max(CANDIDATES, top_k)
    while True:
        order_C = _likeliest(scaled_V, count)
        no_more = order_C.shape[0] < count or most <= count
        order_C = order_C[:most]
        shared_V = scaled_V
        if top_k:
            shared_V = torch.full_like(scaled_V, -torch.inf).index_copy_(0, order_C, scaled_V[order_C])
        share_C = shared_V.softmax(-1)[order_C]
        num_kept = int(likely(share_C[None], torch.tensor([[top_p]]), torch.tensor([[min_p]])).sum())
        if no_more or num_kept < order_C.shape[0]:
            return order_C[:num_kept]
        count *= 32


def _likeliest(scaled_V: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens in order, and those as likely as the last; fewer where the others are forbidden."""
    possible_V = scaled_V > -torch.inf
    if count < scaled_V.shape[0]:
        possible_V &= scaled_V >= scaled_V.topk(count, sorted=False).values.amin()
    token_C = possible_V.nonzero()[:, 0]
    return token_C[scaled_V[token_C].sort(descending=True, stable=True).indices]
