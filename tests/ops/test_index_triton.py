"""Block selection in Triton: the reference's blocks, through every tile, on a GPU or in Triton's interpreter."""

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops.cases import PACKED, Packed, PackedCase, packed
from openm3.ops.index import SELECT_BLOCKS
from openm3.ops.triton import HOPPER


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
    monkeypatch.setattr(kernels, "machine", lambda _device: HOPPER)
    monkeypatch.setattr(kernels, "WORKSPACE", 100)
    choice_tiles = kernels.choice_tiles
    small = {"rows": 8, "depth": 2, "groups": 8, "candidates": 4}
    monkeypatch.setattr(kernels, "choice_tiles", lambda *args: replace(choice_tiles(*args), **small))
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
    ("call", "page_bytes", "wanted"),
    [
        # A chunk of 512 and one of 8192 tokens behind a million, 64 decoding requests, one, and short prompts.
        ((512, 1, 1, 8192), 32 << 10, (128, 128, 32, 8, 3)),
        ((8192, 1, 4, 8192), 32 << 10, (32, 128, 64, 8, 3)),
        ((64, 64, 4, 1024), 32 << 10, (4, 16, 64, 4, 5)),
        ((64, 64, 4, 1024), 16 << 10, (4, 16, 64, 4, 5)),
        ((1, 1, 1, 8192), 16 << 10, (16, 16, 16, 4, 5)),
        ((8, 1, 4, 8192), 16 << 10, (8, 32, 16, 4, 5)),
        ((32, 4, 20, 100), 32 << 10, (6, 128, 4, 8, 3)),
    ],
)
def test_tiles_fill_the_machine(
    call: tuple[int, ...], page_bytes: int, wanted: tuple[int, ...], triton_device: torch.device
) -> None:
    from openm3.ops.index import triton as kernels

    tiles = kernels.scan_tiles(*call, page_bytes, False, HOPPER)
    assert astuple(tiles) == wanted
    assert kernels.scan_tiles(*call, 2 * page_bytes, True, HOPPER).rows <= 32


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ((512, 8192, 16), (1, 16, 256, 8, 128)),
        ((256, 1024, 16), (1, 4, 256, 2, 128)),
        ((32768, 256, 16), (16, 1, 256, 8, 128)),
        ((4, 9000, 300), (1, 2, 2048, 8, 128)),
    ],
)
def test_choice_tiles(call: tuple[int, ...], wanted: tuple[int, ...], triton_device: torch.device) -> None:
    from openm3.ops.index import triton as kernels

    assert astuple(kernels.choice_tiles(*call, HOPPER)) == wanted


def test_ties_everywhere_in_several_ranges(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is a candidate, and the smallest are taken; one that is better is taken too."""
    from openm3.ops.index import triton as kernels

    monkeypatch.setattr(kernels, "choice_tiles", lambda *_args: kernels.ChoiceTiles(4, 2, 16, 1, candidates=8))
    case = PackedCase(name="", num_tokens=(2,), lengths=(90 * 128,), num_groups=1, index_values="equal")
    p = packed(case)
    p.index_k_MBJ[p.page_RP[0, 77].long()] = 2.0
    assert selected(case, p, triton_device).tolist() == [[[0, 1, 77, 89]]] * 2


def test_the_workspace_is_bounded(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go through it a few at a time, or one where not even one fits."""
    from openm3.ops.index import triton as kernels

    case, p = named("block_edges"), packed(named("block_edges"))
    sizes, choose = [], kernels._choose

    def watch(batch: kernels.Batch, codes: object, work: kernels.Workspace, *rest: object) -> None:
        sizes.append(work.low_XP.numel() + work.candidate_XP.numel())
        choose(batch, codes, work, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_choose", watch)
    for most, chunks in ((200, 3), (1, 8)):
        monkeypatch.setattr(kernels, "WORKSPACE", most)
        sizes.clear()
        assert torch.equal(selected(case, p, triton_device), wanted(case, p))
        assert len(sizes) == chunks and max(sizes) <= max(most, 2 * 2 * 16)
