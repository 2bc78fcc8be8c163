"""The kernels compile for a Hopper GPU without one, fit into its registers, and use its tensor cores."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

crosscompile = pytest.importorskip("openm3.ops.triton.crosscompile", exc_type=ModuleNotFoundError)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run Python where Triton does not interpret; what it prints last is JSON."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": ":".join(sys.path), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def run(*args: str) -> Any:
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def kernels(python: Callable[..., Any]) -> list[dict[str, Any]]:
    """What bench/kernels.py finds."""
    found: list[dict[str, Any]] = python(str(ROOT / "bench" / "kernels.py"), "--json")["kernels"]
    return found


STEP = """
import json, sys, torch
from dataclasses import replace
from openm3.config import ModelConfig
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.model.replay import Replay
from openm3.ops.triton.crosscompile import compiling
config = ModelConfig.from_file(sys.argv[1])
with torch.device("meta"):
    network = Network(replace(config, layer_types=("full", "sparse"), mlp_types=("dense", "moe"))).bfloat16()
network.layers[1].mlp.router.float()
with compiling() as kernels, torch.inference_mode():
    pools = network.new_pools(1024, torch.bfloat16)
    pages = torch.arange(1024, dtype=torch.int32)
    Replay(network, pools, pages.to("meta"))._step(1024)
    network.hidden(Batch.step(torch.zeros(512, dtype=torch.long), 60_000, pages).to(torch.device("meta")), pools)
print(json.dumps(sorted({k.name for k in kernels})))
"""


def test_a_whole_model_waits_for_nothing(python: Callable[..., Any]) -> None:
    """Meta tensors hold no values: a step that read one on the host would fail."""
    names = python("-c", STEP, str(ROOT / "tests" / "golden" / "m3-config.json"))
    assert {"_write_heads", "encode_touched", "scan_codes", "take_best", "_attend_split", "_gate_up"} <= set(names)
    assert {"scan_keys", "_attend_tile", "_attend_items"} <= set(names)


def test_every_kernel_fits_into_registers_and_shared_memory(kernels: list[dict[str, Any]]) -> None:
    assert {k["operator"] for k in kernels} >= {
        "select_blocks",
        "sparse_attention",
        "dense_attention",
        "write_heads",
        "sample",
    }
    for k in kernels:
        # So that two programs share a multiprocessor, this one leaves what it needs between items on the stack.
        most = 96 if k["name"] == "_attend_items" else 0
        assert k["stack_bytes"] <= most and k["at_once"] >= 1, k


@pytest.mark.parametrize("operator", ["select_blocks", "sparse_attention", "dense_attention", "experts"])
def test_chunks_use_the_products_of_warpgroups(operator: str, kernels: list[dict[str, Any]]) -> None:
    chunks = [k for k in kernels if k["operator"] == operator and "8,192 tokens" in k["shape"]]
    assert any(k["products"].get("wgmma") and k["copies"] for k in chunks)
    assert not any(k["products"].get("mma") for k in chunks)


def test_scans_of_few_rows_use_warpgroups_and_leave_room_for_others(kernels: list[dict[str, Any]]) -> None:
    """Reading is what takes time there: four pages of codes, or two of keys, are waited for at once."""
    at_once = {"scan_keys": 2, "scan_codes": 4, "score_candidates": 3}
    decoding = [k for k in kernels if k["name"] in at_once and " request" in k["shape"]]
    assert {k["name"] for k in decoding} == set(at_once)
    for k in decoding:
        assert set(k["products"]) == {"wgmma"} and k["copies"] and k["at_once"] >= at_once[k["name"]], k


def test_programs_at_once_follow_from_what_a_program_takes() -> None:
    def kernel(num_warps: int, registers: int, shared_bytes: int) -> Any:
        return crosscompile.Compiled("", (3, 4), num_warps, 3, registers, 0, shared_bytes, {}, 0)

    assert kernel(8, 194, 98324).programs == 12
    assert kernel(8, 194, 98324).at_once == 1
    assert kernel(4, 128, 37136).at_once == 4


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="start without TRITON_INTERPRET=1"), crosscompile.compiling():
        pass
