"""Sampling in Triton: two passes over the vocabulary in pieces, then one program a request, and nobody waits.

The first pass finds the likeliest token and what the log-softmax needs. The second adds the reference's noise and takes
the largest sum; where top-k or top-p limit a request, it collects candidates instead, among which the last program
searches how far the limits reach, and draws.

A token's distance is (largest - score) / temperature, its rank the distance's bits before its id: that is the order of
the reference as a number, and limits keep a beginning of it. Shares are whole numbers, exp(-distance) in units of
2^-43, whose sums are exact in any order. So top-k keeps the reference's tokens; top-p and min-p do but where a share,
or a sum of shares, is as near to the limit as float32 rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.sample.reference import penalised
from openm3.ops.triton import padded, refusal

LARGEST_VOCABULARY = 1 << 19
"""Sums of so many shares fit in 63 bits."""

UNIT = tl.constexpr(2.0**43)
"""The share of the likeliest token."""

LEAST, MOST_PIECES = 2048, 128
"""A piece of the vocabulary has at least so many tokens, a multiple if that made too many pieces. Not measured yet.

98 pieces of M3's vocabulary nearly fill a GPU for one request. The k-th best of the pieces' largest scores bounds the
candidates of top-k, which is why there are not fewer."""

NO_TOKEN = tl.constexpr(2147483647)
NO_RANK = tl.constexpr(0x7F800000 << 32)
"""That of the first token at infinite distance: candidates stand before it."""

LAST_RANK = tl.constexpr((0x7F800000 << 32) - 1)


def sample(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    (requests, vocabulary), device = logit_RV.shape, logit_RV.device
    id_R = torch.empty(requests, dtype=torch.int64, device=device)
    logprob_R = torch.empty(requests, dtype=torch.float32, device=device)
    if requests == 0:
        return id_R, logprob_R
    score_RV = logit_RV
    if any(len(row) for row in (*prompt_ids, *output_ids)):
        score_RV = penalised(logit_RV.float(), values, prompt_ids, output_ids)
    piece = max(LEAST, padded(triton.cdiv(vocabulary, MOST_PIECES)))
    pieces = triton.cdiv(vocabulary, piece)
    real = torch.empty((requests, 4, pieces), dtype=torch.float32, device=device)
    noisy = torch.empty((requests, pieces), dtype=torch.float64, device=device)
    # Limits may keep every token: candidates have room for all, twice that of float32 logits.
    share, rank = (torch.empty((requests, n), dtype=torch.int64, device=device) for n in (pieces, vocabulary))
    token = torch.empty((requests, 2, pieces), dtype=torch.int32, device=device)
    count_R = torch.empty(requests, dtype=torch.int32, device=device)
    settings = [values[name].contiguous() for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step")]
    sizes = {"vocabulary": vocabulary, "pieces": pieces, "PIECES": padded(pieces), "num_warps": 8}
    _survey[(pieces, requests)](
        *(score_RV, logit_RV, settings[0], settings[2], real, token, count_R, *score_RV.stride(), *logit_RV.stride()),
        **sizes,
        PENALISED=score_RV is not logit_RV,
        PIECE=piece,
    )
    _walk[(pieces, requests)](
        *(score_RV, *settings, real, noisy, token, share, rank, count_R, *score_RV.stride()), **sizes, PIECE=piece
    )
    _settle[(requests,)](
        *(logit_RV, *settings, real, noisy, token, share, rank, count_R, id_R, logprob_R, *logit_RV.stride()),
        **sizes,
        CANDIDATES=2048,
    )
    return id_R, logprob_R


def supports_sample(
    logit_RV: Tensor,
    values: Mapping[str, Tensor],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> str | None:
    if reason := refusal(logit_RV):
        return reason
    vocabulary = logit_RV.shape[1]
    if vocabulary > LARGEST_VOCABULARY:
        return f"takes vocabularies of up to {LARGEST_VOCABULARY} tokens, not {vocabulary}"
    return None


@triton.jit(do_not_specialize=["pieces"])
def _survey(
    p_score,
    p_logit,
    p_temperature,
    p_top_p,
    p_real,
    p_token,
    p_count,
    stride_sr,
    stride_sv,
    stride_lr,
    stride_lv,
    vocabulary,
    pieces,
    PIECES: tl.constexpr,
    PENALISED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Of a piece: the largest score and its first token, the largest logit, and sums relative to these two."""
    i_piece, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_token = i_piece * PIECE + tl.arange(0, PIECE)
    b_inside = b_token < vocabulary
    b_score = tl.load(p_score + r * stride_sr + b_token * stride_sv, mask=b_inside, other=float("-inf")).to(tl.float32)
    b_logit = b_score
    if PENALISED:
        b_p_logit = p_logit + r * stride_lr + b_token * stride_lv
        b_logit = tl.load(b_p_logit, mask=b_inside, other=float("-inf")).to(tl.float32)
    score = tl.max(b_score)
    # Maxima pass over NaN: it is made to count as the infinity that is reported too.
    logit = tl.max(tl.where(b_logit == b_logit, b_logit, float("inf")))
    p_place = p_real + 4 * r * pieces + i_piece
    tl.store(p_place, score)
    tl.store(p_place + pieces, logit)
    base = tl.where(logit == float("-inf"), 0.0, logit)
    tl.store(p_place + 2 * pieces, tl.sum(tl.exp(b_logit - base)))
    tl.store(p_token + 2 * r * pieces + i_piece, tl.min(tl.where(b_score == score, b_token, NO_TOKEN)))
    temperature = tl.load(p_temperature + r)
    if (temperature > 0.0) & (tl.load(p_top_p + r) < 1.0):
        base = tl.where(score == float("-inf"), 0.0, score)
        tl.store(p_place + 3 * pieces, tl.sum(tl.exp((b_score - base) / temperature)))
    if i_piece == 0:
        tl.store(p_count + r, 0)


