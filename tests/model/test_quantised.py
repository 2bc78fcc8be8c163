"""Models with weights in int8: what is quantised, how near they stay, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import openm3
from openm3.errors import ConfigError
from openm3.model import checkpoint
from openm3.model.model import WEIGHT_GROUPS, Model, load
from openm3.ops.linear import dequantise, quantise

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
IDS = load_file(GOLDEN / "golden/long.safetensors")["input_ids"][0].tolist()
PROJECTIONS = ("q", "k", "v", "o", "index_q", "index_k", "gate_up", "down")

each_form = pytest.mark.parametrize("weights", WEIGHT_GROUPS)


@pytest.fixture(scope="module")
def exact() -> Model:
    return load(GOLDEN / "model")


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_and_experts_are_quantised(weights: str, dtype: torch.dtype) -> None:
    model = load(GOLDEN / "model", dtype=dtype, weights=weights)
    params = checkpoint.read(GOLDEN / "model", model.config, vision=True)
    state = model.network.state_dict()
    group = WEIGHT_GROUPS[weights]
    coded = set()
    for name, value in params.items():
        if name + "_scale" in state:
            coded.add(name)
            expected = quantise(value, group or value.shape[-1])
            assert state[name].equal(expected.code) and state[name + "_scale"].equal(expected.scale)
        else:
            assert state[name].equal(value.to(torch.float32 if ".router." in name else dtype))
    assert len(state) == len(params) + len(coded)
    text = [name for name in params if name.startswith("layers.")]
    wanted = {name for name in text if name.removesuffix(".weight").split(".")[-1] in PROJECTIONS}
    assert coded == wanted and len(coded) == 4 * 4 + 3 * 2 + 2 + 3 * 4


@each_form
def test_outputs_stay_near(exact: Model, weights: str) -> None:
    model = load(GOLDEN / "model", weights=weights)
    logit_TV, exact_TV = model.logits(IDS[:300]), exact.logits(IDS[:300])
    change = (logit_TV - exact_TV).abs().mean() / exact_TV.std()
    assert 0 < change < 0.05
    for leaf, value in model.network.state_dict().items():
        assert not leaf.endswith("_scale") or value.dtype == torch.float32


def test_quantised_is_what_its_weights_mean(exact: Model) -> None:
    """The same logits, up to rounding, as a float model with the dequantised weights."""
    model, wide = load(GOLDEN / "model", weights="int8"), load(GOLDEN / "model")
    state = wide.network.state_dict()
    for name, value in state.items():
        if f"{name}_scale" in model.network.state_dict():
            value.copy_(dequantise(quantise(value, 32)))
    difference = (model.logits(IDS[:400]) - wide.logits(IDS[:400])).abs().max()
    assert difference < 2e-5
    with openm3.use("reference"):
        assert (model.logits(IDS[:400]) - wide.logits(IDS[:400])).abs().max() < 2e-5


@each_form
def test_generate_is_repeated_argmax(weights: str) -> None:
    model = load(GOLDEN / "model", weights=weights)
    made = list(model.generate(IDS[:150], max_new_tokens=6))
    for i, token in enumerate(made):
        assert token == int(model.logits(IDS[:150] + made[:i])[-1].argmax())


def test_half_as_many_bytes_as_bfloat16() -> None:
    def size(model: Model) -> int:
        return sum(x.nbytes for x in (*model.network.layers.parameters(), *model.network.layers.buffers()))

    narrow, coded = (load(GOLDEN / "model", dtype=torch.bfloat16, weights=w) for w in (None, "int8"))
    assert size(coded) < 0.6 * size(narrow)


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights must be 'int8' or 'int8-channel' or None, not 'int4'"):
        load(GOLDEN / "model", weights="int4")


def test_widths_that_make_no_groups(tmp_path: Path, exact: Model) -> None:
    folder = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["shared_intermediate_size"] = 40
    config = openm3.ModelConfig.from_hf(values)
    params = checkpoint.read(GOLDEN / "model", exact.config, vision=True)
    for layer in (1, 2, 3):
        shared = f"layers.{layer}.mlp.shared."
        params[shared + "gate_up.weight"] = params[shared + "gate_up.weight"][:80]
        params[shared + "down.weight"] = params[shared + "down.weight"][:, :40]
    checkpoint.write(folder, config, params)
    with pytest.raises(ConfigError, match=r"groups of 32, but layers\.1\.mlp\.shared\.down\.weight has 40"):
        load(folder, weights="int8")
    assert load(folder, weights="int8-channel").logits([1, 2, 3]).isfinite().all()
