"""Reads Hugging Face's spellings of a model config: the published nested one and the flat one of the in-tree classes.

Fields are read by dotted path (`sparse_attention_config.sparse_topk_blocks`) and every problem is collected, so that
one error names all of them. Nothing here knows tensors.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from openm3.config import BLOCK, ModelConfig, VisionConfig
from openm3.errors import ConfigError

_ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLForCausalLM")
_MODEL_TYPES = ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text")
_MAX_LAYERS = 10_000

# What openm3 implements of each switch. An absent field is accepted; an empty tuple: the field must be absent.
_Switches = Mapping[str, tuple[Any, ...]]
_TEXT_SWITCHES: _Switches = {
    "attention_output_gate": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_head",),
    "hidden_act": ("swigluoai", "silu"),
    "swiglu_beta": (1.0,),
    "n_shared_experts": (1,),
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "norm_topk_prob": (True,),
    "rope_parameters.rope_type": ("default",),
    "rope_parameters.type": ("default",),
    "rope_scaling.rope_type": ("default",),
    "rope_scaling.type": ("default",),
}
_QUANTIZATION_SWITCHES: _Switches = {
    "quantization_config.quant_method": ("mxfp8",),
    "quantization_config.weight_block_size": ([1, 32],),
    "quantization_config.scale_fmt": ("ue8m0",),
}
_SPARSE_SWITCHES: _Switches = {
    "sparse_attention_config.sparse_score_type": ("max",),
    "sparse_attention_config.sparse_block_size": (BLOCK,),
    "sparse_attention_config.sparse_init_block": (0,),
    "index_block_size": (BLOCK,),
}
_VISION_SWITCHES: _Switches = {
    "vision_config.hidden_act": ("gelu",),
    "vision_config.position_embedding_type": ("rope",),
    "vision_config.rope_mode": ("3d",),
    "vision_config.img_token_compression_config.image_token_compression_method": ("patch_merge",),
    "img_token_compression_config.image_token_compression_method": ("patch_merge",),
    "multimodal_projector_bias": (True,),
    "projector_hidden_act": ("gelu",),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("full",),
}


def read_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Build a ModelConfig from a parsed `config.json`, published or in-tree spelling, whole or text part only.

    Raises one ConfigError that names every field which is missing, of a wrong type, contradictory or not implemented.
    """
    return _Reader(values).read()


