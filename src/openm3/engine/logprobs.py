"""Log-probabilities of tokens, and of the likeliest ones at their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openm3.engine.request import Logprob
from openm3.ops.sample import top_logprobs

AT_ONCE = 256
"""Places of a prompt whose logits are in memory at a time."""


def logprobs(logit_SV: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[Logprob]:
    """Those of a token at each place, with as many of the likeliest as `counts` says. Logits must be numbers."""
    id_S = torch.tensor(ids, device=logit_SV.device).clamp(min=0)
    logprob_S = logit_SV.log_softmax(-1).gather(1, id_S[:, None])[:, 0].tolist()
    top_ids, top_values = (x.tolist() for x in top_logprobs(logit_SV, max(counts)))
    return [
        Logprob(i, value, tuple(zip(best[:count], values[:count], strict=True)))
        for i, value, best, values, count in zip(ids, logprob_S, top_ids, top_values, counts, strict=True)
    ]


def prompt_logprobs(
    head: Callable[[Tensor], Tensor], hidden_SD: Tensor, ids: Sequence[int], count: int
) -> list[Logprob]:
    """Those of the tokens that came after some hidden states; NaN where the logits are no numbers."""
    found: list[Logprob] = []
    for first in range(0, len(ids), AT_ONCE):
        part = ids[first : first + AT_ONCE]
        logit_SV = head(hidden_SD[first : first + AT_ONCE]).float()
        broken_S = ~logit_SV.amax(-1).isfinite()
        own = logprobs(logit_SV.masked_fill(broken_S[:, None], 0.0), part, [count] * len(part))
        found += [
            Logprob(one.id, math.nan) if broken else one for one, broken in zip(own, broken_S.tolist(), strict=True)
        ]
    return found
