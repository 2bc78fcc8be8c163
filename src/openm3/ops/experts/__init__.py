"""The mixture of experts: choose A of E a token, run them as clamped SwiGLU MLPs, add up their weighted outputs.

`route(x_TD, router_ED, bias_E, num_active)` gives `expert_TA` (int32) and `weight_TA`: the A experts with the largest
`sigmoid(x . router) + bias` (equal values: the smaller expert first), weighted by their sigmoid without the bias,
normalised to sum 1. Router maths are in the router's dtype, float32 in every M3 model; the rest is in float32 whatever
the inputs (float64 for float64), with the result in the dtype of x.

`experts(x_TD, expert_TA, weight_TA, gate_up_E2FD, down_EDF, alpha=, limit=)` returns the weighted sum [T, D]. Either
weight may be a `QuantisedWeight` (ops/linear), which means what `dequantise` makes of it.

`swiglu(gate_up, alpha=, limit=)` is the activation: first half of the last axis the gate, second half up;
`(clamp(up) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`.

`mixture(x_TD, router, num_active, routed, shared, scale=, alpha=, limit=)` is all of it: the routed experts' sum times
`scale` plus the shared expert, which every token goes through. Its steps are the operators above and `linear`, in one
call where native code is the fastest for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops.dispatch import Implementation, Operator, always, compiled
from openm3.ops.experts import native, padded, reference
from openm3.ops.linear import Weight, linear
from openm3.ops.triton import implementation as in_triton

SWIGLU = Operator(
    "swiglu",
    (
        Implementation("native", native.supports_swiglu, native.swiglu),
        in_triton("experts", "swiglu"),
        Implementation("reference", always, reference.swiglu),
        compiled(reference.swiglu),
    ),
)
ROUTE = Operator(
    "route",
    (
        Implementation("native", native.supports_route, native.route),
        in_triton("experts", "route"),
        Implementation("reference", always, reference.route),
    ),
)
EXPERTS = Operator(
    "experts",
    (
        Implementation("native", native.supports, native.experts),
        in_triton("experts", "experts"),
        Implementation("reference", always, reference.experts),
        Implementation("compiled", padded.supports, padded.experts, opt_in=True),
    ),
)


def _by_parts(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor],
    num_active: int,
    routed: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    scale: float,
    alpha: float,
    limit: float,
) -> Tensor:
    routed_TD = experts(x_TD, *route(x_TD, *router, num_active), *routed, alpha=alpha, limit=limit)
    active_TF = swiglu(linear(x_TD, shared[0]), alpha=alpha, limit=limit)
    return torch.add(linear(active_TF, shared[1]), routed_TD, alpha=scale)


MIXTURE = Operator(
    "mixture",
    (
        Implementation("native", native.supports_mixture, native.mixture),
        Implementation("reference", always, _by_parts),
    ),
)
OPERATORS = (SWIGLU, ROUTE, EXPERTS, MIXTURE)


def swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """Clamped SwiGLU of `[..., 2F]` -> `[..., F]`."""
    out: Tensor = SWIGLU(gate_up, alpha, limit)
    return out


def route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights: `expert_TA` (int32), `weight_TA`."""
    if not 0 < num_active <= router_ED.shape[0]:
        raise ValueError(f"num_active must be between 1 and the {router_ED.shape[0]} experts, not {num_active}")
    chosen: tuple[Tensor, Tensor] = ROUTE(x_TD, router_ED, bias_E, num_active)
    return chosen


def experts(
    x_TD: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_E2FD: Weight,
    down_EDF: Weight,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """The weighted sum of each token's experts, [T, D]."""
    num_experts, width, inner = down_EDF.shape
    if x_TD.shape[1:] != (width,) or gate_up_E2FD.shape != (num_experts, 2 * inner, width):
        both = f"{list(x_TD.shape)} and {list(gate_up_E2FD.shape)}"
        raise ValueError(f"down {list(down_EDF.shape)} needs x [T, D] and gate_up [E, 2F, D] to match, not {both}")
    if expert_TA.shape != weight_TA.shape or expert_TA.shape[:1] != x_TD.shape[:1]:
        both = f"{list(expert_TA.shape)} and {list(weight_TA.shape)}"
        raise ValueError(f"expected experts and weights [{x_TD.shape[0]}, A], not {both}")
    out: Tensor = EXPERTS(x_TD, expert_TA, weight_TA, gate_up_E2FD, down_EDF, alpha, limit)
    return out


def mixture(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor],
    num_active: int,
    routed: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    *,
    scale: float,
    alpha: float,
    limit: float,
) -> Tensor:
    """Routed experts times `scale`, plus the shared expert, [T, D].

    `router` is its weight [E, D] and bias [E]; `routed` and `shared` are gate-up and down weights, of all the routed
    experts (as `experts` takes them) and of the shared one (as `linear` takes them).
    """
    out: Tensor = MIXTURE(x_TD, router, num_active, routed, shared, scale, alpha, limit)
    return out
