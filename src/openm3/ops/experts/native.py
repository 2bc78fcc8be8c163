"""Experts, routing and their activation in native code. Source: cpu.cpp beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops import native
from openm3.ops.linear.native import FEW_TOGETHER, parts, refusal
from openm3.ops.linear.native import supports as supports_linear
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
        *parts(gate_up_E2FD),
        *parts(down_EDF),
        alpha,
        limit,
        out_TD,
        native.threads(),
    )
    return out_TD


def mixture(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor],
    num_active: int,
    routed: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    scale: float,
    alpha: float,
    limit: float,
) -> Tensor:
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    weights = [part for weight in (*routed, *shared) for part in parts(weight)]
    router_ED, bias_E = router
    native.loaded().mixture(
        native.dense(x_TD),
        native.dense(router_ED),
        native.dense(bias_E),
        num_active,
        *weights,
        scale,
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
    return refusal(x_TD, gate_up_E2FD, down_EDF) or native.refusal(weight_TA)


def supports_mixture(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor],
    num_active: int,
    routed: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    scale: float,
    alpha: float,
    limit: float,
) -> str | None:
    reason = supports_route(x_TD, *router, num_active) or refusal(x_TD, *routed)
    # Of x only dtype and rows count, which the second layer's input shares.
    return reason or next(filter(None, (supports_linear(x_TD, weight, FEW_TOGETHER) for weight in shared)), None)
