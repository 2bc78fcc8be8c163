"""The feed-forward half of a layer: one SwiGLU, or a few of many experts beside a shared one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm3.config import ModelConfig
from openm3.model.linear import Linear, joined
from openm3.ops.experts import mixture, swiglu
from openm3.ops.linear import Weight


class Mlp(nn.Module):
    """Clamped SwiGLU; `gate_up` holds the gate's rows first."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up = Linear(config.hidden_size, 2 * width)
        self.down = Linear(width, config.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        c = self.config
        out_TD: Tensor = self.down(swiglu(self.gate_up(x_TD), alpha=c.swiglu_alpha, limit=c.swiglu_limit))
        return out_TD


class Router(nn.Module):
    """Router weight and correction bias: float32 in every model, whatever the other weights are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.bias: Tensor


class Experts(nn.Module):
    """The routed experts' weights, stacked; gate rows first. They may be quantised, as those of `Linear`."""

    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.gate_up = nn.Parameter(torch.zeros(c.num_experts, 2 * c.expert_size, c.hidden_size))
        self.down = nn.Parameter(torch.zeros(c.num_experts, c.hidden_size, c.expert_size))
        self.register_buffer("gate_up_scale", None)
        self.register_buffer("down_scale", None)

    def weights(self) -> tuple[Weight, Weight]:
        """`gate_up` [E, 2F, D] and `down` [E, D, F]."""
        return joined(self.gate_up, self.gate_up_scale), joined(self.down, self.down_scale)


class Moe(nn.Module):
    """Routed experts, scaled, plus the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = Mlp(config, config.shared_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        c, router, shared = self.config, self.router, self.shared
        return mixture(
            x_TD,
            (router.weight, router.bias),
            c.num_active,
            self.experts.weights(),
            (shared.gate_up.stored(), shared.down.stored()),
            scale=c.routed_scale,
            alpha=c.swiglu_alpha,
            limit=c.swiglu_limit,
        )
