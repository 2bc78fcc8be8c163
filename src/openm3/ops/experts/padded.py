"""Routed experts as three batched products over equal, padded shares of the tokens: what training runs.

Shapes change little from step to step (shares are padded to multiples of 64), so that a library which prepares a kernel
for each shape does so once. Opt-in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops.linear.quantised import QuantisedWeight, Weight

PAD = 64


def experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    from openm3.ops.experts import swiglu

    if x_TD.shape[0] == 0:
        return torch.zeros_like(x_TD)
    num_experts, num_active = gate_up_E2FD.shape[0], expert_TA.shape[1]
    flat = expert_TA.reshape(-1).long()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts)
    share = -(-int(counts.max()) // PAD) * PAD
    offset = torch.arange(flat.shape[0]) - (counts.cumsum(0) - counts)[flat[order]]
    place = flat[order] * share + offset
    slot = torch.empty_like(place).index_copy(0, order, place)
    token = torch.zeros(num_experts * share, dtype=torch.long).index_copy(0, place, order // num_active)
    part_ECD = x_TD.index_select(0, token).view(num_experts, share, -1)
    hidden_ECF = swiglu(part_ECD @ gate_up_E2FD.mT, alpha=alpha, limit=limit)
    out_SD = (hidden_ECF @ down_EDF.mT).flatten(0, 1)
    chosen_TAD = out_SD.index_select(0, slot).view(*expert_TA.shape, -1)
    return (chosen_TAD * weight_TA[..., None]).sum(1).to(x_TD.dtype)


def supports(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, gate_up_E2FD: Weight, *_rest: object) -> str | None:
    if x_TD.device.type != "cpu":
        return f"needs CPU tensors, not {x_TD.device.type}"
    if x_TD.dtype != torch.float32:
        return f"multiplies in the dtype of x: float32 only, not {str(x_TD.dtype).removeprefix('torch.')}"
    if isinstance(gate_up_E2FD, QuantisedWeight):
        return "multiplies weights as they are, not quantised ones"
    return None
