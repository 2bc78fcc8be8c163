"""What this machine offers, and which implementation of each operator a typical call would run here, or why not."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from openm3.ops import attention, cache, experts, index, linear, native, norm, sample, triton
from openm3.ops.cases import ExpertCase, Packed, PackedCase, Routed, packed, routed

OPERATORS = (
    *norm.OPERATORS,
    *linear.OPERATORS,
    *index.OPERATORS,
    *attention.OPERATORS,
    *experts.OPERATORS,
    *cache.OPERATORS,
    *sample.OPERATORS,
)
"""Every operator, in the order that a token meets them."""

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def run(args: argparse.Namespace) -> int:
    """The `openm3 doctor` command: print the report, as JSON if `args.json`."""
    found = report()
    print(json.dumps(found) if args.json else render(found))
    return 0


def report() -> dict[str, Any]:
    """What the machine has, and `operators[operator][implementation][device]`: yes, opt-in, or a reason."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    calls = {device: typical_calls(torch.device(device), torch.float32) for device in devices}
    operators = {
        operator.name: {
            implementation.name: {
                device: implementation.supports(*calls[device][operator.name])
                or ("opt-in" if implementation.opt_in else "yes")
                for device in devices
            }
            for implementation in operator.implementations
        }
        for operator in OPERATORS
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": {
            "features": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "native": native.described(),
        "triton": triton.described(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "operators": operators,
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    cpu, operators = report["cpu"], report["operators"]
    lines = [
        f"Python    {report['python']}, PyTorch {report['torch']}",
        f"platform  {report['platform']}",
        f"CPU       {cpu['features']}, {cpu['threads']} of {cpu['cores']} cores in use",
        f"native    {report['native']}",
        f"Triton    {report['triton']}",
        f"CUDA      {', '.join(report['cuda']) or 'no device'}",
        "",
    ]
    rows = [
        (operator if first == 0 else "", implementation, device, answer)
        for operator, implementations in operators.items()
        for first, (implementation, devices) in enumerate(implementations.items())
        for device, answer in devices.items()
    ]
    table = [("operator", "implementation", "device", "runs"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for *cells, answer in table:
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), answer]))
    lines += ["", "The first yes of an operator runs; `with openm3.use(NAME):` forces another, opt-in ones included."]
    return "\n".join(lines)


def support_matrix() -> str:
    """Markdown: each operator's implementations by device and dtype, as if native code, Triton and a GPU were there."""
    with triton.elsewhere(triton.HOPPER):
        calls = {
            f"{name} {str(dtype).removeprefix('torch.')}": typical_calls(torch.device(device), dtype)
            for name, device in (("CPU", "cpu"), ("GPU", "meta"))
            for dtype in DTYPES
            if (device, dtype) != ("meta", torch.float64)
        }
        there = {None, native.missing(), triton.missing()}
        lines = [_row("operator", *calls, "opt-in"), _row(*["---"] * (len(calls) + 2))]
        for operator in OPERATORS:
            fixed = [i for i in operator.implementations if not i.opt_in]
            cells = [
                ", ".join(i.name for i in fixed if i.supports(*call[operator.name]) in there) for call in calls.values()
            ]
            lines.append(_row(operator.name, *cells, ", ".join(i.name for i in operator.implementations if i.opt_in)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def typical_calls(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for each operator, by its name: a decoding request beside a short prompt."""
    case = PackedCase(name="typical", num_tokens=(1, 130), lengths=(2500, 130))
    p = Packed(*(x.to(device) for x in packed(case, dtype=dtype)))
    e = Routed(*(x.to(device) for x in routed(ExpertCase(name="typical", num_tokens=131), dtype=dtype)))
    keys = (p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where)
    rope = norm.rotary_table(torch.arange(131, device=device), 8, 1e4)
    router_ED = torch.zeros(8, 16, device=device)
    weight_OD = torch.zeros(1024, 1024, dtype=dtype, device=device)
    pool, slot_T = cache.Pool(p.k_MGBH, p.v_MGBH, p.index_k_MBJ), torch.arange(128, device=device)
    new_TGH, index_q_TGJ = p.q_TNH[:128, :2], p.index_q_TGJ[:128]
    new = cache.Projections(p.q_TNH[:128], new_TGH, new_TGH, index_q_TGJ, index_q_TGJ[:, 0])
    norms = cache.HeadNorms(*[x[0, 0] for x in (new.q_TNH, new.k_TGH, index_q_TGJ, index_q_TGJ)])
    logit_RV = torch.zeros(2, 100, dtype=dtype, device=device)
    return {
        "rms_norm": (e.x_TD, e.x_TD[0], 1e-6),
        "norm_rotate": (p.q_TNH, p.q_TNH[0, 0], *rope, 1e-6),
        "linear": (weight_OD[:1], weight_OD),
        "linear_each": (weight_OD[:1], [weight_OD, weight_OD]),
        "select_blocks": (p.index_q_TGJ, p.index_k_MBJ, *p.where, 4, 1),
        "encode_pages": (p.index_k_MBJ, torch.arange(128, device=device), index.empty_codes(p.index_k_MBJ)),
        "block_scores": (p.index_q_TGJ, p.index_k_MBJ, *p.where),
        "sparse_attention": (*keys, p.block_TGK, 0.25),
        "sparse_attention_lse": (*keys, p.block_TGK, 0.25),
        "dense_attention": (*keys, 0.25),
        "swiglu": (e.x_TD, 1.702, 7.0),
        "route": (e.x_TD, router_ED, router_ED[:, 0], 2),
        "experts": (*e, 1.702, 7.0),
        "mixture": (e.x_TD[:1], (router_ED, router_ED[:, 0]), 2, e[3:], [x[0] for x in e[3:]], 2.0, 1.702, 7.0),
        "write_pages": (new_TGH, new_TGH, new.index_k_TJ, pool, slot_T),
        "write_heads": (new, norms, [x[:128] for x in rope], 1e-6, pool, slot_T),
        "sample": (logit_RV, sample.SampleParams().values(logit_RV), (), ()),
        "top_logprobs": (logit_RV, 3),
    }
