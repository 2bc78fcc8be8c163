"""Choosing the next token of each request from its logits.

`sample(logit_RV, params, prompt_ids, output_ids) -> (id_R, logprob_R)`

- In this order, in float32: penalties; temperature; top-k; top-p of what top-k left; min-p. At least one token always
  remains. Among equal logits the smaller id stands first; temperature 0 takes the first.
- The draw depends on the request's logits, parameters, `seed` and `step` (the number of tokens drawn before) alone:
  neither on the other requests of the batch nor on the device.
- `logprob_R` is the model's own: the log-softmax of the logits as given, before penalties, temperature and limits.
- A logit of -inf forbids its token.
- Logits that are NaN or +inf, or forbid every token, are an error on the CPU. On other devices the host does not look,
  so that nothing waits and steps can be captured: the request's id is -1 there and its log-probability NaN, and whoever
  reads the ids reports it.

`top_logprobs(logit_RV, count) -> (id_Rv, logprob_Rv)` gives the model's `count` likeliest tokens, likeliest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.sample import blocked, reference
from openm3.ops.triton import implementation as in_triton

SAMPLE = Operator(
    "sample",
    (
        Implementation("blocked", blocked.supports, blocked.sample),
        in_triton("sample", "sample"),
        Implementation("reference", always, reference.sample),
    ),
)
TOP_LOGPROBS = Operator("top_logprobs", (Implementation("reference", always, reference.top_logprobs),))
OPERATORS = (SAMPLE, TOP_LOGPROBS)

_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("at least 0", lambda x: 0 <= x < math.inf),
    "top_k": ("a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0),
    "top_p": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "min_p": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "repetition": ("between 0.01 and 100", lambda x: 0.01 <= x <= 100),
    "presence": ("between -2 and 2", lambda x: -2 <= x <= 2),
    "frequency": ("between -2 and 2", lambda x: -2 <= x <= 2),
    "seed": ("a whole number of 64 bits", lambda x: isinstance(x, int) and -(2**63) <= x < 2**63),
    "step": ("a whole number of at least 0", lambda x: isinstance(x, int) and 0 <= x < 2**63),
}


@dataclass(frozen=True, kw_only=True)
class SampleParams:
    """How each request draws its next token: one value for all requests, or a sequence with one a request.

    `temperature` 0 is greedy. `top_k` 0 keeps all. `top_p` keeps the fewest likeliest tokens that hold this share of
    the probability. `min_p` keeps tokens at least this likely relative to the likeliest. `repetition` divides the
    positive logits of tokens seen in prompt or output, and multiplies the negative ones. `presence` is subtracted once
    from tokens of the output, `frequency` once each time. Raises ValueError for an impossible value.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition: float | Sequence[float] = 1.0
    presence: float | Sequence[float] = 0.0
    frequency: float | Sequence[float] = 0.0
    seed: int | Sequence[int] = 0
    step: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        for name, (allowed, test) in _ALLOWED.items():
            given = getattr(self, name)
            for value in given if isinstance(given, Sequence) else (given,):
                if not test(value):
                    raise ValueError(f"{name} must be {allowed}, not {value!r}")

    def values(self, logit_RV: Tensor) -> dict[str, Tensor]:
        """Each field with one value a request, on the device of the logits, for which nothing there is waited for."""
        requests = logit_RV.shape[0]
        rows: dict[torch.dtype, dict[str, list[Any]]] = {torch.int64: {}, torch.float32: {}}
        for field in fields(self):
            given = getattr(self, field.name)
            row = list(given) if isinstance(given, Sequence) else [given] * requests
            if len(row) != requests:
                raise ValueError(f"{requests} requests need as many values of {field.name}, not {len(row)}")
            whole = field.name in ("top_k", "seed", "step")
            rows[torch.int64 if whole else torch.float32][field.name] = row
        values: dict[str, Tensor] = {}
        for dtype, named in rows.items():
            host = torch.tensor(list(named.values()), dtype=dtype, pin_memory=logit_RV.is_cuda)
            values |= zip(named, host.to(logit_RV.device, non_blocking=True), strict=True)
        return values


def sample(
    logit_RV: Tensor,
    params: SampleParams,
    prompt_ids: Sequence[Sequence[int]] = (),
    output_ids: Sequence[Sequence[int]] = (),
) -> tuple[Tensor, Tensor]:
    """Each request's next token (int64) and its log-probability (float32).

    `prompt_ids` and `output_ids` are the tokens of each request so far; only penalties need them. Raises ValueError for
    counts that differ from the number of requests, and on the CPU for logits that are NaN or +inf or allow no token.
    """
    _check_logits(logit_RV)
    requests, vocabulary = logit_RV.shape
    for name, ids in (("prompt_ids", prompt_ids), ("output_ids", output_ids)):
        if ids and len(ids) != requests:
            raise ValueError(f"{requests} requests need as many {name}, not {len(ids)}")
        bad = next((i for row in ids for i in row if not 0 <= i < vocabulary), None)
        if bad is not None:
            raise ValueError(f"{name} holds {bad}, outside the vocabulary of {vocabulary}")
    chosen: tuple[Tensor, Tensor] = SAMPLE(logit_RV, params.values(logit_RV), prompt_ids, output_ids)
    return chosen


def top_logprobs(logit_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each request and their log-probabilities; equal ones by smaller id."""
    _check_logits(logit_RV)
    if not 0 <= count <= logit_RV.shape[1]:
        raise ValueError(f"count must be between 0 and the vocabulary of {logit_RV.shape[1]}, not {count}")
    best: tuple[Tensor, Tensor] = TOP_LOGPROBS(logit_RV, count)
    return best


def _check_logits(logit_RV: Tensor) -> None:
    if logit_RV.ndim != 2 or logit_RV.shape[1] == 0:
        raise ValueError(f"expected logits [R, V], not {list(logit_RV.shape)}")
    if not logit_RV.is_cpu:
        return
    best_R = logit_RV.amax(-1)
    bad = (~best_R.isfinite()).nonzero()
    if bad.numel():
        r = int(bad[0, 0])
        what = {-math.inf: "forbid every token", math.inf: "hold +inf"}.get(float(best_R[r]), "hold NaN")
        raise ValueError(f"the logits of request {r} {what}")
