"""Finding Triton: nothing imports it before a kernel runs, and every refusal says why."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from openm3.ops import triton
from openm3.ops.dispatch import use


def in_a_new_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_nothing_imports_triton_before_a_kernel_runs() -> None:
    code = """
import sys, openm3
from openm3.ops.cases import PACKED, packed
from openm3.ops.index import SELECT_BLOCKS
p = packed(PACKED[4])
SELECT_BLOCKS(p.index_q_TGJ, p.index_k_MBJ, *p.where, 4, 1)
print("triton" in sys.modules)
"""
    assert in_a_new_process(code) == "False"


def test_the_interpreter_runs_only_where_triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    x, away = torch.ones(2), torch.ones(2, device="meta")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use("triton"):
        assert triton.refusal(x) == "needs CUDA tensors, not cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refusal(x) == "needs CUDA tensors, not cpu"
    with use("triton"):
        assert triton.refusal(x) is None
        assert triton.refusal(away) == "needs CUDA tensors, not meta"


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(2, dtype=torch.float64), "takes float32, bfloat16 and float16, not float64"),
        (torch.ones(2, requires_grad=True), "has no gradients"),
    ],
)
def test_refusals_say_why(x: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use("triton"):
        assert triton.refusal(torch.ones(2), x) == reason


def test_only_pools_may_have_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, pool = torch.ones(2), torch.ones(2, dtype=torch.float8_e4m3fn)
    with use("triton"):
        assert triton.refusal(x, stored=[pool]) is None
        assert triton.refusal(pool) == "takes float32, bfloat16 and float16, not float8_e4m3fn"
        wrong = triton.refusal(x, stored=[torch.ones(2, dtype=torch.int8)])
        assert wrong == "takes float32, bfloat16, float16 and float8_e4m3fn, not int8"


def test_an_implementation_refuses_the_device_before_it_loads() -> None:
    nowhere = triton.implementation("nowhere", "nothing")
    assert nowhere.supports((torch.ones(2, device="meta"),), 3) == "needs CUDA tensors, not meta"


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda _name: None)
    assert triton.missing.__wrapped__() == "Triton is not installed (pip install triton)"


def test_tiles_are_powers_of_two() -> None:
    assert [triton.padded(size) for size in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]
    assert triton.padded(3, least=16) == 16
    assert triton.machine(torch.device("cpu")) == triton.INTERPRETER
