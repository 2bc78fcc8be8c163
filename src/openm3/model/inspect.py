"""What a checkpoint or a bare config holds and costs, as numbers (`report`) and as plain text tables (`render`).

Reads file headers only, never weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openm3.config import BLOCK, ModelConfig
from openm3.model import cost, mxfp8
from openm3.model.checkpoint import BUNDLED, Stored, check, has_weights, ranges
from openm3.model.layout import layout

CONTEXTS = (8_192, 131_072, 1_048_576)
"""Context lengths, in tokens, that a report gives the cost of a decoded token at."""

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, mxfp8.DTYPE: 1}


def report(path: str | Path) -> dict[str, Any]:
    """Describe the checkpoint folder, bundled model or `config.json` at `path` as values that JSON can hold.

    With weights in the folder, checks that every tensor is there in its shape, and counts memory in the stored dtypes;
    else memory is counted in bfloat16 (router float32) and `weights` is None. Raises ConfigError and CheckpointError.
    """
    path = BUNDLED.get(str(path), Path(path))
    config = ModelConfig.from_file(path)
    stored = check(path, config) if path.is_dir() and has_weights(path) else None
    kv, index = cost.kv_bytes_per_token(config), cost.index_bytes_per_token(config)
    return {
        "path": str(path),
        "weights": _weights(stored),
        "config": asdict(config),
        "layers": _layers(config),
        "parameters": cost.parameters(config),
        "memory_bytes": _memory(config, stored),
        "cache_bytes_per_token": {"kv": kv, "index": index, "total": kv + index},
        "cost_per_token": [_cost(config, context) for context in CONTEXTS],
    }


def _weights(stored: Mapping[str, Stored] | None) -> dict[str, Any] | None:
    if stored is None:
        return None
    dtypes = Counter(tensor.dtype for tensor in stored.values())
    files = {tensor.file for tensor in stored.values()}
    return {"tensors": len(stored), "files": len(files), "dtypes": dict(sorted(dtypes.items()))}


def _layers(config: ModelConfig) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, str], list[int]] = {}
    for layer, kind in enumerate(zip(config.layer_types, config.mlp_types, strict=True)):
        kinds.setdefault(kind, []).append(layer)
    return [
        {"layers": ranges(found), "count": len(found), "attention": attention, "mlp": mlp}
        for (attention, mlp), found in kinds.items()
    ]


def _memory(config: ModelConfig, stored: Mapping[str, Stored] | None) -> dict[str, int]:
    memory: Counter[str] = Counter()
    for param in layout(config):
        for tensor in param.parts:
            dtype = stored[tensor.name].dtype if stored else "F32" if param.float32 else "BF16"
            memory[_part(param.name)] += math.prod(tensor.shape) * _DTYPE_BYTES[dtype]
            if dtype == mxfp8.DTYPE:
                memory[_part(param.name)] += math.prod(mxfp8.scale_shape(tensor.shape))
    return {**memory, "total": memory.total()}


def _part(name: str) -> str:
    """The part, in `cost.parameters`' words, that a parameter belongs to."""
    for start, part in (
        ("vision.", "vision"),
        ("projector.", "projector"),
        ("embed.", "embeddings"),
        ("head.", "head"),
    ):
        if name.startswith(start):
            return part
    for word, part in (
        ("norm.", "norms"),
        (".index_", "index"),
        (".attn.", "attention"),
        (".router.", "router"),
        (".experts.", "experts"),
        (".shared.", "shared experts"),
    ):
        if word in name:
            return part
    return "dense mlp"


def _cost(config: ModelConfig, context: int) -> dict[str, Any]:
    flops, read = cost.flops_per_token(config, context), cost.bytes_per_token(config, context)
    return {
        "context": context,
        "flops": flops,
        "bytes": read,
        "index_scan_share": {
            "flops": flops["index scan"] / flops["total"],
            "bytes": read["index keys"] / read["total"],
        },
    }


def render(values: Mapping[str, Any]) -> str:
    """Lay a report out as text of at most 80 columns (but for the path)."""
    sections = [_summary(values), _layer_table(values["layers"]), _part_table(values), _cache_table(values)]
    return "\n\n".join([*sections, _cost_table(values)])


