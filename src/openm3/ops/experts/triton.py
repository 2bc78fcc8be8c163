"""The experts in Triton: their layers as products of rows gathered on the device. Routing is in `triton_route`.

Pairs of a token and one of its experts are put in the order of their experts; a tile is some neighbouring pairs of one
expert. How many tiles there are follows from the number of pairs, whatever they are; which expert a tile belongs to,
programs find by themselves. Each pair's output is written and a token's are added up in the order of `expert_TA`: no
number depends on which program is first. A pair with an expert that does not exist adds nothing.

Products are in the wider dtype of tokens and weights, in which the activations between the two layers are kept too.
Sums are float32. How they are grouped depends on how many tokens there are, not on which.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.experts.triton_route import WORKSPACE, piece, too_many
from openm3.ops.experts.triton_route import route as route
from openm3.ops.experts.triton_route import supports_route as supports_route
from openm3.ops.linear.quantised import QuantisedWeight, Weight
from openm3.ops.triton import Machine, machine, padded, refusal

LEAST_INPUTS = 32
"""Codes are multiplied as they are, and then by their scale: a product adds up no fewer inputs."""


@dataclass(frozen=True)
class Tiles:
    """A program multiplies `rows` pairs by `columns` rows of a weight, `depth` numbers of each at a time.

    `group` neighbouring tiles meet the same columns before the next ones, as their weights may be the same.
    """

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int


def choose_tiles(num_pairs: int, num_experts: int, itemsize: int, codes: bool, machine: Machine) -> Tiles:
    """Tiles twice as high as an expert has pairs on average. Not measured yet.

    Up to 160 pairs an expert, reading weights takes longer than multiplying: few pairs get small tiles, of which five
    fit on a multiprocessor of Hopper with 40 KiB each on their way. From 64 rows on warpgroups multiply; 128 x 256 are
    the most whose sums fit in registers. Products with codes need room for those of one scale beside all of them, and
    come in smaller steps. Float32 runs on no tensor cores, and larger tiles take the compiler minutes.
    """
    rows = min(128, padded(2 * -(-num_pairs // num_experts), least=16))
    if itemsize == 4:
        return Tiles(min(rows, 32), 32, 32, 8, 4, 2)
    if rows < 64:
        return Tiles(rows, 64, 128, 8, 4, 6 if codes else 3)
    # GPUs of less shared memory have no products of warpgroups, and spill such sums.
    columns = rows if codes or machine.shared_bytes < 200 << 10 else 2 * rows
    stages = (machine.shared_bytes - (8 << 10)) // ((rows + columns) * 64 * itemsize)
    return Tiles(rows, columns, 64, 8, rows // 16, min(max(stages, 1), 4))


def experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
) -> Tensor:
    (num_tokens, num_active), inner = expert_TA.shape, down_EDF.shape[2]
    if x_TD.numel() == 0 or num_active * inner == 0:
        return torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    floats = [x for x in (x_TD, gate_up_E2FD, down_EDF) if isinstance(x, Tensor)]
    dtype = reduce(torch.promote_types, (x.dtype for x in floats))
    step = max(1, WORKSPACE // (num_active * max(inner * dtype.itemsize, 1024)))
    for first in range(0, num_tokens, step):
        part = slice(first, first + step)
        _add_experts(
            *(x_TD[part], expert_TA[part].contiguous(), weight_TA[part].contiguous(), gate_up_E2FD, down_EDF),
            *(alpha, limit, dtype, out_TD[part]),
        )
    return out_TD


def _add_experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
    dtype: torch.dtype,
    out_TD: Tensor,
) -> None:
    (num_tokens, num_active), (num_experts, width, inner) = expert_TA.shape, down_EDF.shape
    num_pairs, device = num_tokens * num_active, x_TD.device
    pair = torch.empty(num_pairs, dtype=torch.int32, device=device)
    start_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    _group_pairs[(num_experts,)](
        expert_TA, pair, start_E1, num_pairs, CHUNK=min(2048, padded(num_pairs, 256)), num_warps=8
    )

    codes = any(isinstance(weight, QuantisedWeight) for weight in (gate_up_E2FD, down_EDF))
    tiles = choose_tiles(num_pairs, num_experts, dtype.itemsize, codes, machine(device))
    num_tiles = num_pairs // tiles.rows + min(num_experts, num_pairs)
    shape = {"A": num_active, "D": width, "F": inner, "E": num_experts, "EXPERTS": padded(num_experts)}
    shape |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "GROUP": tiles.group}
    shape |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    hidden = torch.empty((num_pairs, inner), dtype=dtype, device=device)
    _gate_up[(num_tiles * triton.cdiv(2 * inner, tiles.columns),)](
        *(x_TD, *_parts(gate_up_E2FD), pair, start_E1, hidden, alpha, limit, num_tiles),
        *(stride for x in (x_TD, *_parts(gate_up_E2FD)) for stride in x.stride()),
        **shape,
        **_steps(gate_up_E2FD, tiles.depth),
    )
    step = min(width, max(tiles.columns, WORKSPACE // (num_pairs * 4) // tiles.columns * tiles.columns))
    out = torch.empty((num_pairs, step), dtype=torch.float32, device=device)
    for first in range(0, width, step):
        last = min(first + step, width)
        _down[(num_tiles * triton.cdiv(last - first, tiles.columns),)](
            *(hidden, *_parts(down_EDF), pair, start_E1, out, num_tiles, first, last, step),
            *(stride for x in _parts(down_EDF) for stride in x.stride()),
            **shape,
            **_steps(down_EDF, tiles.depth),
        )
        columns = min(1024, padded(last - first))
        _add_up[(num_tokens, triton.cdiv(last - first, columns))](
            *(out, expert_TA, weight_TA, out_TD, first, last, step),
            A=num_active,
            D=width,
            E=num_experts,
            COLUMNS=columns,
            num_warps=4,
        )


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    inner = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        rows, columns = gate_up.reshape(-1, 2 * inner), min(1024, padded(inner))
        _swiglu_rows[(rows.shape[0], triton.cdiv(inner, columns))](
            rows, out, alpha, limit, *rows.stride(), F=inner, COLUMNS=columns, num_warps=4
        )
    return out


def supports_experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
) -> str | None:
    weights = gate_up_E2FD, down_EDF
    if reason := refusal(x_TD, weight_TA, *[_parts(weight)[1] for weight in weights]):
        return reason
    if bad := next((n for n in map(_inputs, weights) if n % LEAST_INPUTS), None):
        return f"needs multiples of {LEAST_INPUTS} inputs a scale, not {bad}"
    stored = [_parts(weight)[0] for weight in weights]
    if any((x.shape[1] - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) >= 1 << 31 for x in stored):
        return "needs the weights of an expert within 2^31 numbers of each other"
    return too_many(down_EDF.shape[0])


def supports_swiglu(gate_up: Tensor, alpha: float, limit: float) -> str | None:
    return refusal(gate_up)


def _parts(weight: Weight) -> tuple[Tensor, Tensor]:
    """Codes and their scales; of a weight without, twice the weight."""
    return (weight.code, weight.scale) if isinstance(weight, QuantisedWeight) else (weight, weight)


def _inputs(weight: Weight) -> int:
    """How many inputs share a scale, 0 without scales. One scale a row holds for any number of them."""
    if not isinstance(weight, QuantisedWeight):
        return 0
    groups = weight.scale.shape[-1]
    return weight.shape[-1] // groups if groups > 1 else padded(weight.shape[-1], least=LEAST_INPUTS)


def _steps(weight: Weight, depth: int) -> dict[str, int]:
    """Inputs a scale, and as many inputs at a time as a tile has, or as the power of two that divides these."""
    inputs = _inputs(weight)
    return {"INPUTS": inputs, "DEPTH": min(depth, inputs & -inputs or depth)}


@triton.jit
def _swiglu(b_gate, b_up, alpha, limit):
    # Comparisons, unlike minima, let NaN through.
    b_gate = tl.where(b_gate > limit, limit, b_gate)
    b_up = tl.where(b_up > limit, limit, tl.where(b_up < -limit, -limit, b_up))
    return tl.div_rn((b_up + 1.0) * b_gate, 1.0 + tl.exp(-alpha * b_gate))


@triton.jit
def _swiglu_rows(p_gate_up, p_out, alpha, limit, stride_row, stride_column, F: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_inside = b_column < F
    b_p_gate = p_gate_up + row * stride_row + b_column * stride_column
    b_gate = tl.load(b_p_gate, mask=b_inside).to(tl.float32)
    b_up = tl.load(b_p_gate + F * stride_column, mask=b_inside).to(tl.float32)
    tl.store(p_out + row * F + b_column, _swiglu(b_gate, b_up, alpha, limit), mask=b_inside)


@triton.jit(do_not_specialize=["num_pairs"])
def _group_pairs(p_expert, p_pair, p_start, num_pairs, CHUNK: tl.constexpr):
    """The pairs of one expert in their order, behind those of the experts before it; and where they start."""
    expert = tl.program_id(0)
    b_pair = tl.arange(0, CHUNK)
    b_before = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, num_pairs, CHUNK):
        b_expert = tl.load(p_expert + first + b_pair, mask=first + b_pair < num_pairs, other=-1)
        b_before += ((b_expert >= 0) & (b_expert < expert)).to(tl.int32)
    place = tl.sum(b_before)
    tl.store(p_start + expert, place)
    for first in range(0, num_pairs, CHUNK):
        b_expert = tl.load(p_expert + first + b_pair, mask=first + b_pair < num_pairs, other=-1)
        b_own = (b_expert == expert).to(tl.int32)
        tl.store(p_pair + place + tl.cumsum(b_own, 0) - 1, first + b_pair, mask=b_own != 0)
        place += tl.sum(b_own)
    if expert == tl.num_programs(0) - 1:
        tl.store(p_start + expert + 1, place)


@triton.jit
def _place(p_start, num_tiles, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """A program's expert, its bounds among the sorted pairs (equal where there is nothing to do), and its columns."""
    num_columns = tl.num_programs(0) // num_tiles
    i_group = tl.program_id(0) // (GROUP * num_columns)
    i_inside = tl.program_id(0) % (GROUP * num_columns)
    size = tl.minimum(num_tiles - i_group * GROUP, GROUP)
    i_tile, i_column = i_group * GROUP + i_inside % size, i_inside // size
    b_expert = tl.arange(0, EXPERTS)
    b_start = tl.load(p_start + b_expert, mask=b_expert < E, other=0)
    b_stop = tl.load(p_start + b_expert + 1, mask=b_expert < E, other=0)
    b_tiles = tl.cdiv(b_stop - b_start, ROWS)
    b_done = tl.cumsum(b_tiles, 0) <= i_tile
    expert = tl.sum(b_done.to(tl.int32))
    i_tile -= tl.sum(tl.where(b_done, b_tiles, 0))
    first = tl.load(p_start + tl.minimum(expert, E)) + i_tile * ROWS
    last = tl.minimum(first + ROWS, tl.load(p_start + tl.minimum(expert + 1, E)))
    return expert, first, tl.maximum(first, last), i_column


