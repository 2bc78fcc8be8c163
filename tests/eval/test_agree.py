"""The recorded text cases hold, and what must not pass does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openm3
from openm3 import cli
from openm3.errors import CheckpointError
from openm3.eval.agree import Agreement, compare
from openm3.model.model import Model, load

RECORDED = Path(__file__).parents[1] / "golden/m3-random-s0"
GOLDEN = RECORDED / "golden"
TEXT = [
    *("chat", "short", "edge127", "edge128", "edge129", "edge257", "long"),
    *("batch_right", "batch_row0", "batch_row1", "batch_row2"),
]
MEDIA = ["image0", "image1", "image_two", "video", "video_resized"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(RECORDED / "model")


@pytest.fixture(scope="module")
def cases(model: Model) -> dict[str, Agreement]:
    return {case.case: case for case in compare(model, GOLDEN)}


def part(folder: Path, *names: str) -> Path:
    """A recording of some of the cases."""
    folder.mkdir(exist_ok=True)
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    manifest["cases"] = {name: info for name, info in manifest["cases"].items() if name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in names:
        shutil.copy(GOLDEN / f"{name}.safetensors", folder)
    return folder


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A recording to spoil."""
    return part(tmp_path / "recorded", "edge257")


def respell(recording: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = recording / "edge257.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", TEXT)
def test_recorded_case(cases: dict[str, Agreement], name: str) -> None:
    case = cases[name]
    assert (case.verdict, case.ok) == ("agrees", True)
    assert case.logit_error is not None and case.logit_error < 2e-4
    assert (case.blocks_differ, case.greedy_differ) == (0, 0)
    # Three sparse layers of two groups select for every token of the prompt and for 23 decoded ones.
    decoded = 0 if name == "batch_right" else 23
    assert case.blocks + case.near_ties == 6 * (case.tokens + decoded)
    assert case.greedy == (24 if decoded else 0)


def test_selection_off_differs_as_it_must(cases: dict[str, Agreement]) -> None:
    case = cases["long_dense"]
    assert (case.verdict, case.ok, case.tokens) == ("differs, as it must", True, 1500)
    assert case.logit_error is not None and case.logit_error > 1


@pytest.mark.parametrize("name", MEDIA)
def test_recorded_pictures_and_videos(cases: dict[str, Agreement], name: str) -> None:
    case = cases[name]
    assert (case.verdict, case.ok) == ("agrees", True)
    assert case.logit_error is not None and case.logit_error < 2e-4
    assert (case.blocks_differ, case.greedy_differ, case.greedy) == (0, 0, 24)
    assert case.blocks + case.near_ties == 6 * (case.tokens + 23)
    assert case.pixel_error is not None and case.pixel_error < 2.1 / 255
    if name == "image_two":  # no features were recorded
        assert case.vision_error is None
    else:
        assert case.vision_error is not None and case.vision_error < 5e-5


def test_every_case_is_compared(cases: dict[str, Agreement]) -> None:
    assert sorted(cases) == sorted([*TEXT, "long_dense", *MEDIA])


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda tensors: tensors["pixel_values"].add_(0.05), "logit_error"),
        (lambda tensors: tensors["image_u8"].clamp_(8), "pixel_error"),
        (lambda tensors: tensors["image_embeds"].add_(1e-3), "vision_error"),
    ],
)
def test_what_is_seen_otherwise_differs(
    model: Model, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], sign: str
) -> None:
    recording = part(tmp_path, "image0")
    tensors = load_file(recording / "image0.safetensors")
    change(tensors)
    save_file(tensors, recording / "image0.safetensors")
    (case,) = compare(model, recording)
    limits = {"logit_error": 2e-4, "pixel_error": 2.1 / 255, "vision_error": 2e-4}
    assert not case.ok and getattr(case, sign) > limits[sign]


def test_a_model_that_sees_nothing_skips_pictures(model: Model, tmp_path: Path) -> None:
    blind = Model(model.network, model.tokenizer, "blind")
    blind.config = replace(model.config, vision=None)
    (case,) = compare(blind, part(tmp_path, "image0"))
    assert case == Agreement("image0", "skipped: the model sees no pictures")


def test_pixels_without_their_grids_are_refused(model: Model, tmp_path: Path) -> None:
    recording = part(tmp_path, "image_two")
    tensors = load_file(recording / "image_two.safetensors")
    del tensors["image_grid_thw"]
    save_file(tensors, recording / "image_two.safetensors")
    with pytest.raises(CheckpointError, match="image_grid_thw does not describe"):
        list(compare(model, recording))


def test_reference_agrees_too(model: Model, tmp_path: Path) -> None:
    recording = part(tmp_path / "small", "chat", "short", "edge127", "edge128", "edge129", "edge257", "batch_row2")
    with openm3.use("reference"):
        assert [case.verdict for case in compare(model, recording)] == ["agrees"] * 7


