"""What a model is: frozen, checked values under openm3's own names.

`ModelConfig.from_hf` (by way of `hf_config`) and `to_hf` are the only places that know Hugging Face's spellings.
Nothing here knows tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openm3.errors import ConfigError

BLOCK = 128
"""Tokens in a block: the unit of selection, of the page table and of the prefix hash."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower and projector: a ViT over 2x14x14 patches with 3-D rotary positions."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    segment_max_frames: int = 4
    projector_hidden_size: int = 6144

    def __post_init__(self) -> None:
        if problems := _impossible_vision(self):
            raise ConfigError("impossible vision config: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one M3-family model.

    `layer_types[l]` is "full" or "sparse" (which attention layer l has), `mlp_types[l]` is "dense" or "moe". Widths
    are in channels, `num_selected` and `num_local` in blocks of 128 tokens, `max_positions` in tokens.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layer_types: tuple[str, ...]
    mlp_types: tuple[str, ...]
    dense_size: int
    expert_size: int
    shared_size: int
    num_experts: int
    num_active: int
    index_dim: int = 128
    num_selected: int = 16
    num_local: int = 1
    rope_theta: float = 5_000_000.0
    norm_eps: float = 1e-6
    max_positions: int = 1_048_576
    routed_scale: float = 2.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    image_id: int | None = None
    video_id: int | None = None
    vision: VisionConfig | None = field(default=None)

    def __post_init__(self) -> None:
        if problems := _impossible(self):
            raise ConfigError("impossible model config: " + "; ".join(problems))

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_groups(self) -> int:
        """KV heads = index heads: each group of query heads shares one KV head and one selection."""
        return self.num_kv_heads

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json` (or the folder that holds it). Raises ConfigError."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no config.json at {path}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not readable JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object, not {type(values).__name__}")
        return cls.from_hf(values)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed Hugging Face `config.json`, published or in-tree spelling, whole or text part only.

        Raises ConfigError naming every field that is missing, contradictory or not implemented here.
        """
        from openm3.hf_config import read_hf

        return read_hf(values)

    def to_hf(self) -> dict[str, Any]:
        """The published spelling, readable by `from_hf` and by transformers."""
        return _to_published(self)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine serves: how much it remembers, how much it does at once.

    The pool of keys and values holds `cache_tokens` tokens, or takes `cache_bytes`, or else `memory_share` of the
    memory that is free. A step computes at most `step_tokens` tokens of at most `max_requests` requests; `max_waiting`
    more may wait. `prefix_cache` lets prompts that begin alike share pages; with `cache_dir` full pages also stay in
    that folder, up to `cache_dir_bytes`, and found again by later engines. Up to `draft_tokens` tokens
    are proposed ahead from the text so far and verified in one step, while few requests write; they change no reply.
    What was seen in pictures and videos is kept up to `image_cache_bytes`, so that the same ones are encoded once.
    `check` verifies after every step that no page is lost. Raises ConfigError for impossible values.
    """

    cache_tokens: int | None = None
    cache_bytes: int | None = None
    memory_share: float = 0.5
    step_tokens: int = 2048
    max_requests: int = 64
    max_waiting: int = 4096
    prefix_cache: bool = True
    cache_dir: str | Path | None = None
    cache_dir_bytes: int = 64 << 30
    draft_tokens: int = 8
    image_cache_bytes: int = 256 << 20
    check: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("cache_tokens", "cache_bytes") if getattr(self, name) is not None]
        bad = _not_sizes(self, given)
        bad += _not_counts(self, "step_tokens max_requests max_waiting")
        if not bad and self.step_tokens < self.max_requests + BLOCK:
            least = self.max_requests + BLOCK
            bad.append(f"step_tokens must be at least {least}, a token a request and a block, not {self.step_tokens}")
        if self.cache_tokens is not None and self.cache_bytes is not None:
            bad.append("give cache_tokens or cache_bytes, not both")
        if not isinstance(self.memory_share, int | float) or not 0 < self.memory_share <= 1:
            bad.append(f"memory_share must be more than 0 and at most 1, not {self.memory_share!r}")
        bad += _not_sizes(self, ("cache_dir_bytes", "draft_tokens", "image_cache_bytes"), least=0)
        if self.cache_dir is not None and not self.prefix_cache:
            bad.append("cache_dir keeps what prefix_cache finds: it needs prefix_cache")
        if bad:
            raise ConfigError("impossible engine config: " + "; ".join(bad))


def _impossible(c: ModelConfig) -> list[str]:
    """What no model can be: one sentence a problem, each with the field and its value."""
    bad: list[str] = []

    def need(ok: bool, text: str) -> None:
        if not ok:
            bad.append(text)

    counts = (
        "vocab_size hidden_size num_heads num_kv_heads head_dim rotary_dim index_dim num_selected num_local "
        "max_positions dense_size expert_size shared_size num_experts num_active"
    )
    bad += _not_counts(c, counts)
    if bad:
        return bad
    need(len(c.layer_types) > 0, "there must be at least one layer")
    need(len(c.layer_types) == len(c.mlp_types), f"{len(c.layer_types)} layer_types but {len(c.mlp_types)} mlp_types")
    for kind in sorted(set(c.layer_types) - {"full", "sparse"}):
        bad.append(f"unknown attention layer type {kind!r}")
    for kind in sorted(set(c.mlp_types) - {"dense", "moe"}):
        bad.append(f"unknown MLP layer type {kind!r}")
    need(
        c.num_heads % c.num_kv_heads == 0, f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}"
    )
    need(c.rotary_dim <= c.head_dim, f"rotary_dim {c.rotary_dim} must not exceed head_dim {c.head_dim}")
    need(c.rotary_dim % 2 == 0, f"rotary_dim {c.rotary_dim} must be even")
    if "sparse" in c.layer_types:
        need(c.rotary_dim <= c.index_dim, f"rotary_dim {c.rotary_dim} must not exceed index_dim {c.index_dim}")
        need(
            c.num_local <= c.num_selected,
            f"num_local {c.num_local} must not exceed num_selected {c.num_selected} blocks",
        )
    need(c.num_active <= c.num_experts, f"num_active {c.num_active} exceeds num_experts {c.num_experts}")
    bad += _not_positive(c, "rope_theta norm_eps routed_scale swiglu_alpha swiglu_limit")
    for name in ("bos_id", "eos_id", "image_id", "video_id"):
        value = getattr(c, name)
        need(value is None or 0 <= value < c.vocab_size, f"{name} {value} is outside the vocabulary of {c.vocab_size}")
    return bad


def _impossible_vision(v: VisionConfig) -> list[str]:
    counts = "hidden_size intermediate_size num_layers num_heads num_channels patch_size temporal_patch_size "
    bad = _not_counts(v, counts + "spatial_merge_size segment_max_frames projector_hidden_size")
    bad += _not_positive(v, "rope_theta norm_eps")
    if bad:
        return bad
    if v.hidden_size % v.num_heads:
        bad.append(f"hidden_size {v.hidden_size} is not a multiple of num_heads {v.num_heads}")
    elif v.head_dim < 6:
        bad.append(f"head width {v.head_dim} is too narrow for three rotary axes: it must be at least 6")
    return bad


def _not_counts(config: object, names: str) -> list[str]:
    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31

    values = ((name, getattr(config, name)) for name in names.split())
    return [f"{name} must be a positive whole number, not {value!r}" for name, value in values if not is_count(value)]


def _not_sizes(config: object, names: Iterable[str], least: int = 1) -> list[str]:
    """As `_not_counts`, however large."""
    values = ((name, getattr(config, name)) for name in names)
    return [
        f"{name} must be a whole number of at least {least}, not {value!r}"
        for name, value in values
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]


def _not_positive(config: object, names: str) -> list[str]:
    def is_positive(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18

    values = ((name, getattr(config, name)) for name in names.split())
    return [f"{name} must be a positive number, not {value!r}" for name, value in values if not is_positive(value)]


def _to_published(c: ModelConfig) -> dict[str, Any]:
    sparse = [int(kind == "sparse") for kind in c.layer_types]
    tokens = {"bos_token_id": c.bos_id, "eos_token_id": c.eos_id}
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "dense_intermediate_size": c.dense_size,
        "head_dim": c.head_dim,
        "hidden_act": "swigluoai",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.expert_size,
        "max_position_embeddings": c.max_positions,
        "moe_layer_freq": [int(kind == "moe") for kind in c.mlp_types],
        "n_shared_experts": 1,
        "num_attention_heads": c.num_heads,
        "num_experts_per_tok": c.num_active,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "num_local_experts": c.num_experts,
        "partial_rotary_factor": c.rotary_dim / c.head_dim,
        "qk_norm_type": "per_head",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rotary_dim": c.rotary_dim,
        "routed_scaling_factor": c.routed_scale,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": c.shared_size,
        "sparse_attention_config": {
            "sparse_attention_freq": sparse,
            "sparse_block_size": BLOCK,
            "sparse_disable_index_value": sparse,
            "sparse_index_dim": c.index_dim,
            "sparse_init_block": 0,
            "sparse_local_block": c.num_local,
            "sparse_num_index_heads": c.num_kv_heads,
            "sparse_score_type": "max",
            "sparse_topk_blocks": c.num_selected,
            "use_sparse_attention": any(sparse),
        },
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_beta": 1.0,
        "swiglu_limit": c.swiglu_limit,
        "tie_word_embeddings": c.tie_embeddings,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": c.vocab_size,
    } | {name: value for name, value in tokens.items() if value is not None}
    media = {"image_token_index": c.image_id, "video_token_index": c.video_id}
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        **{name: value for name, value in media.items() if value is not None},
        "text_config": text,
        **(_vision_published(c.vision, c.hidden_size) if c.vision else {}),
    }


def _vision_published(v: VisionConfig, text_size: int) -> dict[str, Any]:
    compression = {
        "image_token_compression_method": "patch_merge",
        "spatial_merge_size": v.spatial_merge_size,
        "temporal_patch_size": v.temporal_patch_size,
    }
    return {
        "img_token_compression_config": compression,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": v.projector_hidden_size,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": v.hidden_size,
            "img_token_compression_config": compression,
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": v.num_heads,
            "num_channels": v.num_channels,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
            "position_embedding_type": "rope",
            "projection_dim": text_size,
            "rope_mode": "3d",
            "rope_theta": v.rope_theta,
            "vision_segment_max_frames": v.segment_max_frames,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
