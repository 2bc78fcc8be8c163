"""Costs of the real M3 to the printed digit, and agreement with the parameter table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from openm3.config import ModelConfig
from openm3.model import cost
from openm3.model.layout import layout

GOLDEN = Path(__file__).parents[1] / "golden"
M3 = ModelConfig.from_file(GOLDEN / "m3-config.json")
TINY = ModelConfig.from_file(GOLDEN / "m3-random-s0/model")


def test_m3_parameters_in_billions() -> None:
    counts = cost.parameters(M3)
    text = counts["total"] - counts["head"] - counts["vision"] - counts["projector"]
    assert f"{counts['total'] / 1e9:.2f}" == "427.04"
    assert f"{text / 1e9:.2f}" == "424.95"
    assert f"{counts['head'] / 1e9:.2f}" == f"{counts['embeddings'] / 1e9:.2f}" == "1.23"
    assert f"{counts['vision'] / 1e9:.3f}" == "0.631"
    assert f"{counts['projector'] / 1e9:.3f}" == "0.234"


def test_m3_active_parameters() -> None:
    """57 layers of four routed experts, and everything else of the text model but 200,063 embedding rows."""
    counts = cost.parameters(M3)
    text = counts["total"] - counts["vision"] - counts["projector"]
    idle_experts = 57 * (128 - 4) * 3 * 6144 * 3072
    assert counts["active"] == text - idle_experts - 200_063 * 6144


@pytest.mark.parametrize(
    "config",
    [
        M3,
        TINY,
        replace(TINY, vision=None),
        replace(TINY, tie_embeddings=True),
        replace(TINY, layer_types=("sparse",) * 4, mlp_types=("dense",) * 4),
    ],
)
def test_parts_add_up_to_the_table(config: ModelConfig) -> None:
    counts = cost.parameters(config)
    table = {param.name: math.prod(param.shape) for param in layout(config)}
    assert counts["total"] == sum(table.values())

    def of(*words: str) -> int:
        return sum(size for name, size in table.items() if any(word in name for word in words))

    assert counts["vision"] == of("vision.") and counts["projector"] == of("projector.")
    assert counts["experts"] == of(".experts.") and counts["router"] == of(".router.")
    assert counts["index"] == of(".index_q.", ".index_k.")


def test_tied_table_is_active_whole() -> None:
    tied = cost.parameters(replace(TINY, tie_embeddings=True))
    assert tied["head"] == 0
    assert tied["active"] == cost.parameters(TINY)["active"] - TINY.hidden_size


def test_m3_cache_bytes() -> None:
    assert cost.kv_bytes_per_token(M3) == 122_880
    assert cost.index_bytes_per_token(M3) == 14_592
    assert cost.kv_bytes_per_token(M3, dtype_bytes=1) == 61_440


def test_sparse_attention_stops_growing_and_the_index_scan_does_not() -> None:
    short, long = cost.flops_per_token(M3, 65_536), cost.flops_per_token(M3, 1_048_576)
    assert short["index scan"] == 57 * 2 * 4 * 128 * 65_536
    assert long["index scan"] == 16 * short["index scan"]
    per_token = 4 * 64 * 128
    assert short["attention"] == per_token * (57 * 2048 + 3 * 65_536)
    assert long["attention"] == per_token * (57 * 2048 + 3 * 1_048_576)
    # In a sparse layer the two are equal at 64K tokens.
    assert short["index scan"] == 57 * per_token * 2048
    assert long["total"] == sum(value for name, value in long.items() if name != "total")


def test_linear_work_is_twice_the_active_weights() -> None:
    flops, counts = cost.flops_per_token(M3, 1), cost.parameters(M3)
    linear = flops["total"] - flops["attention"] - flops["index scan"]
    biases = 57 * 128
    assert linear == 2 * (counts["active"] - counts["norms"] - biases - M3.hidden_size)


def test_short_context_attends_all_of_it() -> None:
    assert cost.attended_tokens(TINY, 100) == 100
    assert cost.attended_tokens(TINY, 5000) == 4 * 128
    assert cost.flops_per_token(TINY, 100)["attention"] == 4 * 8 * 64 * 4 * 100


def test_bytes_read_for_a_token() -> None:
    read, counts = cost.bytes_per_token(M3, 1_048_576), cost.parameters(M3)
    assert read["weights"] == 2 * counts["active"] + 2 * counts["router"]
    assert read["index keys"] == 14_592 * 1_048_576
    assert read["kv"] == 2 * 4 * 128 * 2 * (57 * 2048 + 3 * 1_048_576)
    assert read["total"] == read["weights"] + read["index keys"] + read["kv"]
    quantised = cost.bytes_per_token(M3, 4096, weight_bytes=1, cache_bytes=1)
    assert quantised["index keys"] * 2 == cost.bytes_per_token(M3, 4096)["index keys"]
    assert quantised["weights"] == counts["active"] + 3 * counts["router"]
