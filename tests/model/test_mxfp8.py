"""MXFP8: what every code and exponent means, and checkpoints stored so, whole and spoilt."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from openm3.config import ModelConfig
from openm3.errors import CheckpointError, ConfigError
from openm3.model import mxfp8
from openm3.model.checkpoint import check, read
from openm3.model.inspect import render, report
from openm3.model.model import load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0/model"
CONFIG = ModelConfig.from_file(GOLDEN)
MODEL = "language_model.model."
QUERY = MODEL + "layers.1.self_attn.q_proj.weight"
EXPERTS = MODEL + "layers.2.block_sparse_moe.experts."
NOT_CODED = ("norm", "embed", "lm_head", "gate.weight", "bias", "vision", "projector", "patch_merge")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint in MXFP8, as the published one is: projections and experts coded, the rest not."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("mxfp8") / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if not any(word in name for word in NOT_CODED)]:
        tensors[name], tensors[name + "_scale_inv"] = mxfp8.encode(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": ["lm_head", "model.embed_tokens"],
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def respell(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def e4m3(code: int) -> float:
    """A code's value, from the format's definition."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    value = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return -value if sign else value


def test_every_code_with_every_exponent() -> None:
    code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(256, 256)
    exponent = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    scale = [math.nan if e == 255 else math.ldexp(1.0, e - 127) for e in range(256)]
    with np.errstate(over="ignore"):
        expected = np.array([[e4m3(c) * s for c in range(256)] for s in scale]).astype(np.float32)
    for stored in (exponent, exponent.view(torch.float8_e8m0fnu)):
        np.testing.assert_array_equal(mxfp8.decode(code, stored).numpy(), expected)
    assert np.isinf(expected[254]).any() and (expected[0, 1:8] > 0).all()


def test_a_short_last_group_has_a_scale() -> None:
    value = torch.cat((torch.ones(3, 64), torch.full((3, 7), 2.0**40)), dim=-1)
    code, exponent = mxfp8.encode(value)
    assert exponent.shape == mxfp8.scale_shape(value.shape) == (3, 3)
    assert mxfp8.decode(code, exponent).equal(value)


def test_what_the_format_holds_is_kept() -> None:
    """Powers of two are kept beside ones eight octaves larger, and zeros as zeros."""
    value = torch.tensor([1.0, -(2.0**-8), 0.0, 1.75] + [0.0] * 28).repeat(5, 2)
    scales = torch.tensor([1.0, 2.0**-110, 2.0**-60, 2.0**100, 2.0**118])[:, None]
    assert mxfp8.decode(*mxfp8.encode(value * scales)).equal(value * scales)


@given(st.integers(-140, 125), st.integers(0, 2**32 - 1), st.integers(1, 70))
def test_encoding_loses_little(power: int, seed: int, width: int) -> None:
    value = torch.randn((3, width), generator=torch.Generator().manual_seed(seed)).clamp(-4, 4) * 2.0**power
    code, exponent = mxfp8.encode(value)
    assert code.float().isfinite().all()
    lost = (mxfp8.decode(code, exponent).double() - value.double()).abs()
    largest = value.double().abs().amax(-1, keepdim=True)
    # Half of the last of four digits; below a group's normal codes, and float32's, half of the smallest step.
    smallest = torch.maximum(largest * 2.0**-17, torch.tensor(2.0**-137, dtype=torch.float64))
    assert (lost <= torch.maximum(value.double().abs() * 2.0**-4, smallest)).all()


# ---- checkpoints


def test_a_checkpoint_is_read_exactly(whole: Path) -> None:
    params, stored = read(whole, CONFIG, vision=True), load_file(whole / "model.safetensors")
    coded = [name for name in stored if name.endswith("_scale_inv")]
    assert len(coded) == 4 * 4 + 3 * 2 + 3 + 3 * (8 * 3 + 3)
    expected = mxfp8.decode(stored[QUERY], stored[QUERY + "_scale_inv"])
    assert params["layers.1.attn.q.weight"].equal(expected)
    up = mxfp8.decode(stored[EXPERTS + "5.w3.weight"], stored[EXPERTS + "5.w3.weight_scale_inv"])
    assert params["layers.2.mlp.experts.gate_up"][5, 64:].equal(up)
    assert params["head.weight"].equal(stored["language_model.lm_head.weight"])
    narrow = read(whole, CONFIG, dtype=torch.bfloat16)["layers.1.attn.q.weight"]
    assert narrow.dtype == torch.bfloat16 and narrow.float().equal(expected)