@triton.jit(do_not_specialize=["pieces"])
def _walk(
    p_score,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_seed,
    p_step,
    p_real,
    p_noisy,
    p_token,
    p_share,
    p_rank,
    p_count,
    stride_sr,
    stride_sv,
    vocabulary,
    pieces,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Of a piece: the largest sum with noise and its token; or, where limits are set, its candidates and its share."""
    i_piece, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(p_temperature + r)
    if temperature == 0.0:
        return
    place = r * pieces + i_piece
    b_best = _of_pieces(p_real, 0, r, pieces, PIECES)
    largest = tl.max(b_best)
    b_token = i_piece * PIECE + tl.arange(0, PIECE)
    b_inside = b_token < vocabulary
    b_score = tl.load(p_score + r * stride_sr + b_token * stride_sv, mask=b_inside, other=float("-inf")).to(tl.float32)
    b_distance = _distance(b_score, largest, temperature)
    top_k, top_p = tl.load(p_top_k + r), tl.load(p_top_p + r)
    counted = (top_k > 0) & (top_k < vocabulary)
    if counted | (top_p < 1.0):
        reach = tl.cast(float("inf"), tl.float32)
        if counted:
            if top_k <= pieces:
                # So many pieces have a score as large as the k-th best of theirs.
                b_better = tl.zeros((PIECES,), tl.int32)
                for first_piece in range(0, pieces, 8):
                    b_piece = first_piece + tl.arange(0, 8)
                    b_other = tl.load(p_real + 4 * r * pieces + b_piece, mask=b_piece < pieces, other=float("-inf"))
                    b_better += tl.sum((b_other[None, :] > b_best[:, None]).to(tl.int32), 1)
                least = tl.min(tl.where(b_better < top_k, b_best, float("inf")))
                reach = tl.max(_distance(tl.zeros((PIECES,), tl.float32) + least, largest, temperature))
        else:
            # Tokens of shares below (1 - top_p) / vocabulary hold less than 1 - top_p together; 1% is for rounding.
            b_sum = _of_pieces(p_real, 3, r, pieces, PIECES)
            total = tl.sum(tl.where(b_best == float("-inf"), 0.0, b_sum * tl.exp((b_best - largest) / temperature)))
            reach = tl.log(vocabulary / ((1.0 - top_p) * total)) + 0.01
        b_chosen = (b_distance <= reach) & (b_distance < float("inf"))
        b_one = b_chosen.to(tl.int32)
        first = tl.atomic_add(p_count + r, tl.sum(b_one))
        b_rank = (b_distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_token.to(tl.int64)
        # Candidates may stand in any order.
        tl.store(p_rank + r * vocabulary + first + tl.cumsum(b_one, 0) - 1, b_rank, mask=b_chosen)
        tl.store(p_share + place, tl.sum(_share(b_distance)))
    else:
        b_kept = (tl.exp(-b_distance) >= tl.load(p_min_p + r)) & (b_distance < float("inf"))
        b_drawn = _drawn(b_distance, b_kept, tl.load(p_seed + r), tl.load(p_step + r), b_token)
        drawn = tl.max(b_drawn)
        tl.store(p_noisy + place, drawn)
        tl.store(p_token + 2 * r * pieces + pieces + i_piece, tl.min(tl.where(b_drawn == drawn, b_token, NO_TOKEN)))


@triton.jit(do_not_specialize=["pieces"])
def _settle(
    p_logit,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_seed,
    p_step,
    p_real,
    p_noisy,
    p_token,
    p_share,
    p_rank,
    p_count,
    p_id,
    p_logprob,
    stride_lr,
    stride_lv,
    vocabulary,
    pieces,
    PIECES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The token of a request, and its log-probability."""
    r = tl.program_id(0).to(tl.int64)
    b_piece = tl.arange(0, PIECES)
    b_top = _of_pieces(p_real, 1, r, pieces, PIECES)
    top = tl.max(b_top)
    if (top == float("inf")) | (top == float("-inf")):
        tl.store(p_id + r, -1)
        tl.store(p_logprob + r, float("nan"))
        return
    temperature, top_k, top_p = tl.load(p_temperature + r), tl.load(p_top_k + r), tl.load(p_top_p + r)
    counted = (top_k > 0) & (top_k < vocabulary)
    p_token += 2 * r * pieces + b_piece
    if temperature == 0.0:
        b_best = _of_pieces(p_real, 0, r, pieces, PIECES)
        b_token = tl.load(p_token, mask=b_piece < pieces, other=NO_TOKEN)
        token = tl.min(tl.where(b_best == tl.max(b_best), b_token, NO_TOKEN))
    elif counted | (top_p < 1.0):
        p_rank += r * vocabulary
        count = tl.load(p_count + r)
        bound = tl.cast(LAST_RANK, tl.int64)
        if counted:
            bound = _boundary(p_rank, count, top_k, False, CANDIDATES)
        if top_p < 1.0:
            if counted:
                total = _total(p_rank, count, bound, CANDIDATES)
            else:
                total = tl.sum(tl.load(p_share + r * pieces + b_piece, mask=b_piece < pieces, other=0))
            wanted = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            bound = tl.minimum(bound, _boundary(p_rank, count, tl.maximum(wanted, 1), True, CANDIDATES))
        token = _draw(p_rank, count, bound, tl.load(p_min_p + r), tl.load(p_seed + r), tl.load(p_step + r), CANDIDATES)
    else:
        b_drawn = tl.load(p_noisy + r * pieces + b_piece, mask=b_piece < pieces, other=float("-inf"))
        b_token = tl.load(p_token + pieces, mask=b_piece < pieces, other=NO_TOKEN)
        token = tl.min(tl.where(b_drawn == tl.max(b_drawn), b_token, NO_TOKEN))
    total_exp = tl.sum(_of_pieces(p_real, 2, r, pieces, PIECES) * tl.exp(b_top - top))
    logit = tl.load(p_logit + r * stride_lr + token * stride_lv).to(tl.float32)
    tl.store(p_id + r, token)
    tl.store(p_logprob + r, logit - top - tl.log(total_exp))


@triton.jit
def _of_pieces(p_real, KIND: tl.constexpr, r, pieces, PIECES: tl.constexpr):
    """What the survey found: largest scores (0), largest logits (1), and the sums relative to these (3, 2)."""
    b_piece = tl.arange(0, PIECES)
    nothing = float("-inf") if KIND < 2 else 0.0
    return tl.load(p_real + (4 * r + KIND) * pieces + b_piece, mask=b_piece < pieces, other=nothing)


@triton.jit
def _distance(b_score, largest, temperature):
    """Rounded as PyTorch rounds it: equal numbers are equal there too. Zero has no sign."""
    return tl.div_rn(tl.abs(largest - b_score), temperature + tl.zeros_like(b_score))


@triton.jit
def _share(b_distance):
    return (tl.exp(-b_distance) * UNIT).to(tl.int64)


@triton.jit
def _unpacked(b_rank):
    """Distance and token."""
    return (b_rank >> 32).to(tl.int32).to(tl.float32, bitcast=True), b_rank.to(tl.int32)


@triton.jit
def _boundary(p_rank, count, wanted, BY_SHARE: tl.constexpr, CANDIDATES: tl.constexpr):
    """The smallest rank up to which there are so many candidates, or such a share; LAST_RANK if there is none.

    Bisection, in which bounds move on to the next candidate: a few more steps than the logarithm of their number.
    """
    low, high = tl.cast(0, tl.int64), tl.cast(LAST_RANK, tl.int64)
    while low < high:
        middle = low + ((high - low) >> 1)
        b_sum = tl.zeros((CANDIDATES,), tl.int64)
        b_below = tl.full((CANDIDATES,), -1, tl.int64)
        b_above = tl.full((CANDIDATES,), NO_RANK, tl.int64)
        for first in range(0, count, CANDIDATES):
            b_rank = _ranks(p_rank, first, count, CANDIDATES)
            b_in = b_rank <= middle
            if BY_SHARE:
                b_sum += tl.where(b_in, _share(_unpacked(b_rank)[0]), 0)
            else:
                b_sum += b_in.to(tl.int64)
            b_below = tl.where(b_in, tl.maximum(b_below, b_rank), b_below)
            b_above = tl.where(b_in, b_above, tl.minimum(b_above, b_rank))
        if tl.sum(b_sum) >= wanted:
            high = tl.max(b_below)
        else:
            low = tl.min(b_above)
    return high


@triton.jit
def _total(p_rank, count, bound, CANDIDATES: tl.constexpr):
    b_sum = tl.zeros((CANDIDATES,), tl.int64)
    for first in range(0, count, CANDIDATES):
        b_rank = _ranks(p_rank, first, count, CANDIDATES)
        b_sum += tl.where(b_rank <= bound, _share(_unpacked(b_rank)[0]), 0)
    return tl.sum(b_sum)


@triton.jit
def _draw(p_rank, count, bound, min_p, seed, step, CANDIDATES: tl.constexpr):
    b_best = tl.full((CANDIDATES,), float("-inf"), tl.float64)
    b_best_token = tl.full((CANDIDATES,), NO_TOKEN, tl.int32)
    for first in range(0, count, CANDIDATES):
        b_rank = _ranks(p_rank, first, count, CANDIDATES)
        b_distance, b_token = _unpacked(b_rank)
        b_kept = (b_rank <= bound) & (tl.exp(-b_distance) >= min_p)
        b_drawn = _drawn(b_distance, b_kept, seed, step, b_token)
        b_better = (b_drawn > b_best) | ((b_drawn == b_best) & (b_token < b_best_token))
        b_best = tl.where(b_better, b_drawn, b_best)
        b_best_token = tl.where(b_better, b_token, b_best_token)
    return tl.min(tl.where(b_best == tl.max(b_best), b_best_token, NO_TOKEN))


@triton.jit
def _ranks(p_rank, first, count, CANDIDATES: tl.constexpr):
    b_place = first + tl.arange(0, CANDIDATES)
    return tl.load(p_rank + b_place, mask=b_place < count, other=NO_RANK)


@triton.jit
def _drawn(b_distance, b_kept, seed, step, b_token):
    """Gumbel noise less the distance, -inf for tokens that are not kept: `gumbel` of the reference."""
    key = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + step.to(tl.uint64, bitcast=True))
    b_bits = _mix(key + (b_token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 12
    b_uniform = (b_bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    b_noise = -tl.log(-tl.log(b_uniform))
    return tl.where(b_kept, b_noise - b_distance.to(tl.float64), float("-inf"))


@triton.jit
def _mix(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
