"""ModelConfig: both spellings read, the published one written, everything else refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openm3.config import ModelConfig, VisionConfig
from openm3.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
M3 = json.loads((GOLDEN / "m3-config.json").read_text())
TINY = json.loads((GOLDEN / "m3-random-s0/model/config.json").read_text())

# The tiny config as transformers' own classes save it.
IN_TREE = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "image_token_id": 281,
    "model_type": "minimax_m3_vl",
    "projector_hidden_size": 128,
    "text_config": {
        "attention_dropout": 0.0,
        "bos_token_id": 290,
        "dense_intermediate_size": 256,
        "eos_token_id": 276,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "index_block_size": 128,
        "index_head_dim": 64,
        "index_local_blocks": 1,
        "index_n_heads": 2,
        "index_topk_blocks": 4,
        "intermediate_size": 64,
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3],
        "max_position_embeddings": 1048576,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "model_type": "minimax_m3_vl_text",
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000, "rope_type": "default"},
        "rotary_dim": 32,
        "routed_scaling_factor": 2.0,
        "shared_intermediate_size": 64,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 320,
    },
    "video_token_id": 282,
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 160,
        "intermediate_size": 320,
        "layer_norm_eps": 1e-05,
        "model_type": "minimax_m3_vl_vision",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted paths set; the value `...` deletes the field."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = values
        for key in sections:
            section = section.setdefault(key, {})
        if value is ...:
            del section[name]
        else:
            section[name] = value
    return values


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(values)
    return str(error.value)


def test_published_m3() -> None:
    assert ModelConfig.from_hf(M3) == ModelConfig(
        vocab_size=200064,
        hidden_size=6144,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        rotary_dim=64,
        layer_types=("full",) * 3 + ("sparse",) * 57,
        mlp_types=("dense",) * 3 + ("moe",) * 57,
        dense_size=12288,
        expert_size=3072,
        shared_size=3072,
        num_experts=128,
        num_active=4,
        bos_id=200034,
        eos_id=200020,
        image_id=200025,
        video_id=200026,
        vision=VisionConfig(),
    )


def test_in_tree_spelling_equals_published() -> None:
    assert ModelConfig.from_hf(IN_TREE) == ModelConfig.from_hf(TINY)


def test_text_part_alone() -> None:
    text = ModelConfig.from_hf(TINY["text_config"])
    assert text.vision is None and text.image_id is None
    assert (text.hidden_size, text.layer_types, text.index_dim) == (128, ("full", *["sparse"] * 3), 64)
    assert ModelConfig.from_hf(IN_TREE["text_config"]) == text


def test_in_tree_defaults() -> None:
    names = "index_block_size index_head_dim index_local_blocks index_topk_blocks layer_types max_position_embeddings "
    names += "mlp_layer_types rms_norm_eps routed_scaling_factor swiglu_alpha swiglu_limit tie_word_embeddings"
    config = ModelConfig.from_hf(changed(IN_TREE["text_config"], dict.fromkeys(names.split(), ...)))
    assert config.layer_types == ("full",) * 4 and config.mlp_types == ("moe",) * 4
    assert (config.index_dim, config.num_selected, config.num_local, config.max_positions) == (128, 16, 1, 524288)
    assert (config.norm_eps, config.routed_scale, config.swiglu_alpha, config.swiglu_limit) == (1e-6, 2.0, 1.702, 7.0)
    assert config.tie_embeddings is False


@pytest.mark.parametrize("values", [M3, TINY, IN_TREE, TINY["text_config"], IN_TREE["text_config"]])
def test_to_hf_reads_back(values: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(values)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_to_hf_keeps_every_published_field_it_knows() -> None:
    written, known = ModelConfig.from_hf(TINY).to_hf(), 0
    for section in ("text_config", "vision_config"):
        for name, value in written[section].items():
            assert TINY[section][name] == value, name
            known += 1
    assert known > 40
    assert {name: TINY[name] for name in written if not name.endswith("_config")} == {
        name: value for name, value in written.items() if not name.endswith("_config")
    }


@pytest.mark.parametrize("dropped", ["rotary_dim", "partial_rotary_factor"])
def test_one_rotary_field_suffices(dropped: str) -> None:
    assert ModelConfig.from_hf(changed(TINY, {f"text_config.{dropped}": ...})) == ModelConfig.from_hf(TINY)


def test_rotary_fields_must_agree_and_be_there() -> None:
    message = refusal(changed(TINY, {"text_config.rotary_dim": 64}))
    assert "rotary_dim is 64 but text_config.partial_rotary_factor 0.5 of head_dim 64 is 32" in message
    message = refusal(changed(TINY, {"text_config.rotary_dim": ..., "text_config.partial_rotary_factor": ...}))
    assert "text_config.rotary_dim and text_config.partial_rotary_factor are both missing" in message


S = "text_config.sparse_attention_config."


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.attention_output_gate", True, "implements only False"),
        ("text_config.attention_bias", True, "implements only False"),
        ("text_config.use_gemma_norm", False, "implements only True"),
        ("text_config.use_qk_norm", False, "implements only True"),
        ("text_config.qk_norm_type", "full", "implements only 'per_head'"),
        ("text_config.hidden_act", "gelu", "implements only 'swigluoai' or 'silu'"),
        ("text_config.scoring_func", "softmax", "implements only 'sigmoid'"),
        ("text_config.use_routing_bias", False, "implements only True"),
        ("text_config.n_shared_experts", 2, "implements only 1"),
        ("text_config.swiglu_beta", 0.5, "implements only 1.0"),
        ("text_config.rope_scaling", {"type": "yarn"}, "implements only 'default'"),
        ("text_config.rope_parameters", {"rope_type": "llama3"}, "implements only 'default'"),
        ("text_config.sliding_window", 4096, "needs it absent"),
        ("quantization_config", {"quant_method": "fp8"}, "implements only 'mxfp8'"),
        (S + "sparse_score_type", "lse", "implements only 'max'"),
        (S + "sparse_block_size", 64, "implements only 128"),
        (S + "sparse_init_block", 1, "implements only 0"),
        (S + "sparse_num_index_heads", 4, "implements only num_key_value_heads (2)"),
        (S + "sparse_disable_index_value", [0, 1, 0, 1], "is 0 on sparse layers [2]"),
        (S + "use_sparse_attention", False, "set sparse_attention_freq to 0 on every layer"),
        ("vision_config.rope_mode", "2d", "implements only '3d'"),
        ("vision_config.hidden_act", "quick_gelu", "implements only 'gelu'"),
        ("multimodal_projector_bias", False, "implements only True"),
    ],
)
def test_refuses_what_is_not_implemented(path: str, value: Any, told: str) -> None:
    message = refusal(changed(TINY, {path: value}))
    assert path in message and told in message


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.hidden_size", "128", "must be a whole number from 1 to 2147483647, not '128'"),
        ("text_config.hidden_size", 128.0, "not 128.0"),
        ("text_config.hidden_size", True, "not True"),
        ("text_config.hidden_size", -1, "not -1"),
        ("text_config.hidden_size", 2**40, "not 1099511627776"),
        pytest.param("text_config.hidden_size", 10**5000, "must be a whole number from 1", id="huge"),
        ("text_config.num_hidden_layers", 10**9, "from 1 to 10000"),
        ("text_config.num_key_value_heads", 3, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ("text_config.num_experts_per_tok", 9, "num_active 9 exceeds num_experts 8"),
        ("text_config.eos_token_id", 320, "eos_id 320 is outside the vocabulary of 320"),
        ("text_config.rms_norm_eps", float("nan"), "must be a positive number, not nan"),
        ("text_config.rope_theta", 10**400, "must be a positive number"),
        ("text_config.partial_rotary_factor", 0.51, "not a whole number of channels"),
        ("text_config.moe_layer_freq", [0, 1, 1], "for each of the 4 layers, not a list of 3"),
        ("text_config.moe_layer_freq", 1, "must list 0 or 1 for each of the 4 layers, not 1"),
        ("text_config.layer_types", ["full_attention"] * 4, "disagree"),
        ("text_config.layer_types", ["mamba"] * 4, "must list 'full_attention' or 'minimax_m3_sparse'"),
        ("text_config.index_topk_blocks", 5, "sparse_topk_blocks is 4 but text_config.index_topk_blocks is 5"),
        (S + "sparse_attention_freq", ..., "sparse_attention_freq is missing"),
        (S + "sparse_local_block", 5, "num_local 5 must not exceed num_selected 4"),
        ("text_config.sparse_attention_config", [], "must be an object, not []"),
        ("text_config.tie_word_embeddings", "no", "must be true or false, not 'no'"),
        ("vision_config.num_attention_heads", 3, "vision_config: hidden_size 160 is not a multiple of num_heads 3"),
        ("text_config.head_dim", ..., "text_config.head_dim is missing"),
    ],
)
def test_refuses_impossible_values(path: str, value: Any, told: str) -> None:
    assert told in refusal(changed(TINY, {path: value}))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("model_type", "llama", "minimax_m3_vl"),
        ("architectures", ["MixtralForCausalLM"], "MiniMaxM3SparseForConditionalGeneration"),
        ("architectures", "MiniMaxM3", "MiniMaxM3SparseForConditionalGeneration"),
    ],
)
def test_names_a_foreign_architecture(field: str, value: Any, accepted: str) -> None:
    message = refusal(changed(TINY, {field: value}))
    assert repr(value) in message and accepted in message


def test_one_error_names_every_field() -> None:
    changes = {"text_config.qk_norm_type": "full", S + "sparse_init_block": 1, "text_config.head_dim": ...}
    message = refusal(changed(TINY, changes | {"text_config.vocab_size": "320", "vision_config.rope_mode": "2d"}))
    for name in ("qk_norm_type", "sparse_init_block", "head_dim", "vocab_size", "rope_mode"):
        assert name in message


def test_dense_model_may_turn_sparse_attention_off() -> None:
    off = {S + "use_sparse_attention": False, S + "sparse_attention_freq": [0] * 4, S + "sparse_score_type": "lse"}
    assert ModelConfig.from_hf(changed(TINY, off)).layer_types == ("full",) * 4


def test_unknown_extras_are_ignored() -> None:
    extra = {"text_config.num_mtp_modules": 7, "transformers_version": "5", "text_config.model_type": "minimax_m2"}
    assert ModelConfig.from_hf(changed(TINY, extra)) == ModelConfig.from_hf(TINY)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    assert ModelConfig.from_file(tmp_path) == ModelConfig.from_file(path) == ModelConfig.from_hf(TINY)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no config.json at"),
        (b"{", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not readable JSON"),
        (b"[" * 200_000, "is not readable JSON"),
    ],
)
def test_from_file_errors(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_file(tmp_path)


def paths_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in values.items():
        paths.append(prefix + name)
        if isinstance(value, dict):
            paths += paths_of(value, f"{prefix}{name}.")
    return paths


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-4, 300), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.parametrize("values", [TINY, IN_TREE], ids=["published", "in_tree"])
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_fields_raise_only_config_errors(values: dict[str, Any], data: st.DataObject) -> None:
    fuzzed = copy.deepcopy(values)
    for path in data.draw(st.lists(st.sampled_from(paths_of(values)), min_size=1, max_size=4, unique=True)):
        *sections, name = path.split(".")
        section: Any = fuzzed
        for key in sections:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = data.draw(JSON_VALUES)
            if data.draw(st.booleans()):
                del section[name]
    try:
        config = ModelConfig.from_hf(fuzzed)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert ModelConfig.from_hf(config.to_hf()) == config
