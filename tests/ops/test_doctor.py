"""The doctor's report: complete, true to dispatch, and the same table on every machine."""

import argparse
import json

import pytest
import torch

from openm3.ops.doctor import OPERATORS, render, report, run, support_matrix, typical_calls


def test_report_names_every_operator_and_implementation() -> None:
    found = report()
    assert {name: list(rows) for name, rows in found["operators"].items()} == {
        operator.name: [i.name for i in operator.implementations] for operator in OPERATORS
    }
    assert found["torch"] == torch.__version__ and found["cpu"]["threads"] == torch.get_num_threads()
    for operator in OPERATORS:
        answers = found["operators"][operator.name]
        first = next(name for name, devices in answers.items() if devices["cpu"] == "yes")
        assert operator.choose(*typical_calls(torch.device("cpu"), torch.float32)[operator.name]).name == first
        for implementation in operator.implementations:
            answer = answers[implementation.name]["cpu"]
            assert answer != ("yes" if implementation.opt_in else "opt-in")


def test_typical_calls_run() -> None:
    calls = typical_calls(torch.device("cpu"), torch.float32)
    assert set(calls) == {operator.name for operator in OPERATORS}
    for operator in OPERATORS:
        result = operator(*calls[operator.name])
        assert (result is None) == (operator.name in {"write_pages", "encode_pages"})


def test_render_shows_reasons() -> None:
    found = report()
    found["operators"] = {"select_blocks": {"blocked": {"cpu": "needs wings"}, "reference": {"cpu": "yes"}}}
    lines = render(found).splitlines()
    assert lines[0] == f"Python    {found['python']}, PyTorch {found['torch']}"
    assert lines[7].split() == ["operator", "implementation", "device", "runs"]
    assert lines[8].split() == ["select_blocks", "blocked", "cpu", "needs", "wings"]
    assert lines[9].split() == ["reference", "cpu", "yes"]


@pytest.mark.parametrize("as_json", [False, True])
def test_run_prints_the_report(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argparse.Namespace(json=as_json)) == 0
    text = capsys.readouterr().out
    if as_json:
        assert json.loads(text) == report()
    else:
        assert text == render(report()) + "\n"


def test_support_matrix_is_a_table_of_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    table = support_matrix()
    lines = table.splitlines()
    assert lines[0] == "| operator | CPU float32 | CPU bfloat16 | CPU float64 | GPU float32 | GPU bfloat16 | opt-in |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [op.name for op in OPERATORS]
    cpu, gpu = "native, blocked, reference", "triton, reference"
    assert f"| select_blocks | {cpu} | {cpu} | reference | {gpu} | {gpu} |  |" in lines
    assert len({line.count("|") for line in lines}) == 1
    monkeypatch.setattr("openm3.ops.dispatch.missing_compiler", lambda: "no compiler here")
    monkeypatch.setattr("openm3.ops.native.missing", lambda: "not compiled")
    monkeypatch.setattr("openm3.ops.triton.missing", lambda: "not installed")
    assert support_matrix() == table