def test_command_prints_a_table(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    assert cli.main(["agree", str(recording), "--model", str(RECORDED / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:4] == ["|", "edge257", "|", "257"]
    assert lines[2].endswith("| agrees  |")
    assert lines[-1].startswith("all 1 compared cases are as they should be")


def test_command_prints_one_json_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    part(tmp_path / "golden", "short")
    (tmp_path / "model").symlink_to(RECORDED / "model")
    assert cli.main(["agree", str(tmp_path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["agrees"], values["tolerance"]) == (True, 2e-4)
    assert values["cases"][0].keys() == Agreement.__dataclass_fields__.keys()
    assert values["cases"][0]["case"] == "short" and values["cases"][0]["greedy"] == 24


def test_changed_weight_is_outside_tolerance(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(RECORDED / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.2.self_attn.v_proj.weight"][3, 5] += 0.01
    save_file(tensors, folder / "model.safetensors")
    assert cli.main(["agree", str(recording), "--model", str(folder)]) == 1
    assert "\noutside tolerance: edge257 (" in capsys.readouterr().out


def test_model_without_selection_is_found_out(tmp_path: Path) -> None:
    folder = shutil.copytree(RECORDED / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sparse_attention_config"]["sparse_topk_blocks"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    recording = part(tmp_path / "golden", "long", "long_dense")
    long, dense = compare(load(folder), recording)
    assert (long.verdict, long.ok) == ("differs", False)
    assert long.blocks_differ > 1000 and long.logit_error is not None and long.logit_error > 1
    assert (dense.verdict, dense.ok) == ("agrees, but must not: the model does not select", False)
    assert cli.main(["agree", str(tmp_path)]) == 1


def test_blocks_are_compared_where_the_margin_is_clear(model: Model, recording: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.2"][0, 1, 200] = torch.tensor([0, -1, -1, -1])
        tensors["gen_blocks.3"][0, 0, 5] = torch.tensor([2, 0, -1, -1])

    respell(recording, swap)
    (case,) = compare(model, recording)
    assert (case.blocks_differ, case.blocks, case.near_ties, case.ok) == (2, 6 * 280, 0, False)
    respell(recording, lambda tensors: tensors["block_margin.2"][0, 1, 200].fill_(0.9e-4))
    respell(recording, lambda tensors: tensors["gen_block_margin.3"][0, 0, 5].fill_(0.0))
    (case,) = compare(model, recording)
    assert (case.blocks_differ, case.blocks, case.near_ties, case.ok) == (0, 6 * 280 - 2, 2, True)


def test_order_of_recorded_blocks_does_not_matter(model: Model, recording: Path) -> None:
    respell(recording, lambda tensors: tensors.update({"blocks.1": tensors["blocks.1"].flip(-1).contiguous()}))
    (case,) = compare(model, recording)
    assert case.ok


def test_greedy_tokens_that_differ_are_counted(model: Model, recording: Path) -> None:
    respell(recording, lambda tensors: tensors["gen_ids"][0, -2:].add_(1))
    (case,) = compare(model, recording)
    assert (case.greedy_differ, case.greedy, case.ok) == (2, 24, False)


def test_logits_of_the_last_positions_alone(model: Model, recording: Path) -> None:
    respell(recording, lambda tensors: tensors.update(logits=tensors["logits"][:, -16:].contiguous()))
    assert [case.ok for case in compare(model, recording)] == [True]


def test_nan_is_a_difference(model: Model, recording: Path) -> None:
    respell(recording, lambda tensors: tensors["logits"][0, 7, 7].fill_(torch.nan))
    (case,) = compare(model, recording)
    assert not case.ok and case.logit_error is not None and case.logit_error > 1e38


def refusal(capsys: pytest.CaptureFixture[str], recording: Path, model: Path = RECORDED / "model") -> str:
    assert cli.main(["agree", str(recording), "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_nothing_recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "expected manifest.json there or in its folder golden" in refusal(capsys, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cases": []}', '{"cases": {"a": 1}}'])
def test_broken_manifest(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(capsys, tmp_path)


def test_missing_and_torn_cases(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    file = recording / "edge257.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "edge257.safetensors is torn or not a safetensors file" in refusal(capsys, recording)
    file.unlink()
    assert "lacks the recorded cases edge257" in refusal(capsys, recording)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("logits"), "must hold input_ids [R, S] and logits [R, n, V]"),
        (lambda t: t.pop("block_margin.2"), "has blocks without block_margin for layers 2"),
        (lambda t: t["attention_mask"][0, 0].fill_(0), "is not padded at the right"),
        (
            lambda t: t.update(logits=t["logits"][..., :300].contiguous()),
            "records 300 logits a token, the model has 320",
        ),
        (lambda t: t["input_ids"][0, 3].fill_(320), "token id 320 is outside the vocabulary of 320"),
    ],
)
def test_unusable_case(
    capsys: pytest.CaptureFixture[str], recording: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    respell(recording, change)
    assert message in refusal(capsys, recording)


def test_no_model(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    assert "no checkpoint folder at" in refusal(capsys, recording, recording / "nowhere")
