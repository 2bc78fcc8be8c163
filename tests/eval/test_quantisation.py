"""What smaller weights lose: zero for none, little for good ones, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from openm3 import cli
from openm3.eval import quantisation
from openm3.eval.quantisation import FORMS, Quality, measure, opened, render
from openm3.model import mxfp8
from openm3.model.model import load


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Quality]:
    read: list[int] = []
    rows = measure(str(folder), 600, 2, 0, on_progress=read.append)
    assert read == [600] * 2 * len(FORMS)
    return rows


def test_float32_loses_nothing(rows: list[Quality]) -> None:
    exact, *others = rows
    assert tuple(row.weights for row in rows) == FORMS
    assert (exact.mean_change, exact.largest_change, exact.same_choice) == (0.0, 0.0, 1.0)
    # Random weights know nothing of the texts: about the logarithm of the vocabulary, and no better on answers.
    assert abs(exact.loss - math.log(512)) < 3 and abs(exact.answer_loss - exact.loss) < 2
    for row in others:
        assert 0 < row.mean_change < row.largest_change
        assert 0.5 < row.same_choice <= 1 and abs(row.loss - exact.loss) < 0.1


def test_finer_scales_lose_less(rows: list[Quality]) -> None:
    change = {row.weights: row.mean_change for row in rows}
    assert change["int8"] < change["int8-channel"] < change["mxfp8"]


def test_bytes(rows: list[Quality], folder: Path) -> None:
    size = {row.weights: row.bytes for row in rows}
    network = load(folder).network
    coded = sum(weight.numel() for weight in quantisation._layer_weights(network))
    router = sum(x.nbytes for name, x in network.state_dict().items() if ".router." in name)
    assert size["float32"] - size["int8"] == 4 * coded - coded - 4 * coded // 32
    assert size["float32"] - size["mxfp8"] == 4 * coded - coded - coded // 32
    assert 2 * (size["bfloat16"] - router) == size["float32"] - router


def test_mxfp8_weights_are_representable(folder: Path) -> None:
    for weight in quantisation._layer_weights(opened(str(folder), "mxfp8").network):
        assert mxfp8.decode(*mxfp8.encode(weight)).equal(weight)


def test_losses_are_those_of_the_model(rows: list[Quality], folder: Path) -> None:
    model = load(folder)
    maker = quantisation.HaystackMaker(model.tokenizer, 0)
    total, count = 0.0, 0
    for index in range(2):
        ids, _ = maker.make(600, index, quantisation.COUNTS).conversation(model.tokenizer)
        logit_TV = model.logits(ids)[:-1]
        total += float(torch.nn.functional.cross_entropy(logit_TV, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert rows[0].loss == pytest.approx(total / count, rel=1e-5)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "quantisation", "--model", str(folder), "--length", "520", "--count", "1"]
    assert cli.main([*line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["weights"] for row in values["forms"]] == list(FORMS)
    assert values["length"] == 520 and values["texts"] == 1
    assert cli.main(line) == 0
    assert "1 held-out texts of 520 tokens" in capsys.readouterr().out


def test_render() -> None:
    text = render([Quality("int8", 1_500_000, 0.01234, 0.5, 0.9876, 2.0, 0.25)], 4096, 8)
    assert text.splitlines()[0] == "8 held-out texts of 4K tokens with questions; losses in nats a token:"
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["int8", "1.5", "0.0123", "0.500", "98.76%", "2.0000", "0.2500"]