def _summary(values: Mapping[str, Any]) -> str:
    c, weights = values["config"], values["weights"]
    if weights is None:
        state = "not checked: only a config here; sizes below are for bfloat16"
    else:
        dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in weights["dtypes"].items())
        files = "1 file" if weights["files"] == 1 else f"{weights['files']:,} files"
        state = f"all {weights['tensors']:,} tensors are there, in {files}: {dtypes}"
    vision = c["vision"]
    lines = {
        "Weights": state,
        "Model": f"{len(c['layer_types'])} layers of width {c['hidden_size']:,}, vocabulary {c['vocab_size']:,}, "
        f"{c['max_positions']:,} positions",
        "Attention": f"{c['num_heads']} heads, {c['num_kv_heads']} KV heads, of {c['head_dim']} channels "
        f"({c['rotary_dim']} rotary)",
        "Selection": f"{c['num_selected']} blocks of {BLOCK} tokens ({c['num_local']} local), "
        f"index width {c['index_dim']}",
        "Experts": f"{c['num_active']} of {c['num_experts']} a token, width {c['expert_size']:,}, "
        f"beside a shared one of width {c['shared_size']:,}",
        "Vision": f"{vision['num_layers']} layers of width {vision['hidden_size']:,}" if vision else "none",
    }
    if "sparse" not in c["layer_types"]:
        del lines["Selection"]
    if "moe" not in c["mlp_types"]:
        del lines["Experts"]
    return "\n".join([values["path"], *(f"{name:<11}{text}" for name, text in lines.items())])


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [[group["layers"], str(group["count"]), group["attention"], group["mlp"]] for group in layers]
    return _table(["Layers", "Count", "Attention", "MLP"], rows, "<><<")


def _part_table(values: Mapping[str, Any]) -> str:
    counts, memory = values["parameters"], values["memory_bytes"]
    rows = [
        [part, f"{count:,}", f"{count / counts['total']:.1%}", _si(memory[part], "B")]
        for part, count in counts.items()
        if count and part != "active"
    ]
    rows.append(["active a token", f"{counts['active']:,}", f"{counts['active'] / counts['total']:.1%}", ""])
    return _table(["Part", "Parameters", "Share", "Memory"], rows, "<>>>")


def _cache_table(values: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{size:,} B", *(_si(size * context, "B") for context in CONTEXTS)]
        for name, size in values["cache_bytes_per_token"].items()
    ]
    return _table(["Cache (2-byte)", "A token", *(_tokens(context) for context in CONTEXTS)], rows, "<>>>>")


def _cost_table(values: Mapping[str, Any]) -> str:
    head = ["Context", "FLOP", "index scan", "attention", "Read", "index keys", "KV"]
    limit = values["config"]["max_positions"]
    rows = []
    for entry in values["cost_per_token"]:
        flops, read, share = entry["flops"], entry["bytes"], entry["index_scan_share"]
        mark = "*" if entry["context"] > limit else ""
        rows.append(
            [
                _tokens(entry["context"]) + mark,
                _si(flops["total"], "FLOP"),
                f"{share['flops']:.1%}",
                f"{flops['attention'] / flops['total']:.1%}",
                _si(read["total"], "B"),
                f"{share['bytes']:.1%}",
                f"{read['kv'] / read['total']:.1%}",
            ]
        )
    note = f"\n* beyond the model's {limit:,} positions" if limit < CONTEXTS[-1] else ""
    return "One decoded token, 2-byte weights and cache:\n" + _table(head, rows, "<>>>>>>") + note


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    )


def _tokens(count: int) -> str:
    return f"{count >> 20}M" if count >= 2**20 else f"{count >> 10}K"


def _si(value: float, unit: str) -> str:
    """Two decimals and a decimal prefix: 49.97 GB."""
    if value < 1000:
        return f"{value:.0f} {unit}"
    power = min(int(math.log10(value)) // 3, 5)
    return f"{value / 1000**power:.2f} {' kMGTP'[power]}{unit}"
