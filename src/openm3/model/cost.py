"""What a model costs: parameters, cache bytes, and the arithmetic and memory traffic of one decoded token.

Pure functions of a ModelConfig. A multiply and its add count as two operations; softmax, norms and other elementwise
work are left out. Weights and cache take two bytes an element unless told otherwise; the router is float32 always.
"""

from __future__ import annotations

from openm3.config import BLOCK, ModelConfig, VisionConfig

_ROUTER_BYTES = 4


def parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters by part, the router's correction biases included.

    `total` is the sum of the parts. `active` is what one text token uses: its row of the embedding, the experts it is
    routed to, and all the rest of the text model.
    """
    c, sparse, moe = config, config.layer_types.count("sparse"), config.mlp_types.count("moe")
    table = c.vocab_size * c.hidden_size
    parts = {
        "embeddings": table,
        "head": 0 if c.tie_embeddings else table,
        "attention": c.num_layers * 2 * (c.num_heads + c.num_kv_heads) * c.head_dim * c.hidden_size,
        "index": sparse * (c.num_groups + 1) * c.index_dim * c.hidden_size,
        "dense mlp": (c.num_layers - moe) * 3 * c.hidden_size * c.dense_size,
        "experts": moe * c.num_experts * 3 * c.hidden_size * c.expert_size,
        "shared experts": moe * 3 * c.hidden_size * c.shared_size,
        "router": moe * c.num_experts * (c.hidden_size + 1),
        "norms": (2 * c.num_layers + 1) * c.hidden_size + 2 * c.num_layers * c.head_dim + 2 * sparse * c.index_dim,
        "vision": _vision_parameters(c.vision) if c.vision else 0,
        "projector": _projector_parameters(c.vision, c.hidden_size) if c.vision else 0,
    }
    total = sum(parts.values())
    idle_rows = 0 if c.tie_embeddings else table - c.hidden_size
    idle_experts = parts["experts"] // c.num_experts * (c.num_experts - c.num_active)
    return parts | {
        "total": total,
        "active": total - idle_rows - idle_experts - parts["vision"] - parts["projector"],
    }


def _vision_parameters(v: VisionConfig) -> int:
    width, inner = v.hidden_size, v.intermediate_size
    patch = width * v.num_channels * v.temporal_patch_size * v.patch_size**2
    norm = 2 * width
    layer = 2 * norm + 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width
    return patch + norm + v.num_layers * layer


def _projector_parameters(v: VisionConfig, text_size: int) -> int:
    inner, merged = v.projector_hidden_size, text_size * v.spatial_merge_size**2
    return (v.hidden_size + 1) * inner + (merged + 1) * inner + 2 * (inner + 1) * text_size


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """Bytes that a token's keys and values take in the cache, all layers together."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype_bytes


def index_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """Bytes that a token's index keys take in the cache: one key in each sparse layer, shared by all groups."""
    return config.layer_types.count("sparse") * config.index_dim * dtype_bytes


def attended_tokens(config: ModelConfig, context: int) -> int:
    """Most tokens that a query of a sparse layer attends when `context` tokens are visible to it."""
    return min(config.num_selected * BLOCK, context)


def flops_per_token(config: ModelConfig, context: int) -> dict[str, int]:
    """Operations to decode one token that sees `context` tokens, itself included, by part and `total`."""
    c, sparse, counts = config, config.layer_types.count("sparse"), parameters(config)
    read = sparse * attended_tokens(c, context) + (c.num_layers - sparse) * context
    parts = {
        "projections": 2 * counts["attention"],
        "attention": 4 * c.num_heads * c.head_dim * read,
        "index projections": 2 * counts["index"],
        "index scan": sparse * 2 * c.num_groups * c.index_dim * context,
        "dense mlp": 2 * counts["dense mlp"],
        "experts": 2 * counts["experts"] // c.num_experts * c.num_active,
        "shared experts": 2 * counts["shared experts"],
        "router": 2 * c.mlp_types.count("moe") * c.num_experts * c.hidden_size,
        "head": 2 * c.vocab_size * c.hidden_size,
    }
    return parts | {"total": sum(parts.values())}


def bytes_per_token(
    config: ModelConfig, context: int, *, weight_bytes: int = 2, cache_bytes: int = 2
) -> dict[str, int]:
    """Bytes read to decode one token of one request that sees `context` tokens: weights, index keys, KV and `total`.

    Each group of query heads reads the blocks that it selected, so sparse layers read KV for `attended_tokens` a group.
    """
    c, sparse, counts = config, config.layer_types.count("sparse"), parameters(config)
    read = sparse * attended_tokens(c, context) + (c.num_layers - sparse) * context
    parts = {
        "weights": (counts["active"] - counts["router"]) * weight_bytes + counts["router"] * _ROUTER_BYTES,
        "index keys": index_bytes_per_token(c, cache_bytes) * context,
        "kv": 2 * c.num_kv_heads * c.head_dim * cache_bytes * read,
    }
    return parts | {"total": sum(parts.values())}