@triton.jit(do_not_specialize=["num_tiles"])
def _gate_up(
    p_x,
    p_weight,
    p_scale,
    p_pair,
    p_start,
    p_hidden,
    alpha,
    limit,
    num_tiles,
    stride_xt,
    stride_xd,
    stride_we,
    stride_wo,
    stride_wd,
    stride_se,
    stride_so,
    stride_sg,
    A: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Half of the columns are of the gate, half are the same ones of up."""
    expert, first, last, i_column = _place(p_start, num_tiles, E, EXPERTS, ROWS, GROUP)
    if first == last:
        return
    DTYPE: tl.constexpr = p_hidden.dtype.element_ty
    b_row, b_depth = first + tl.arange(0, ROWS), tl.arange(0, DEPTH)[None, :]
    b_column = i_column * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    # What stands behind the last row or column is some other one, and is not stored.
    b_token = tl.load(p_pair + tl.minimum(b_row, last - 1)) // A
    b_p_x = p_x + b_token.to(tl.int64)[:, None] * stride_xt + b_depth * stride_xd
    b_output = tl.minimum(b_column, F - 1)
    b_p_gate = p_weight + expert.to(tl.int64) * stride_we + b_output[:, None] * stride_wo + b_depth * stride_wd
    b_p_scale = p_scale + expert.to(tl.int64) * stride_se + b_output * stride_so
    b_gate, b_up = _products(
        *(b_p_x, stride_xd, b_p_gate, b_p_gate + F * stride_wo, stride_wd),
        *(b_p_scale, b_p_scale + F * stride_so, stride_sg),
        *(b_depth, D, ROWS, COLUMNS // 2, DEPTH, INPUTS, DTYPE),
    )
    b_p_hidden = p_hidden + b_row[:, None] * F + b_column[None, :]
    b_inside = (b_row < last)[:, None] & (b_column < F)[None, :]
    tl.store(b_p_hidden, _swiglu(b_gate, b_up, alpha, limit).to(DTYPE), mask=b_inside)


@triton.jit(do_not_specialize=["num_tiles"])
def _down(
    p_hidden,
    p_weight,
    p_scale,
    p_pair,
    p_start,
    p_out,
    num_tiles,
    first_column,
    last_column,
    stride_out,
    stride_we,
    stride_wo,
    stride_wd,
    stride_se,
    stride_so,
    stride_sg,
    A: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, first, last, i_column = _place(p_start, num_tiles, E, EXPERTS, ROWS, GROUP)
    if first == last:
        return
    DTYPE: tl.constexpr = p_hidden.dtype.element_ty
    b_row, b_depth = first + tl.arange(0, ROWS), tl.arange(0, DEPTH)[None, :]
    HALF: tl.constexpr = COLUMNS // 2
    b_place = i_column * COLUMNS + tl.arange(0, HALF)
    b_column = first_column + b_place
    b_p_hidden = p_hidden + tl.minimum(b_row, last - 1)[:, None] * F + b_depth
    b_output, b_other = tl.minimum(b_column, D - 1), tl.minimum(b_column + HALF, D - 1)
    b_p_weight = p_weight + expert.to(tl.int64) * stride_we + b_depth * stride_wd
    p_scale += expert.to(tl.int64) * stride_se
    b_left, b_right = _products(
        *(b_p_hidden, 1, b_p_weight + b_output[:, None] * stride_wo, b_p_weight + b_other[:, None] * stride_wo),
        *(stride_wd, p_scale + b_output * stride_so, p_scale + b_other * stride_so, stride_sg),
        *(b_depth, F, ROWS, HALF, DEPTH, INPUTS, DTYPE),
    )
    b_pair = tl.load(p_pair + tl.minimum(b_row, last - 1))
    b_p_out = p_out + b_pair[:, None] * stride_out + b_place[None, :]
    b_inside = (b_row < last)[:, None]
    tl.store(b_p_out, b_left, mask=b_inside & (b_column < last_column)[None, :])
    tl.store(b_p_out + HALF, b_right, mask=b_inside & (b_column + HALF < last_column)[None, :])


@triton.jit
def _products(
    b_p_x,
    stride_x,
    b_p_left,
    b_p_right,
    stride_weight,
    b_p_left_scale,
    b_p_right_scale,
    stride_scale,
    b_depth,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    INPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The same rows times two parts of a weight, where INPUTS numbers share a scale, if not 0."""
    b_left = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_right = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, WIDTH, DEPTH):
        b_x = piece(b_p_x, depth, stride_x, b_depth, WIDTH, DEPTH).to(DTYPE)
        b_weight = piece(b_p_left, depth, stride_weight, b_depth, WIDTH, DEPTH).to(DTYPE)
        b_left = _added(b_left, b_x, b_weight, b_p_left_scale, stride_scale, depth, INPUTS)
        b_weight = piece(b_p_right, depth, stride_weight, b_depth, WIDTH, DEPTH).to(DTYPE)
        b_right = _added(b_right, b_x, b_weight, b_p_right_scale, stride_scale, depth, INPUTS)
    return b_left, b_right


@triton.jit
def _added(b_sum, b_x, b_weight, b_p_scale, stride_scale, depth, INPUTS: tl.constexpr):
    if INPUTS == 0:
        return tl.dot(b_x, tl.trans(b_weight), b_sum, input_precision="ieee")
    b_scale = tl.load(b_p_scale + depth // INPUTS * stride_scale)[None, :]
    return b_sum + tl.dot(b_x, tl.trans(b_weight), input_precision="ieee") * b_scale


@triton.jit
def _add_up(
    p_pair_out,
    p_expert,
    p_weight,
    p_out,
    first_column,
    last_column,
    stride_out,
    A: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_inside = b_column < last_column - first_column
    b_sum = tl.zeros((COLUMNS,), tl.float32)
    for a in tl.static_range(A):
        expert = tl.load(p_expert + token * A + a)
        exists = (expert >= 0) & (expert < E)
        weight = tl.where(exists, tl.load(p_weight + token * A + a).to(tl.float32), 0.0)
        b_out = tl.load(p_pair_out + (token * A + a) * stride_out + b_column, mask=b_inside & exists, other=0.0)
        b_sum += weight * b_out
    tl.store(p_out + token * D + first_column + b_column, b_sum, mask=b_inside)
