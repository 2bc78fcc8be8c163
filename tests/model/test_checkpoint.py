"""Reading and writing the published layout: exact round trips, and one clear error for everything that is wrong."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openm3.config import ModelConfig
from openm3.errors import CheckpointError
from openm3.model import checkpoint
from openm3.model.checkpoint import check, fold, load_into, ranges, read, write
from openm3.model.layout import layout

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0/model"
CONFIG = ModelConfig.from_file(GOLDEN)
MODEL = "language_model.model."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def respell(folder: Path, change: Any) -> None:
    """Rewrite the single weight file after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(CheckpointError) as error:
        read(folder, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_read_puts_tensors_in_place() -> None:
    params, stored = read(GOLDEN, CONFIG, vision=True), load_file(GOLDEN / "model.safetensors")
    assert params["embed.weight"].equal(stored[MODEL + "embed_tokens.weight"])
    experts = MODEL + "layers.2.block_sparse_moe.experts."
    assert params["layers.2.mlp.experts.gate_up"][5, :64].equal(stored[experts + "5.w1.weight"])
    assert params["layers.2.mlp.experts.gate_up"][5, 64:].equal(stored[experts + "5.w3.weight"])
    assert params["layers.2.mlp.experts.down"][7].equal(stored[experts + "7.w2.weight"])
    assert params["layers.0.mlp.gate_up.weight"][256:].equal(stored[MODEL + "layers.0.mlp.up_proj.weight"])
    assert params["layers.1.attn.index_q.weight"].equal(stored[MODEL + "layers.1.self_attn.index_q_proj.weight"])
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    assert params["vision.patch_embed.weight"].shape == (160, 3, 2, 14, 14)
    assert params["vision.patch_embed.weight"].equal(stored[patch])
    assert params["projector.merge_1.weight"].equal(stored["patch_merge_mlp.linear_1.weight"])


def test_text_alone_leaves_vision_out() -> None:
    params = read(GOLDEN, CONFIG)
    assert not any(name.startswith(("vision.", "projector.")) for name in params)
    assert {param.name for param in layout(replace(CONFIG, vision=None))} == params.keys()


def test_dtype_spares_the_router() -> None:
    params, exact = read(GOLDEN, CONFIG, dtype=torch.bfloat16), read(GOLDEN, CONFIG)
    router = {name for name in params if ".router." in name}
    assert len(router) == 6
    for name, value in params.items():
        expected = exact[name] if name in router else exact[name].bfloat16()
        assert value.dtype == expected.dtype and value.equal(expected), name


def test_load_into_fills_in_place_and_casts() -> None:
    exact = read(GOLDEN, CONFIG)
    params = {name: torch.full_like(value, torch.nan, dtype=torch.float64) for name, value in exact.items()}
    pointers = {name: value.data_ptr() for name, value in params.items()}
    load_into(params, GOLDEN, CONFIG)
    assert all(params[name].equal(value.double()) for name, value in exact.items())
    assert pointers == {name: value.data_ptr() for name, value in params.items()}


def test_load_in_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_MAPPED_BYTES", 50_000)
    params, stored = read(GOLDEN, CONFIG), load_file(GOLDEN / "model.safetensors")
    assert params["head.weight"].equal(stored["language_model.lm_head.weight"])
    assert params["layers.3.attn.o.weight"].equal(stored[MODEL + "layers.3.self_attn.o_proj.weight"])


def test_round_trip_gives_the_same_file(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, read(GOLDEN, CONFIG, vision=True))
    assert (tmp_path / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert ModelConfig.from_file(tmp_path) == CONFIG
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_sharded_round_trip(tmp_path: Path) -> None:
    params = read(GOLDEN, CONFIG, vision=True)
    for name in ("one", "two"):
        write(tmp_path / name, CONFIG, params, max_shard_bytes=2_000_000)
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert all(shard.stat().st_size < 2_020_000 for shard in shards)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    index = json.loads((tmp_path / "one/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params.values())
    assert len(index["weight_map"]) == 180
    again = read(tmp_path / "one", CONFIG, vision=True)
    assert again.keys() == params.keys() and all(again[name].equal(value) for name, value in params.items())


def test_write_in_bfloat16_and_read_back(tmp_path: Path) -> None:
    text = replace(CONFIG, vision=None)
    write(tmp_path, text, read(GOLDEN, CONFIG), dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in check(tmp_path, text).items()}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        f"{MODEL}layers.{layer}.block_sparse_moe.{name}"
        for layer in (1, 2, 3)
        for name in ("gate.weight", "e_score_correction_bias")
    }
    first = read(tmp_path, text)
    write(tmp_path, text, first)
    second = read(tmp_path, text)
    assert all(second[name].equal(value) and second[name].dtype == value.dtype for name, value in first.items())


def test_write_replaces_an_older_checkpoint(tmp_path: Path) -> None:
    params = read(GOLDEN, CONFIG, vision=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    write(tmp_path, CONFIG, params)
    write(tmp_path, CONFIG, params, max_shard_bytes=4_000_000)
    assert not (tmp_path / "model.safetensors").exists()
    write(tmp_path, CONFIG, params)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


def test_tied_head_is_not_stored(tmp_path: Path) -> None:
    tied = replace(CONFIG, vision=None, tie_embeddings=True)
    params = {name: value for name, value in read(GOLDEN, CONFIG).items() if name != "head.weight"}
    write(tmp_path, tied, params)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert read(tmp_path, tied).keys() == params.keys()


def test_write_names_every_wrong_parameter(tmp_path: Path) -> None:
    params = read(GOLDEN, CONFIG)
    del params["norm.weight"]
    params |= {
        "extra": torch.zeros(1),
        "embed.weight": torch.zeros(320, 127),
        "head.weight": torch.zeros(320, 128).int(),
    }
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "new", CONFIG, params)
    message = str(error.value)
    for told in (
        "missing ",
        "norm.weight",
        "unexpected extra",
        "embed.weight has shape [320, 127] instead of [320, 128]",
        "head.weight has dtype torch.int32",
    ):
        assert told in message
    assert not (tmp_path / "new").exists()


def test_failed_write_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "_write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(folder, CONFIG, read(GOLDEN, CONFIG, vision=True), dtype=torch.bfloat16)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_mtp_tensors_are_ignored(folder: Path) -> None:
    extra = {MODEL + "mtp.layers.0.enorm.weight": torch.zeros(3), "mtp.x": torch.zeros(3, dtype=torch.int8)}
    respell(folder, lambda tensors: tensors.update(extra))
    assert read(folder, CONFIG).keys() == read(GOLDEN, CONFIG).keys()


def test_one_error_names_every_tensor(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[MODEL + "norm.weight"]
        for expert in range(8):
            del tensors[f"{MODEL}layers.2.block_sparse_moe.experts.{expert}.w2.weight"]
        del tensors["vision_tower.vision_model.pre_layrnorm.bias"]
        tensors[MODEL + "layers.1.self_attn.index_v_proj.weight"] = torch.zeros(2, 2)
        tensors["language_model.lm_head.weight"] = torch.zeros(128, 320)
        tensors[MODEL + "layers.0.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.int8)

    respell(folder, spoil)
    message = refusal(folder)
    for told in (
        MODEL + "norm.weight",
        MODEL + "layers.2.block_sparse_moe.experts.{0-7}.w2.weight",
        "vision_tower.vision_model.pre_layrnorm.bias",
        f"unexpected {MODEL}layers.1.self_attn.index_v_proj.weight",
        "language_model.lm_head.weight has shape [128, 320] instead of [320, 128]",
        MODEL + "layers.0.mlp.up_proj.weight has dtype I8 instead of F32, BF16, F16, F8_E4M3",
    ):
        assert told in message


def test_nothing_is_changed_before_the_error(folder: Path) -> None:
    respell(folder, lambda tensors: tensors.pop(MODEL + "norm.weight"))
    params = {name: torch.zeros_like(value) for name, value in read(GOLDEN, CONFIG).items()}
    with pytest.raises(CheckpointError, match="missing"):
        load_into(params, folder, CONFIG)
    assert not any(value.any() for value in params.values())


def test_vision_tensors_are_unexpected_without_a_vision_config() -> None:
    message = refusal(GOLDEN, replace(CONFIG, vision=None))
    assert "unexpected multi_modal_projector.linear_1.bias" in message and "missing" not in message


@pytest.mark.parametrize("size", [0, 1, 7, 100, 30_000, 9_000_000])
def test_truncated_file(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is torn or not a safetensors file" in refusal(folder)


def test_spoilt_headers_raise_only_checkpoint_errors(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            spoilt[draw.randrange(20_000 if draw.random() < 0.7 else 8)] = draw.randrange(256)
        file.write_bytes(spoilt)
        try:
            check(folder, CONFIG)
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "sharded", CONFIG, read(GOLDEN, CONFIG, vision=True), max_shard_bytes=4_000_000)
    return tmp_path / "sharded"


def test_missing_and_torn_shards_are_named(sharded: Path) -> None:
    second = sharded / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    assert "model-00002-of-00003.safetensors is torn" in refusal(sharded)
    second.unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    message = refusal(sharded)
    assert "are missing: 'model-00002-of-00003.safetensors', 'model-00003-of-00003.safetensors'" in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_index_may_not_leave_the_folder(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["language_model.lm_head.weight"] = name
    index.write_text(json.dumps(values))
    assert f"may only name files beside it, not {name!r}" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 200_000])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    message = refusal(sharded)
    assert "model.safetensors.index.json" in message and ("not readable JSON" in message or "weight_map" in message)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    name = "language_model.lm_head.weight"
    first = sharded / "model-00001-of-00003.safetensors"
    save_file(load_file(first) | {name: torch.zeros(320, 128)}, first)
    assert f"{name} is in both" in refusal(sharded)


def test_no_weights(tmp_path: Path) -> None:
    assert "there is neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_fold_and_ranges() -> None:
    assert ranges([5, 0, 1, 2]) == "0-2,5"
    names = [f"a.{layer}.b.{expert}.w" for layer in range(3) for expert in range(4)]
    assert fold(names) == ["a.{0-2}.b.{0-3}.w"]
    assert fold([*names, "a.7.b.1.w", "x.01", "x.02"]) == ["a.7.b.1.w", "a.{0-2}.b.{0-3}.w", "x.01", "x.02"]
    assert fold([]) == []
