"""The certified scan in Triton: whatever the codes lose, the selection is the reference's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import openm3
from openm3.ops import index, native
from openm3.ops.cases import MILLION, PACKED, Packed, PackedCase, packed
from openm3.ops.index import ENCODE_PAGES, SELECT_BLOCKS, IndexCodes, empty_codes, encode_pages, new_codes
from openm3.ops.triton import HOPPER

FEW = [case for case in PACKED if sum(case.num_tokens) * case.num_groups <= 140]
"""Those whose rows the interpreter soon scores one by one."""

DECODE = PackedCase(name="decode", num_tokens=(1, 2), lengths=(1700, 1100), index_dim=32, num_selected=4)
"""Thirteen blocks for four places, so that the scan has something to leave out."""


def on(device: torch.device, p: Packed) -> Packed:
    return Packed(*(x.to(device) for x in p))


def first_slots(p: Packed) -> Tensor:
    """A slot of each page."""
    return torch.arange(p.index_k_MBJ.shape[0], device=p.index_k_MBJ.device) * p.index_k_MBJ.shape[1]


def codes_of(p: Packed) -> IndexCodes:
    codes = new_codes(p.index_k_MBJ)
    assert codes is not None and codes.code_MC.dtype == torch.int8
    encode_pages(p.index_k_MBJ, first_slots(p), codes)
    return codes


def selected(case: PackedCase, p: Packed, codes: IndexCodes | None) -> Tensor:
    counts = case.num_selected, case.num_local
    block_TGK: Tensor = SELECT_BLOCKS(p.index_q_TGJ, p.index_k_MBJ, *p.where, *counts, codes)
    return block_TGK.cpu()


def wanted(case: PackedCase, p: Packed) -> Tensor:
    with openm3.use("reference"):
        return selected(case, Packed(*(x.cpu() for x in p)), None)


def counts_of_candidates(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Fills with the candidates of each row, how many they are, once blocks are selected."""
    from openm3.ops.index import triton as kernels

    found, choose = [], kernels._choose

    def watch(batch: kernels.Batch, codes: IndexCodes | None, work: kernels.Workspace, *rest: object) -> None:
        choose(batch, codes, work, *rest)  # type: ignore[arg-type]
        found.append(work.count_X.cpu())

    monkeypatch.setattr(kernels, "_choose", watch)
    return found


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_codes_change_nothing(case: PackedCase, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from openm3.ops.index import triton as kernels

    monkeypatch.setattr(kernels, "FEW_ROWS", 1 << 10)
    p = on(triton_device, packed(case))
    assert torch.equal(selected(case, p, codes_of(p)), wanted(case, p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["block_edges", "as_many_tokens_as_groups"])
def test_codes_of_narrow_dtypes(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    case = next(case for case in PACKED if case.name == name)
    p = on(triton_device, packed(case, dtype=dtype))
    assert torch.equal(selected(case, p, codes_of(p)), wanted(case, p))


def adversarial(kind: str) -> Packed:
    """The decoding batch with keys and queries that are hard on eight bits; every sum of products is exact."""
    p = packed(DECODE)
    q, k = p.index_q_TGJ, p.index_k_MBJ
    pages = torch.arange(k.shape[0])
    if kind == "outlier":
        k[pages, pages % 128, 7] = 10000.0
    elif kind == "equal":
        k[:], q[:] = k[p.page_RP[0, 0], 0], 1.0
    elif kind == "zeros":
        k[::2], q[1] = 0.0, 0.0
    elif kind == "tiny":
        k[:20] *= 2.0**-133
        q[:2] *= 2.0**-10
    elif kind == "tiny everywhere":
        k *= 2.0**-70
        q *= 2.0**-40
    elif kind == "large":
        k[:20] *= 2.0**90
        q[1:] *= 2.0**20
    elif kind == "overflow":
        k *= 2.0**80
        q *= 2.0**60
    elif kind == "nonfinite":
        k[pages[::3], 5, 0], k[pages[1::3], 6, 1], k[pages[2::6], 7, 2] = math.nan, math.inf, -math.inf
        k[::7] = math.nan
        q[1, 0, 3], q[2, 1, 3] = math.nan, math.inf
    elif kind == "nearly equal":
        # Blocks differ by one unit in one number out of 4096 of about the same size.
        k[:], q[:] = 3.0, 1.0
        k[pages, 17, pages % 32] += 1.0
    return p


KINDS = (
    *("plain", "outlier", "equal", "zeros", "tiny", "tiny everywhere", "large", "overflow"),
    *("nonfinite", "nearly equal"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_keys_select_by_the_definition(kind: str, triton_device: torch.device) -> None:
    p = on(triton_device, adversarial(kind))
    assert torch.equal(selected(DECODE, p, codes_of(p)), wanted(DECODE, p))


@pytest.mark.parametrize("num_local", [2, 4])
def test_local_blocks_need_no_codes(num_local: int, triton_device: torch.device) -> None:
    case = replace(DECODE, num_local=num_local)
    p = on(triton_device, packed(case))
    assert torch.equal(selected(case, p, codes_of(p)), wanted(case, p))


def test_normal_numbers_select_the_same_with_codes_and_without(triton_device: torch.device) -> None:
    """Both scans multiply the same tiles, so not even what rounding decides differs."""
    case = replace(DECODE, index_values="normal", index_dim=40)
    p = on(triton_device, packed(case, dtype=torch.bfloat16))
    assert torch.equal(selected(case, p, codes_of(p)), selected(case, p, None))


def test_few_blocks_are_looked_at_again(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PackedCase(name="", num_tokens=(2,), lengths=(12000,), index_dim=128, index_values="normal", num_selected=16)
    p = on(triton_device, packed(case, dtype=torch.bfloat16))
    codes, counts = codes_of(p), counts_of_candidates(monkeypatch)
    plain, coded = selected(case, p, None), selected(case, p, codes)
    assert torch.equal(coded, plain)
    assert (counts[0] >= 16).all() and (counts[0] <= 20).all()
    assert (counts[1] >= counts[0]).all() and (counts[1] <= 48).all()


def test_bounds_hold(triton_device: torch.device) -> None:
    """Keys are as close to their codes as the page's bounds say, and these are tight."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn((6, 128, 50), generator=generator) * torch.tensor([1e-4, 1.0, 1e4, 1.0, 1.0, 1.0])[:, None, None]
    k[3, :, ::7] *= 100
    k = k.to(triton_device)
    codes = new_codes(k)
    assert codes is not None and codes.code_MC.shape == (6, 128 * 64)
    assert codes.bound_M3[:, 1].isinf().all()
    encode_pages(k, torch.arange(6, device=k.device) * 128, codes)
    rows = codes.code_MC.view(6, 128, 64)
    assert (rows[..., 50:] == 0).all() and rows.abs().amax() == 127
    coded = rows[..., :50].double() * codes.bound_M3[:, 0, None, None]
    lost, size = (k.double() - coded).norm(dim=-1).amax(-1), coded.norm(dim=-1).amax(-1)
    assert (lost <= codes.bound_M3[:, 1]).all() and (lost > 0.99 * codes.bound_M3[:, 1]).all()
    assert (size <= codes.bound_M3[:, 2]).all() and (size > 0.99 * codes.bound_M3[:, 2]).all()


def test_scores_lie_in_brackets_as_wide_as_what_keys_lose(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries lose next to nothing: they have two digits."""
    from openm3.ops.index import triton as kernels

    case = PackedCase(name="", num_tokens=(16,), lengths=(2560,), index_dim=50, index_values="normal", num_groups=1)
    p = packed(case)
    p = on(triton_device, p._replace(index_q_TGJ=p.index_q_TGJ * torch.logspace(-12, 10, 16)[:, None, None]))
    codes, found, choose = codes_of(p), [], kernels._choose

    def watch(batch: kernels.Batch, codes: IndexCodes | None, work: kernels.Workspace, *rest: object) -> None:
        found.extend([work.low_XP[:, :19].double(), work.high_XP[:, :19].double()])
        choose(batch, codes, work, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_choose", watch)
    selected(case, p, codes)
    low_XP, high_XP = found
    q, page = p.index_q_TGJ[:, 0].double(), p.page_RP[0, :19].long()
    score_XP = torch.stack([(q @ p.index_k_MBJ[m].double().T).amax(-1) for m in page], dim=1)
    assert (low_XP <= score_XP).all() and (score_XP <= high_XP).all()
    assert (high_XP - low_XP <= 2.05 * q.norm(dim=1)[:, None] * codes.bound_M3[page, 1]).all()


def test_pages_are_encoded_as_they_are_written(triton_device: torch.device) -> None:
    """Only touched pages, each as it stands; padding has no slot; a page that is written again loses what it was."""
    k = torch.full((5, 128, 16), torch.nan, device=triton_device)
    codes = empty_codes(k)
    k[1, :3], k[3], k[4] = 1.0, 2.0, 3.0
    slot_T = torch.tensor([128, 129, 130, 3 * 128 + 5, -1, 130, 5 * 128], device=k.device)
    encode_pages(k, slot_T, codes)
    # What follows the last key may be anything, NaN too: then nothing is known of the page.
    assert codes.bound_M3[:, 1].isinf().tolist() == [True, True, True, False, True]
    k[1], k[3] = 4.0, -2.0
    encode_pages(k, slot_T[:4], codes)
    assert codes.bound_M3[:, 1].isinf().tolist() == [True, False, True, False, True]
    assert (codes.code_MC[1] == 127).all() and (codes.code_MC[3] == -127).all()
    assert torch.allclose(codes.bound_M3[:, 2], torch.tensor([0.0, 16.0, 0.0, 8.0, 0.0], device=k.device), rtol=1e-3)
    before = [x.clone() for x in codes]
    encode_pages(k, slot_T[:4].flip(0), codes)
    encode_pages(k, slot_T[:0], codes)
    assert all(torch.equal(*both) for both in zip(before, codes, strict=True))
    # The first page is not taken for that of padding before it.
    k[0] = 5.0
    encode_pages(k, torch.tensor([-1, 7], device=k.device), codes)
    assert codes.bound_M3[0, 1].isfinite()


def test_writes_keep_codes_true(triton_device: torch.device) -> None:
    """Through `write_pages`, token by token: the selection is that of the keys at any time."""
    from openm3.ops.cache import Pool, write_pages

    p = on(triton_device, packed(DECODE))
    k_MBJ = p.index_k_MBJ
    kv = torch.zeros((k_MBJ.shape[0], 1, 128, 4), device=k_MBJ.device)
    pool = Pool(kv, kv.clone(), k_MBJ, codes_of(p))
    block = int(p.page_RP[0, 7])
    for step in range(3):
        slot_T = torch.tensor([block * 128 + step, block * 128 + 9 + step], device=k_MBJ.device)
        new_TJ = (p.index_q_TGJ[0, :1] * (step + 1) * 10).expand(2, -1)
        write_pages(kv[:2, :, 0], kv[:2, :, 0], new_TJ, pool, slot_T)
        block_TGK = selected(DECODE, p, pool.codes)
        assert torch.equal(block_TGK, wanted(DECODE, p)) and 7 in block_TGK[0, 0]


def test_codes_that_know_only_some_pages_are_harmless(triton_device: torch.device) -> None:
    p = on(triton_device, packed(DECODE))
    codes = empty_codes(p.index_k_MBJ)
    encode_pages(p.index_k_MBJ, first_slots(p)[::3], codes)
    assert torch.equal(selected(DECODE, p, codes), wanted(DECODE, p))
    with openm3.use("reference"):
        encode_pages(p.index_k_MBJ, first_slots(p), codes)
    assert codes.bound_M3[:, 1].isinf().all()


def test_a_batch_and_its_parts_select_the_same(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests alone, tokens alone, and a workspace of few tokens on a machine to fill."""
    from openm3.ops.index import triton as kernels

    p = on(triton_device, packed(replace(DECODE, num_tokens=(8, 8))))
    codes = codes_of(p)

    def part(r: int, begin: int, end: int) -> Tensor:
        start_R1 = torch.tensor([0, end - begin], device=p.length_R.device)
        where = p.page_RP[r : r + 1], start_R1, p.length_R[r : r + 1] - 8 * (r + 1) + end
        block_TGK: Tensor = SELECT_BLOCKS(p.index_q_TGJ[begin:end], p.index_k_MBJ, *where, 4, 1, codes)
        return block_TGK

    whole = SELECT_BLOCKS(p.index_q_TGJ, p.index_k_MBJ, *p.where, 4, 1, codes)
    assert torch.equal(torch.cat([part(0, 0, 3), part(0, 3, 8), part(1, 8, 16)]), whole)
    monkeypatch.setattr(kernels, "machine", lambda _device: HOPPER)
    monkeypatch.setattr(kernels, "WORKSPACE", 1600)
    assert torch.equal(SELECT_BLOCKS(p.index_q_TGJ, p.index_k_MBJ, *p.where, 4, 1, codes), whole)


def test_a_million_tokens(triton_device: torch.device) -> None:
    """With large blocks in the interpreter, where every step counts."""
    case = MILLION if triton_device.type == "cuda" else replace(MILLION, block_size=8192)
    p = on(triton_device, packed(case))
    block_TGK = wanted(case, p)
    assert torch.equal(selected(case, p, None), block_TGK)
    assert torch.equal(selected(case, p, codes_of(p)), block_TGK)


def test_each_scan_has_its_own_layout(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of tiles are not Triton's: it looks at the keys. Codes of rows are not native code's: it refuses."""
    p = on(triton_device, packed(DECODE))
    rows, tiles = codes_of(p), IndexCodes(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 3))
    assert torch.equal(selected(DECODE, p, tiles), wanted(DECODE, p))
    encoders = {i.name: i for i in ENCODE_PAGES.implementations}
    reason = encoders["triton"].supports(p.index_k_MBJ, first_slots(p), tiles)
    assert reason == "makes codes of rows (int8), not of tiles (uint8)"
    assert encoders["triton"].supports(p.index_k_MBJ, first_slots(p), rows) is None
    with pytest.raises(ValueError, match=r"codes and bounds of \[4, 4096\] and \[4, 3\] are not those of a pool of"):
        selected(DECODE, p, IndexCodes(rows.code_MC[:4], rows.bound_M3[:4]))
    if native.missing() is None and triton_device.type == "cpu":
        reason = encoders["native"].supports(p.index_k_MBJ, first_slots(p), rows)
        assert reason == "takes codes in tiles (uint8), not int8"
        with openm3.use("native"):
            ours = new_codes(p.index_k_MBJ)
        assert ours is not None and ours.code_MC.dtype == torch.uint8
    with openm3.use("reference"):
        assert new_codes(p.index_k_MBJ) is None


def test_code_bytes() -> None:
    assert index.code_bytes(128, 50, torch.device("cuda")) == 128 * 64 + 12
    assert index.code_bytes(128, 50) == (0 if native.missing() else 128 * 52 + 12)