class _Reader:
    """One pass over a config: reads fields by dotted path and collects the problems."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.text = "text_config." if values.get("text_config") is not None else ""
        self.problems: list[str] = []

    def read(self) -> ModelConfig:
        self._refuse_foreign()
        self._refuse_broken_sections()
        fields = self._sizes() | self._constants() | self._tokens() | self._layer_kinds()
        fields["rotary_dim"] = self._rotary_dim(fields["head_dim"])
        fields["index_dim"] = self._whole(*self._sparse("index_dim", "index_head_dim"), default=128)
        fields["num_selected"] = self._whole(*self._sparse("topk_blocks", "index_topk_blocks"), default=16)
        fields["num_local"] = self._whole(*self._sparse("local_block", "index_local_blocks"), default=1)
        fields["vision"] = self._vision()
        readable = not self.problems
        self._refuse_switches(fields)
        if readable:
            try:
                config = ModelConfig(**fields)
            except ConfigError as error:
                self.problems.append(str(error).removeprefix("impossible model config: "))
        self._raise_problems()
        return config

    # Sections

    def _refuse_foreign(self) -> None:
        kind = self.values.get("model_type")
        if kind is not None and kind not in _MODEL_TYPES:
            raise ConfigError(f"model_type {_show(kind)} is not a MiniMax-M3: openm3 reads {_either(_MODEL_TYPES)}")
        names = self.values.get("architectures")
        if names is not None and not (isinstance(names, list) and any(name in _ARCHITECTURES for name in names)):
            raise ConfigError(
                f"architectures {_show(names)} is not a MiniMax-M3: openm3 reads {_either(_ARCHITECTURES)}"
            )

    def _refuse_broken_sections(self) -> None:
        sections = ["text_config"]
        sections += [self.text + name for name in ("sparse_attention_config", "rope_parameters", "rope_scaling")]
        sections += sorted({"quantization_config", self.text + "quantization_config"})
        sections += ["vision_config", "vision_config.rope_parameters", "vision_config.img_token_compression_config"]
        for path in [*sections, "img_token_compression_config"]:
            value = self._at(path)
            if value is not None and not isinstance(value, Mapping):
                self.problems.append(f"{path} must be an object, not {_show(value)}")
        self._raise_problems()

    def _raise_problems(self) -> None:
        if self.problems:
            raise ConfigError("this model config cannot be used: " + "; ".join(self.problems))

    # Fields of the text part

    def _sizes(self) -> dict[str, Any]:
        names = {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "dense_size": "dense_intermediate_size",
            "expert_size": "intermediate_size",
            "shared_size": "shared_intermediate_size",
            "num_experts": "num_local_experts",
            "num_active": "num_experts_per_tok",
        }
        sizes = {ours: self._whole(self.text + theirs) for ours, theirs in names.items()}
        return sizes | {"max_positions": self._whole(self.text + "max_position_embeddings", default=524_288)}

    def _constants(self) -> dict[str, Any]:
        text = self.text
        theta = (text + "rope_theta", text + "rope_parameters.rope_theta")
        tied = [self._flag(path) for path in sorted({text + "tie_word_embeddings", "tie_word_embeddings"})]
        return {
            "rope_theta": self._number(*theta, default=5_000_000.0),
            "norm_eps": self._number(text + "rms_norm_eps", default=1e-6),
            "routed_scale": self._number(text + "routed_scaling_factor", default=2.0),
            "swiglu_alpha": self._number(text + "swiglu_alpha", default=1.702),
            "swiglu_limit": self._number(text + "swiglu_limit", default=7.0),
            "tie_embeddings": any(tied),
        }

    def _tokens(self) -> dict[str, Any]:
        def token(*paths: str) -> int | None:
            path = next((path for path in paths if self._at(path) is not None), None)
            return None if path is None else self._whole(path, low=0)

        return {
            "bos_id": token(self.text + "bos_token_id", "bos_token_id"),
            "eos_id": token(self.text + "eos_token_id", "eos_token_id"),
            "image_id": token("image_token_index", "image_token_id"),
            "video_id": token("video_token_index", "video_token_id"),
        }

    def _layer_kinds(self) -> dict[str, Any]:
        text = self.text
        layers = self._whole(text + "num_hidden_layers", high=_MAX_LAYERS)
        attention = (text + "sparse_attention_config.sparse_attention_freq", {0: "full", 1: "sparse"})
        attention_in_tree = (text + "layer_types", {"full_attention": "full", "minimax_m3_sparse": "sparse"})
        mlp = (text + "moe_layer_freq", {0: "dense", 1: "moe"})
        mlp_in_tree = (text + "mlp_layer_types", {"dense": "dense", "sparse": "moe"})
        if self._at(text + "sparse_attention_config") and self._kind_is_absent(attention, attention_in_tree):
            self.problems.append(f"{attention[0]} is missing")
        return {
            "layer_types": self._kinds(attention, attention_in_tree, layers, default="full"),
            "mlp_types": self._kinds(mlp, mlp_in_tree, layers, default="moe"),
        }

    def _kind_is_absent(self, *spellings: tuple[str, Mapping[Any, str]]) -> bool:
        return all(self._at(path) is None for path, _ in spellings)

    def _kinds(
        self,
        published: tuple[str, Mapping[Any, str]],
        in_tree: tuple[str, Mapping[Any, str]],
        num_layers: int,
        default: str,
    ) -> tuple[str, ...]:
        found: list[tuple[str, ...]] = []
        for path, names in (published, in_tree):
            values = self._list(path, num_layers, tuple(names))
            if values is not None:
                found.append(tuple(names[value] for value in values))
        if len(found) == 2 and found[0] != found[1]:
            self.problems.append(f"{published[0]} and {in_tree[0]} disagree: give one, or make them agree")
        return found[0] if found else (default,) * num_layers

    def _rotary_dim(self, head_dim: int) -> int:
        text = self.text
        dim_paths = (text + "rotary_dim",)
        factor_paths = (text + "partial_rotary_factor", text + "rope_parameters.partial_rotary_factor")
        has_dim, has_factor = (any(self._at(path) is not None for path in paths) for paths in (dim_paths, factor_paths))
        dim = self._whole(*dim_paths) if has_dim else 0
        factor = self._number(*factor_paths) if has_factor else 0.0
        if not has_dim and not has_factor:
            self.problems.append(f"{dim_paths[0]} and {factor_paths[0]} are both missing: give either")
        if not has_factor or self.problems:
            return dim
        width = factor * head_dim
        if not 0 < factor <= 1 or abs(width - round(width)) > 1e-4:
            self.problems.append(f"{factor_paths[0]} {factor} of head_dim {head_dim} is not a whole number of channels")
        elif has_dim and dim != round(width):
            self.problems.append(
                f"{dim_paths[0]} is {dim} but {factor_paths[0]} {factor} of head_dim {head_dim} is {round(width)}: "
                "give one, or make them agree"
            )
        return round(width)

    # The vision part

    def _vision(self) -> VisionConfig | None:
        if self._at("vision_config") is None:
            return None
        before = len(self.problems)
        v, merge = "vision_config.", "img_token_compression_config."

        def compressed(name: str) -> int:
            return self._whole(v + name, v + merge + name, merge + name, default=2)

        fields: dict[str, Any] = {
            "hidden_size": self._whole(v + "hidden_size"),
            "intermediate_size": self._whole(v + "intermediate_size"),
            "num_layers": self._whole(v + "num_hidden_layers", high=_MAX_LAYERS),
            "num_heads": self._whole(v + "num_attention_heads"),
            "num_channels": self._whole(v + "num_channels", default=3),
            "patch_size": self._whole(v + "patch_size", default=14),
            "temporal_patch_size": compressed("temporal_patch_size"),
            "spatial_merge_size": compressed("spatial_merge_size"),
            "rope_theta": self._number(v + "rope_theta", v + "rope_parameters.rope_theta", default=10_000.0),
            "norm_eps": self._number(v + "layer_norm_eps", default=1e-5),
            "segment_max_frames": self._whole(v + "vision_segment_max_frames", default=4),
            "projector_hidden_size": self._whole("projector_hidden_size", default=6144),
        }
        if len(self.problems) > before:
            return None
        try:
            return VisionConfig(**fields)
        except ConfigError as error:
            self.problems.append(str(error).replace("impossible vision config:", "vision_config:"))
            return None

    # What openm3 does not implement

    def _refuse_switches(self, fields: Mapping[str, Any]) -> None:
        self._switches(self.text, _TEXT_SWITCHES)
        for prefix in sorted({"", self.text}):
            self._switches(prefix, _QUANTIZATION_SWITCHES)
        if self._at("vision_config") is not None:
            self._switches("", _VISION_SWITCHES)
        if "sparse" not in fields["layer_types"]:
            return
        self._switches(self.text, _SPARSE_SWITCHES)
        section = self.text + "sparse_attention_config."
        sparse = [kind == "sparse" for kind in fields["layer_types"]]
        disabled = self._list(section + "sparse_disable_index_value", len(sparse), (0, 1)) or [1] * len(sparse)
        valued = [layer for layer, (on, off) in enumerate(zip(sparse, disabled, strict=True)) if on and not off]
        if valued:
            self.problems.append(
                f"{section}sparse_disable_index_value is 0 on sparse layers {_show(valued)}; "
                "openm3 implements only 1 there (no index values)"
            )
        switch = self._at(section + "use_sparse_attention")
        if switch not in (None, True):
            self.problems.append(
                f"{section}use_sparse_attention is {_show(switch)} but {sum(sparse)} layers are sparse; "
                "set it to true, or set sparse_attention_freq to 0 on every layer for dense attention"
            )
        heads = self._whole(*self._sparse("num_index_heads", "index_n_heads"), default=4)
        if heads != fields["num_kv_heads"]:
            self.problems.append(
                f"{section}sparse_num_index_heads is {heads}; openm3 implements only num_key_value_heads "
                f"({fields['num_kv_heads']}): one index head for each KV head"
            )

    def _switches(self, prefix: str, switches: _Switches) -> None:
        for name, accepted in switches.items():
            value = self._at(prefix + name)
            if value is not None and value not in accepted:
                only = f"implements only {_either(map(_show, accepted))}" if accepted else "needs it absent"
                self.problems.append(f"{prefix}{name} is {_show(value)}; openm3 {only}")

    # Typed access

    def _sparse(self, published: str, in_tree: str) -> tuple[str, str]:
        return f"{self.text}sparse_attention_config.sparse_{published}", self.text + in_tree

    def _at(self, path: str) -> Any:
        """The value at a dotted path; None when it or a section on the way is absent or null."""
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def _find(self, *paths: str, default: Any = None) -> tuple[str, Any]:
        """The first path that is set, with its value. Two spellings that differ are a problem."""
        found = [(path, self._at(path)) for path in paths if self._at(path) is not None]
        if not found:
            if default is None:
                self.problems.append(f"{paths[0]} is missing")
            return paths[0], default
        for path, value in found[1:]:
            if value != found[0][1]:
                self.problems.append(f"{found[0][0]} is {_show(found[0][1])} but {path} is {_show(value)}")
        return found[0]

    def _whole(self, *paths: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        path, value = self._find(*paths, default=default)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        if value is not None:
            self.problems.append(f"{path} must be a whole number from {low} to {high}, not {_show(value)}")
        return low

    def _number(self, *paths: str, default: float | None = None) -> float:
        path, value = self._find(*paths, default=default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18:
            return float(value)
        if value is not None:
            self.problems.append(f"{path} must be a positive number, not {_show(value)}")
        return 1.0

    def _flag(self, path: str) -> bool:
        value = self._at(path)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{path} must be true or false, not {_show(value)}")
        return value is True

    def _list(self, path: str, length: int, allowed: tuple[int | str, ...]) -> list[Any] | None:
        """The list at `path`, one of `allowed` for each layer; None when absent or wrong."""
        values = self._at(path)
        if values is None:
            return None
        if isinstance(values, list) and len(values) == length and all(_is_one_of(v, allowed) for v in values):
            return values
        kinds = _either(map(_show, allowed))
        what = f"a list of {len(values)}" if isinstance(values, list) and len(values) != length else _show(values)
        self.problems.append(f"{path} must list {kinds} for each of the {length} layers, not {what}")
        return None


def _is_one_of(value: Any, allowed: tuple[int | str, ...]) -> bool:
    return isinstance(value, int | str) and value in allowed


def _show(value: Any) -> str:
    """A short rendering, safe for any value."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a huge number"


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
