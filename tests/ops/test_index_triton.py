"""Block selection in Triton: the reference's blocks, through every tile, on a GPU or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops import triton
from openm3.ops.cases import PACKED, Packed, PackedCase, packed
from openm3.ops.index import SELECT_BLOCKS

H200 = triton.Machine(processors=132, shared_bytes=227 << 10)


def selected(case: PackedCase, p: Packed, device: torch.device) -> Tensor:
    args = (x.to(device) for x in (p.index_q_TGJ, p.index_k_MBJ, *p.where))
    block_TGK: Tensor = SELECT_BLOCKS(*args, case.num_selected, case.num_local)
    return block_TGK.cpu()


def wanted(case: PackedCase, p: Packed) -> Tensor:
    with openm3.use("reference"):
        block_TGK: Tensor = SELECT_BLOCKS(p.index_q_TGJ, p.index_k_MBJ, *p.where, case.num_selected, case.num_local)
    return block_TGK


def named(name: str) -> PackedCase:
    return next(case for case in PACKED if case.name == name)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_selection_is_the_reference(case: PackedCase, triton_device: torch.device) -> None:
    p = packed(case)
    block_TGK = selected(case, p, triton_device)
    assert block_TGK.dtype == torch.int32
    assert torch.equal(block_TGK, wanted(case, p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["block_edges", "verify_eight_tokens", "small_blocks", "nonfinite"])
def test_selection_in_narrow_dtypes(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    p = packed(named(name), dtype=dtype)
    assert torch.equal(selected(named(name), p, triton_device), wanted(named(name), p))


@pytest.mark.parametrize("name", ["block_edges", "three_groups_of_one", "verify_eight_tokens"])
def test_many_programs_select_what_one_does(
    name: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine to fill, a workspace of few tokens and scores in several ranges change nothing."""
    from openm3.ops.index import triton as kernels

    case, p = named(name), packed(named(name))
    monkeypatch.setattr(kernels, "machine", lambda _device: H200)
    monkeypatch.setattr(kernels, "WORKSPACE", 100)
    select_tiles = kernels.select_tiles
    monkeypatch.setattr(kernels, "select_tiles", lambda *args: replace(select_tiles(*args), rows=32, blocks=4))
    assert torch.equal(selected(case, p, triton_device), wanted(case, p))


def test_zeros_of_either_sign_are_equal(triton_device: torch.device) -> None:
    case = PackedCase(name="", num_tokens=(1,), lengths=(2304,), num_groups=1, num_selected=16)
    index_k_MBJ = torch.zeros(18, 128, 8).copysign(torch.randn(18, 1, 1))
    p = packed(case)._replace(index_k_MBJ=index_k_MBJ, page_RP=torch.arange(18)[None].int())
    assert selected(case, p, triton_device).tolist() == [[[*range(15), 17]]]


def test_strides_and_wide_page_tables(triton_device: torch.device) -> None:
    """Keys of other axis orders, page tables of 64 bits with more columns than any request has blocks."""
    case, p = named("mixed_batch"), packed(named("mixed_batch"))
    page_RP = torch.full((p.page_RP.shape[0], 40), -1)
    page_RP[:, : p.page_RP.shape[1]] = p.page_RP
    moved = p._replace(
        index_q_TGJ=p.index_q_TGJ.transpose(0, 1).contiguous().transpose(0, 1),
        index_k_MBJ=p.index_k_MBJ.transpose(1, 2).contiguous().transpose(1, 2),
        page_RP=page_RP,
        start_R1=p.start_R1.long(),
        length_R=p.length_R.long(),
    )
    assert torch.equal(selected(case, moved, triton_device), wanted(case, p))


def test_refusals(triton_device: torch.device) -> None:
    supports = next(i for i in SELECT_BLOCKS.implementations if i.name == "triton").supports
    p = Packed(*(x.to(triton_device) for x in packed(PACKED[0])))
    rest = (*p.where, 4, 1)
    assert supports(p.index_q_TGJ, p.index_k_MBJ, *rest) is None
    assert supports(p.index_q_TGJ.bfloat16(), p.index_k_MBJ, *rest) == (
        "takes queries and keys of one dtype, not torch.bfloat16 and torch.float32"
    )
    wide_q, wide_k = torch.ones(1, 2, 300, device=triton_device), torch.ones(9, 128, 300, device=triton_device)
    assert supports(wide_q, wide_k, *rest) == "takes index keys of up to 256 numbers, not 300"


@pytest.mark.parametrize(
    ("call", "rows", "split"),
    [
        ((512, 1, 1, 8192), 128, 31),
        ((8192, 1, 4, 8192), 128, 64),
        ((64, 64, 4, 1024), 16, 15),
        ((1, 1, 1, 8192), 16, 7),
        ((32, 4, 20, 100), 128, 4),
    ],
)
def test_tiles_fill_the_machine(call: tuple[int, ...], rows: int, split: int, triton_device: torch.device) -> None:
    from openm3.ops.index import triton as kernels

    tiles = kernels.score_tiles(*call, 128 * 128 * 2, False, H200)
    assert (tiles.rows, tiles.split) == (rows, split)
    assert tiles.tokens * call[2] <= rows
    assert kernels.score_tiles(*call, 128 * 128 * 4, True, H200).rows <= 32