def test_it_runs_and_is_close_to_the_original(whole: Path) -> None:
    ids = list(range(1, 200))
    exact = load(GOLDEN).logits(ids)
    for model in (load(whole), load(whole, weights="int8")):
        change = (model.logits(ids) - exact).abs().mean() / exact.std()
        assert 0 < change < 0.2


def test_config_says_so(whole: Path) -> None:
    assert ModelConfig.from_file(whole) == CONFIG


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"quant_method": "fp8"}, "quantization_config.quant_method is 'fp8'; openm3 implements only 'mxfp8'"),
        ({"quant_method": "mxfp8", "weight_block_size": [128, 128]}, "weight_block_size is [128, 128]"),
        ({"quant_method": "mxfp8", "scale_fmt": "float"}, "scale_fmt is 'float'; openm3 implements only 'ue8m0'"),
        (["mxfp8"], "quantization_config must be an object"),
    ],
)
def test_other_quantisations_are_refused(folder: Path, section: object, told: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": section}))
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert told in str(error.value)


def test_scales_of_dtype_e8m0(folder: Path) -> None:
    expected = read(folder, CONFIG)

    def retype(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    respell(folder, retype)
    params = read(folder, CONFIG)
    assert all(params[name].equal(value) for name, value in expected.items())


def test_scales_in_another_file(folder: Path) -> None:
    expected = read(folder, CONFIG)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    params = read(folder, CONFIG)
    assert all(params[name].equal(value) for name, value in expected.items())
    scales = folder / "model-00002-of-00002.safetensors"
    scales.write_bytes(scales.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors is torn" in refusal(folder)


def test_one_error_names_every_scale(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for expert in range(8):
            del tensors[f"{EXPERTS}{expert}.w2.weight_scale_inv"]
        tensors[QUERY + "_scale_inv"] = tensors[QUERY + "_scale_inv"][:, :3].contiguous()
        tensors[MODEL + "layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(256, 4)
        tensors[MODEL + "norm.weight_scale_inv"] = torch.ones(4, dtype=torch.uint8)
        tensors["language_model.lm_head.weight"] = torch.zeros(320, 128).to(torch.float8_e5m2)

    respell(folder, spoil)
    message = refusal(folder)
    for told in (
        f"missing {EXPERTS}{{0-7}}.w2.weight_scale_inv",
        f"unexpected {MODEL}norm.weight_scale_inv",
        f"{QUERY}_scale_inv has shape [512, 3] instead of [512, 4]",
        f"{MODEL}layers.0.mlp.up_proj.weight_scale_inv has dtype F32 instead of U8, F8_E8M0",
        "language_model.lm_head.weight has dtype F8_E5M2 instead of F32, BF16, F16, F8_E4M3",
    ):
        assert told in message


def test_nan_codes_and_exponents_are_read_but_not_quantised(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY].view(torch.uint8)[3, 5] = 0xFF
        tensors[QUERY + "_scale_inv"][7, 1] = 255

    respell(folder, spoil)
    bad = read(folder, CONFIG)["layers.1.attn.q.weight"].isnan()
    assert bad[3, 5] and bad[7, 32:64].all() and int(bad.sum()) == 33
    with pytest.raises(CheckpointError, match=f"{QUERY}: NaN and infinities cannot be quantised"):
        load(folder, weights="int8")


def test_inspect_counts_it(whole: Path) -> None:
    values, plain = report(whole), report(GOLDEN)
    counts = values["parameters"]
    assert values["weights"]["dtypes"] == {"F32": 74, "F8_E4M3": 106, "U8": 106}
    assert values["memory_bytes"]["experts"] == counts["experts"] * 33 // 32
    assert values["memory_bytes"]["head"] == plain["memory_bytes"]["head"]
    assert "all 286 tensors are there, in 1 file" in render(values)


@given(st.integers(0, 2**32 - 1))
def test_spoilt_headers_raise_only_checkpoint_errors(whole: Path, seed: int) -> None:
    draw = random.Random(seed)
    spoilt = bytearray((whole / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(spoilt[:8], "little")
    for _ in range(draw.randint(1, 6)):
        spoilt[draw.randrange(8, header)] = draw.choice(b'0123456789[]{},:"FU8E_')
    folder = whole.parent / "spoilt"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(spoilt)
    try:
        check(folder, CONFIG)
        read(folder, CONFIG)
    except CheckpointError as error:
        assert str(error)
