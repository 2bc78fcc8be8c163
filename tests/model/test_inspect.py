"""Reports on checkpoints and bare configs: right numbers, readable tables, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from openm3.errors import CheckpointError, ConfigError
from openm3.model.inspect import render, report

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "m3-random-s0/model"
M3 = GOLDEN / "m3-config.json"


def test_checkpoint_report() -> None:
    values = report(TINY)
    assert values["weights"] == {"tensors": 180, "files": 1, "dtypes": {"F32": 180}}
    assert values["layers"] == [
        {"layers": "0", "count": 1, "attention": "full", "mlp": "dense"},
        {"layers": "1-3", "count": 3, "attention": "sparse", "mlp": "moe"},
    ]
    assert values["memory_bytes"]["total"] == 4 * values["parameters"]["total"] == 4 * 2_298_904
    assert values["cache_bytes_per_token"] == {"kv": 2048, "index": 384, "total": 2432}
    assert json.loads(json.dumps(values))["config"]["vocab_size"] == 320


@pytest.mark.parametrize("path", [TINY, M3])
def test_parts_agree_with_the_cost_model(path: Path) -> None:
    values = report(path)
    counts, memory = values["parameters"], values["memory_bytes"]
    size = 4 if values["weights"] else 2
    for part, count in counts.items():
        if part not in ("active", "total", "router"):
            assert memory[part] == size * count, part
    assert memory["router"] == 4 * counts["router"]
    assert memory["total"] == sum(memory.values()) - memory["total"]


def test_bare_config_of_m3() -> None:
    values = report(M3)
    assert values["weights"] is None
    assert values["parameters"]["total"] == 427_040_140_160
    assert [entry["context"] for entry in values["cost_per_token"]] == [8192, 131072, 1048576]
    longest = values["cost_per_token"][-1]
    share = longest["flops"]["index scan"] / longest["flops"]["total"]
    assert longest["index_scan_share"]["flops"] == share and 0.28 < share < 0.29


def test_folder_with_only_a_config(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    values = report(tmp_path)
    assert values["weights"] is None and values["parameters"] == report(TINY)["parameters"]
    assert "not checked: only a config here" in render(values)


def test_rendered_m3() -> None:
    text = render(report(M3))
    for line in (
        "Model      60 layers of width 6,144, vocabulary 200,064, 1,048,576 positions",
        "Selection  16 blocks of 128 tokens (1 local), index width 128",
        "3-59       57  sparse     moe",
        "total           427,040,140,160  100.0%  854.17 GB",
        "kv              122,880 B    1.01 GB  16.11 GB  128.85 GB",
        "index            14,592 B  119.54 MB   1.91 GB   15.30 GB",
    ):
        assert line in text.splitlines(), line
    *_, longest = text.splitlines()
    assert longest.split() == ["1M", "217.57", "GFLOP", "28.1%", "49.1%", "71.54", "GB", "21.4%", "9.3%"]
    assert all(len(line) <= 80 and line == line.rstrip() for line in text.splitlines()[1:])


def test_rendered_checkpoint_says_that_it_is_whole() -> None:
    text = render(report(TINY))
    assert text.splitlines()[0] == str(TINY)
    assert "Weights    all 180 tensors are there, in 1 file: 180 in F32" in text
    assert "beyond the model's" not in text


def test_dense_model_with_a_short_limit(tmp_path: Path) -> None:
    values = json.loads((TINY / "config.json").read_text())
    del values["vision_config"]
    values["text_config"] |= {"max_position_embeddings": 32768, "moe_layer_freq": [0] * 4}
    values["text_config"]["sparse_attention_config"]["sparse_attention_freq"] = [0] * 4
    (tmp_path / "config.json").write_text(json.dumps(values))
    text = render(report(tmp_path))
    assert "Selection" not in text and "Experts" not in text and "Vision     none" in text
    assert text.endswith("* beyond the model's 32,768 positions") and "1M*" in text
    assert ["index", "0", "B", "0", "B", "0", "B", "0", "B"] in [line.split() for line in text.splitlines()]


def test_errors_are_those_of_the_parts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        report(tmp_path)
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="no weights"):
        report(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="torn"):
        report(folder)
