"""The one table of parameters: which published tensors fill which in-memory parameter, and where.

Published names and shapes come from here for reading and for writing alike. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openm3.config import ModelConfig, VisionConfig

Where = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One published tensor and the place it fills: `parameter[where]`."""

    name: str
    shape: tuple[int, ...]
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Param:
    """One in-memory parameter and the published tensors that fill it; `float32` ones keep that dtype always."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    float32: bool = False


def layout(config: ModelConfig) -> Iterator[Param]:
    """Yield every parameter with its published tensors: text, and then vision and projector if the config has them."""
    yield from _text_layout(config)
    if config.vision is not None:
        yield from _vision_layout(config.vision)
        yield from _projector_layout(config.vision, config.hidden_size)


def _text_layout(c: ModelConfig) -> Iterator[Param]:
    model = "language_model.model."
    yield _whole("embed.weight", model + "embed_tokens.weight", c.vocab_size, c.hidden_size)
    for index in range(c.num_layers):
        ours, theirs = f"layers.{index}.", f"{model}layers.{index}."
        yield _whole(ours + "attn_norm.weight", theirs + "input_layernorm.weight", c.hidden_size)
        yield from _attention_layout(c, ours + "attn.", theirs + "self_attn.", sparse=c.layer_types[index] == "sparse")
        yield _whole(ours + "mlp_norm.weight", theirs + "post_attention_layernorm.weight", c.hidden_size)
        if c.mlp_types[index] == "dense":
            yield from _swiglu_layout(ours + "mlp.", theirs + "mlp.", c.hidden_size, c.dense_size)
        else:
            yield from _moe_layout(c, ours + "mlp.", theirs + "block_sparse_moe.")
    yield _whole("norm.weight", model + "norm.weight", c.hidden_size)
    if not c.tie_embeddings:
        yield _whole("head.weight", "language_model.lm_head.weight", c.vocab_size, c.hidden_size)


def _attention_layout(c: ModelConfig, ours: str, theirs: str, *, sparse: bool) -> Iterator[Param]:
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield _whole(ours + "q.weight", theirs + "q_proj.weight", queries, c.hidden_size)
    yield _whole(ours + "k.weight", theirs + "k_proj.weight", keys, c.hidden_size)
    yield _whole(ours + "v.weight", theirs + "v_proj.weight", keys, c.hidden_size)
    yield _whole(ours + "o.weight", theirs + "o_proj.weight", c.hidden_size, queries)
    for norm in ("q_norm.weight", "k_norm.weight"):
        yield _whole(ours + norm, theirs + norm, c.head_dim)
    if sparse:
        index_queries = c.num_groups * c.index_dim
        yield _whole(ours + "index_q.weight", theirs + "index_q_proj.weight", index_queries, c.hidden_size)
        yield _whole(ours + "index_k.weight", theirs + "index_k_proj.weight", c.index_dim, c.hidden_size)
        for norm in ("index_q_norm.weight", "index_k_norm.weight"):
            yield _whole(ours + norm, theirs + norm, c.index_dim)


def _swiglu_layout(ours: str, theirs: str, width: int, inner: int) -> Iterator[Param]:
    gate = Part(theirs + "gate_proj.weight", (inner, width), (slice(0, inner),))
    up = Part(theirs + "up_proj.weight", (inner, width), (slice(inner, 2 * inner),))
    yield Param(ours + "gate_up.weight", (2 * inner, width), (gate, up))
    yield _whole(ours + "down.weight", theirs + "down_proj.weight", width, inner)


def _moe_layout(c: ModelConfig, ours: str, theirs: str) -> Iterator[Param]:
    experts, width, inner = c.num_experts, c.hidden_size, c.expert_size
    yield _whole(ours + "router.weight", theirs + "gate.weight", experts, width, float32=True)
    yield _whole(ours + "router.bias", theirs + "e_score_correction_bias", experts, float32=True)
    gate_up: list[Part] = []
    for expert in range(experts):
        name = f"{theirs}experts.{expert}."
        gate_up.append(Part(name + "w1.weight", (inner, width), (expert, slice(0, inner))))
        gate_up.append(Part(name + "w3.weight", (inner, width), (expert, slice(inner, 2 * inner))))
    down = (Part(f"{theirs}experts.{expert}.w2.weight", (width, inner), (expert,)) for expert in range(experts))
    yield Param(ours + "experts.gate_up", (experts, 2 * inner, width), tuple(gate_up))
    yield Param(ours + "experts.down", (experts, width, inner), tuple(down))
    yield from _swiglu_layout(ours + "shared.", theirs + "shared_experts.", width, c.shared_size)


def _vision_layout(v: VisionConfig) -> Iterator[Param]:
    tower = "vision_tower.vision_model."
    patch = (v.hidden_size, v.num_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield _whole("vision.patch_embed.weight", tower + "embeddings.patch_embedding.weight", *patch)
    yield from _affine("vision.pre_norm", tower + "pre_layrnorm", v.hidden_size)
    for index in range(v.num_layers):
        ours, theirs = f"vision.layers.{index}.", f"{tower}encoder.layers.{index}."
        yield from _affine(ours + "attn_norm", theirs + "layer_norm1", v.hidden_size)
        for name, published in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
            yield from _affine(f"{ours}attn.{name}", f"{theirs}self_attn.{published}", v.hidden_size, v.hidden_size)
        yield from _affine(ours + "mlp_norm", theirs + "layer_norm2", v.hidden_size)
        yield from _affine(ours + "mlp.up", theirs + "mlp.fc1", v.intermediate_size, v.hidden_size)
        yield from _affine(ours + "mlp.down", theirs + "mlp.fc2", v.hidden_size, v.intermediate_size)


def _projector_layout(v: VisionConfig, text_size: int) -> Iterator[Param]:
    inner, merged = v.projector_hidden_size, text_size * v.spatial_merge_size**2
    yield from _affine("projector.linear_1", "multi_modal_projector.linear_1", inner, v.hidden_size)
    yield from _affine("projector.linear_2", "multi_modal_projector.linear_2", text_size, inner)
    yield from _affine("projector.merge_1", "patch_merge_mlp.linear_1", inner, merged)
    yield from _affine("projector.merge_2", "patch_merge_mlp.linear_2", text_size, inner)


def _whole(name: str, published: str, *shape: int, float32: bool = False) -> Param:
    return Param(name, shape, (Part(published, shape),), float32)


def _affine(ours: str, theirs: str, *shape: int) -> Iterator[Param]:
    yield _whole(ours + ".weight", theirs + ".weight", *shape)
    yield _whole(ours + ".bias", theirs + ".bias", shape[0])
