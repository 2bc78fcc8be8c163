"""The GPU benchmark runs, and its baselines compute the same as the operators: tiny cases, in Triton's interpreter."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "bench" / "gpu"


@pytest.fixture
def operators(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_operators", FOLDER / "operators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    return module


def test_it_measures_what_agrees(
    operators: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["operators.py", "--smoke", "--out", str(out)])
    operators.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found == json.loads(out.read_text())
    assert [case["case"] for case in found["cases"]] == ["smoke_chunk", "smoke_decode"]
    for case in found["cases"]:
        assert case["agrees"] and case["largest_difference"] < 1e-5
        assert min(case["ms"].values()) > 0
    assert any("smoke_chunk" in line and " yes " in line for line in lines)


def test_what_cases_count(operators: Any) -> None:
    case = operators.Case("", 512, 2, 1024, (16, 1))
    assert case.scan_operations == 2 * 2 * 128 * sum(range(1025, 1537))
    assert case.attention_operations == 4 * 2 * 512 * 16 * 128 * 1536
    assert operators.Case("", 1, 3, 4095, (16, 2)).bytes_read(1) == 3 * 128 * (4096 + 2 * 2048 * 2 * 2)


def test_neighbours_turn_slowly(operators: Any) -> None:
    x_TGJ = torch.randn(3000, 2, 64, generator=torch.Generator().manual_seed(0))
    y_TGJ = operators._neighbours(x_TGJ)[600:]
    assert abs(float(y_TGJ.std()) - 1) < 0.05

    def alike(apart: int) -> float:
        return float(torch.cosine_similarity(y_TGJ[apart:], y_TGJ[:-apart], dim=-1).mean())

    assert alike(1) > 0.98 and abs(alike(64) - 0.5) < 0.1
