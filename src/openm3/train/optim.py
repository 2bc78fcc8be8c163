"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024) replaces a matrix's momentum by its nearest semi-orthogonal matrix, found by a Newton-Schulz
iteration: every direction of the update has the same size, which small models on few tokens profit from most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """About the nearest semi-orthogonal matrix of the last two axes, times their larger-side scale."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    scale = math.sqrt(max(1.0, matrix.shape[-2] / matrix.shape[-1]))
    scaled: Tensor = x.to(matrix.dtype) * scale
    return scaled


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices, stacks of them (three axes) and convolutions (taken as matrices)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not supported.

        Workers of `torch.distributed` that hold the same weights and gradients each orthogonalise their part of the
        matrices: that takes as long as a good part of a step.
        """
        assert closure is None
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = []
            for i, p in enumerate(params):
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                if i % workers != rank:
                    updates.append(torch.zeros_like(p))
                    continue
                moved = p.grad.lerp(momentum, group["momentum"])
                matrix = moved.flatten(1) if moved.ndim > 3 else moved
                updates.append(orthogonalised(matrix, dtype=self.dtype).view_as(p))
            if workers > 1:
                updates = _sums(updates)
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


def _sums(parts: list[Tensor]) -> list[Tensor]:
    """The sums over all workers, in one transfer."""
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    sizes = [part.numel() for part in parts]
    return [own.view_as(part) for own, part in zip(flat.split(sizes), parts, strict=True)]
