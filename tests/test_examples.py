"""Every example runs; what it says depends on the model."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests" / "golden" / "m3-random-s0" / "model"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    example("demo").main(["--model", str(CHECKPOINT), "--tokens", "1500"])
    out, err = capsys.readouterr()
    assert err == ""
    assert re.findall(r"^(\d)\. Quote the line that defines \w+\.$", out, re.MULTILINE) == ["1", "2", "3"]
    assert len(re.findall(r"^read [\d,]+ tokens in .* of the context$", out, re.MULTILINE)) == 3
    assert re.search(r"\nAll of it took \d+ s\.\n$", out)
