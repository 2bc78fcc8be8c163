"""Experts, routing and their activation in native code. Source: cpu.cpp beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops import native
from openm3.ops.linear.native import refusal, stored
from openm3.ops.linear.quantised import Weight


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    *shape, width = gate_up.shape
    if len(shape) != 1:
        return swiglu(gate_up.reshape(-1, width), alpha, limit).view(*shape, width // 2)
    out = torch.empty((*shape, width // 2), dtype=gate_up.dtype)
    native.loaded().swiglu(native.dense(gate_up), alpha, limit, out, native.threads())
    return out


def route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    expert_TA = torch.empty((x_TD.shape[0], num_active), dtype=torch.int32)
    weight_TA = torch.empty((x_TD.shape[0], num_active), dtype=torch.float32)
    native.loaded().route(
        native.dense(x_TD), native.dense(router_ED), native.dense(bias_E), expert_TA, weight_TA, native.threads()
    )
    return expert_TA, weight_TA


def experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    native.loaded().experts(
        native.dense(x_TD),
        native.table(expert_TA),
        weight_TA.detach().float().contiguous(),
        *stored(gate_up_E2FD),
        *stored(down_EDF),
        alpha,
        limit,
        out_TD,
        native.threads(),
    )
    return out_TD


def supports_swiglu(gate_up: Tensor, alpha: float, limit: float) -> str | None:
    return native.refusal(gate_up)


def supports_route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> str | None:
    reason = native.refusal(x_TD, router_ED, bias_E)
    if reason is None and not router_ED.dtype == bias_E.dtype == torch.float32:
        return "routes in float32"
    return reason


def supports(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    alpha: float,
    limit: float,
) -> str | None:
    return refusal((gate_up_E2FD, down_EDF), x_TD, weight_TA)
