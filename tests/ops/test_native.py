"""Finding the native operators: levels, reasons when they are missing, and nothing read outside its tensors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openm3.ops import native
from openm3.ops.attention import dense_attention, sparse_attention
from openm3.ops.cases import PackedCase, packed
from openm3.ops.index import select_blocks
from openm3.ops.norm import rms_norm

needs_native = pytest.mark.skipif(native.missing() is not None, reason="needs the native operators")


def in_a_new_process(level: str, code: str) -> str:
    script = f"from openm3.ops import native\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OPENM3_LEVEL": level, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_native
def test_levels_are_those_of_the_processor_best_first() -> None:
    found = native.levels()
    assert found[-1] == "portable"
    assert list(found) == [level for level in native.LEVELS if level in found]
    assert native.loaded() is native.module(found[0])
    assert native.missing() is None


@needs_native
@pytest.mark.parametrize("level", native.levels())
def test_a_level_can_be_chosen(level: str) -> None:
    assert in_a_new_process(level, "print(native.loaded().__name__)").endswith(f"_cpu_{level}")


@pytest.mark.parametrize(
    ("level", "reason"),
    [("none", "switched off by OPENM3_LEVEL=none"), ("avx1024", "OPENM3_LEVEL=avx1024 is not one of")],
)
def test_without_native_code_the_reason_is_said_and_the_others_run(level: str, reason: str) -> None:
    code = """
import torch
from openm3.ops.cases import PACKED, packed
from openm3.ops.index import SELECT_BLOCKS, new_codes
p = packed(PACKED[4])
print(native.missing())
print(SELECT_BLOCKS.choose(p.index_q_TGJ, p.index_k_MBJ, *p.where, 4, 1).name, new_codes(p.index_k_MBJ))
"""
    first, second = in_a_new_process(level, code).splitlines()
    assert first.startswith(reason) if native.levels() else first.startswith("not compiled")
    assert second == "blocked None"


@needs_native
@given(data=st.data())
def test_arbitrary_tables_and_ids_raise_or_stay_inside(data: st.DataObject) -> None:
    """Whatever page tables, lengths and block ids hold: a ValueError, or numbers computed inside the tensors."""
    p = packed(PackedCase(name="fuzz", num_tokens=(3, 0, 2), lengths=(300, 40, 2), block_size=16))
    wild = st.one_of(st.integers(-3, 40), st.sampled_from([-(2**31), 2**31 - 1, 1 << 20]))

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for _ in range(data.draw(st.integers(0, 3))):
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(wild)
        return x

    where = tuple(spoiled(x) for x in p.where)
    block_TGK = spoiled(p.block_TGK)
    for call in (
        lambda: select_blocks(p.index_q_TGJ, p.index_k_MBJ, *where, num_selected=4),
        lambda: sparse_attention(p.q_TNH, p.k_MGBH, p.v_MGBH, *where, block_TGK, scale=0.25),
        lambda: dense_attention(p.q_TNH, p.k_MGBH, p.v_MGBH, *where, scale=0.25),
    ):
        try:
            assert call().shape[0] == 5
        except ValueError as error:
            assert str(error)


def test_a_torch_that_lends_no_tensors_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    native.missing.cache_clear()
    try:
        assert "it has no __dlpack_c_exchange_api__" in str(native.refusal(torch.zeros(1)))
    finally:
        native.missing.cache_clear()


@needs_native
@pytest.mark.parametrize("level", native.levels())
def test_tensors_are_borrowed_as_they_lie(level: str) -> None:
    """Views, parameters and gradients do not matter; what is no tensor of this machine's memory is refused."""
    module = native.module(level)
    assert module is not None
    x, weight = torch.arange(24.0).view(4, 6)[1:, 1:4], torch.nn.Parameter(torch.zeros(3))
    out, wanted = torch.empty(3, 3), rms_norm(x, weight.detach(), 1e-6)
    for rows in (x, x.clone().requires_grad_()):
        module.rms_norm(rows, weight, 1e-6, out, 1)
        torch.testing.assert_close(out, wanted)
    for other in (x.numpy(), x.to("meta"), None, [1.0]):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.rms_norm(other, weight, 1e-6, out, 1)
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        module.rms_norm(x.double(), weight, 1e-6, out, 1)
    with pytest.raises(ValueError, match="wrong number of axes"):
        module.rms_norm(x[0], weight, 1e-6, out, 1)


@pytest.mark.skipif(
    native.missing() is not None or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="needs the native operators and a system with huge pages",
)
def test_huge_pages_are_asked_for_and_nothing_is_lost() -> None:
    x = torch.zeros(4 << 20)
    assert native.on_huge_pages(x) is x
    assert not x.any()
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= x.data_ptr() + x.nbytes // 2 < int(span[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert "hg" in flags.split()


def test_blank_tensors_are_zeros_that_begin_on_a_line_or_a_huge_page() -> None:
    cpu = torch.device("cpu")
    for shape, dtype, align in (((3, 5), torch.bfloat16, 64), ((1000, 700), torch.float32, native.HUGE)):
        x = native.blank(shape, dtype, cpu)
        assert (tuple(x.shape), x.dtype, x.is_contiguous()) == (shape, dtype, True)
        assert x.data_ptr() % align == 0 and not x.any()
        x.fill_(1)
        assert float(x.sum()) == x.numel()
    assert native.blank((0, 4), torch.uint8, cpu).shape == (0, 4)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_threads_are_released_and_come_back() -> None:
    code = """
import os, torch
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
work = lambda: torch.ones(1 << 20).exp()
work()
busy = count()
native.release_threads()
print(busy - count())
work()
print(busy - count())
"""
    assert in_a_new_process(native.levels()[0], code).split() == ["2", "0"]
