"""Routed experts, as defined: each expert in turn, over the tokens that chose it. Float32 or float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.ops.linear.quantised import Weight, at, dequantise


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1.0) * gate * torch.sigmoid(alpha * gate)).to(gate_up.dtype)


def route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    score_TE = torch.sigmoid(x_TD.to(router_ED.dtype) @ router_ED.T)
    order_TE = torch.sort(score_TE.detach() + bias_E, dim=-1, descending=True, stable=True).indices
    expert_TA = order_TE[:, :num_active]
    weight_TA = score_TE.gather(1, expert_TA)
    return expert_TA.to(torch.int32), weight_TA / weight_TA.sum(-1, keepdim=True)


def experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
) -> Tensor:
    num_active, wide = expert_TA.shape[1], _wide(x_TD)
    flat = expert_TA.reshape(-1).long()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=gate_up_E2FD.shape[0]).tolist()
    token = order // num_active
    parts = x_TD[token].to(wide).split(counts)
    outs = [
        F.linear(swiglu(F.linear(part, _of(e, gate_up_E2FD, wide)), alpha, limit), _of(e, down_EDF, wide))
        for e, part in enumerate(parts)
        if part.shape[0] > 0
    ]
    if not outs:
        return torch.zeros_like(x_TD)
    weighted = torch.cat(outs) * weight_TA.reshape(-1)[order][:, None].to(wide)
    return torch.zeros_like(x_TD, dtype=wide).index_add(0, token, weighted).to(x_TD.dtype)


def _of(expert: int, weight: Weight, dtype: torch.dtype) -> Tensor:
    return dequantise(at(weight, expert)).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
