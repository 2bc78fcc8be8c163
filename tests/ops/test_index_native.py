"""The certified scan: whatever the codes lose, the selection is the definition's, at every instruction-set level."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from openm3.ops import native
from openm3.ops.cases import PACKED, Packed, PackedCase, packed
from openm3.ops.index import IndexCodes, encode_pages, new_codes, reference, select_blocks
from openm3.ops.index.native import counted

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native operators")

B, J = 128, 128


@pytest.fixture(params=native.levels(), autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Each level that this processor runs, in place of the best one."""
    found = native.module(request.param)
    assert found is not None
    monkeypatch.setattr(native, "loaded", lambda: found)
    return found


def codes_of(index_k_MBJ: Tensor) -> IndexCodes:
    codes = new_codes(index_k_MBJ)
    assert codes is not None
    encode_pages(index_k_MBJ, torch.arange(index_k_MBJ.shape[0]) * index_k_MBJ.shape[1], codes)
    return codes


def one_request(index_q_TGJ: Tensor, index_k_MBJ: Tensor, length: int) -> tuple[Any, ...]:
    """Arguments of a selection for the last tokens of one request, its pages in order."""
    pages = torch.arange(index_k_MBJ.shape[0], dtype=torch.int32)[None]
    return index_q_TGJ, index_k_MBJ, pages, torch.tensor([0, index_q_TGJ.shape[0]]), torch.tensor([length])


def whole(shape: tuple[int, ...], generator: torch.Generator, most: int = 3) -> Tensor:
    """Small whole numbers: every sum of their products is exact, so selections can be compared bit by bit."""
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def adversarial(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [5, 2, J] and 40 pages of keys that are hard on eight bits."""
    generator = torch.Generator().manual_seed(1)
    q, k = whole((5, 2, J), generator), whole((40, B, J), generator)
    if kind == "outlier":
        # One huge number a block: everything else rounds to nothing in its codes.
        k[torch.arange(40), torch.randint(0, B, (40,)), 7] = 4096.0
    elif kind == "equal":
        k[:] = k[0, 0]
    elif kind == "zeros":
        k[::2] = 0
    elif kind == "zero query":
        q[1:3] = 0
    elif kind == "nonfinite":
        k[3, 5, 0], k[4, 6, 1], k[5, 7, 2] = math.nan, math.inf, -math.inf
        k[9] = math.nan
        q[2, 0, 3] = math.nan
        q[3, 1, 3] = math.inf
    elif kind == "tiny":
        k[:20] *= 2.0**-133
        q[:2] *= 2.0**-10
    elif kind == "large":
        k[:20] *= 2.0**90
        q[3:] *= 2.0**20
    elif kind == "nearly equal":
        # Blocks differ by one unit in one number out of 16,384 of about the same size.
        k[:] = 3.0
        k[torch.arange(40), 17, torch.arange(40)] += 1.0
        q[:] = 1.0
    return q.to(dtype), k.to(dtype)


KINDS = ("plain", "outlier", "equal", "zeros", "zero query", "nonfinite", "tiny", "large", "nearly equal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_keys_select_by_the_definition(kind: str, dtype: torch.dtype) -> None:
    q, k = adversarial(kind, dtype)
    for length in (40 * B, 37 * B + 1):
        call = one_request(q, k, length)
        wanted = reference.select_blocks(*call, 16, 1)
        assert torch.equal(select_blocks(*call), wanted)
        assert torch.equal(select_blocks(*call, codes=codes_of(k)), wanted)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_codes_change_nothing(case: PackedCase) -> None:
    p: Packed = packed(case)
    codes = codes_of(p.index_k_MBJ)
    counts = {"num_selected": case.num_selected, "num_local": case.num_local}
    plain = select_blocks(p.index_q_TGJ, p.index_k_MBJ, *p.where, **counts)
    assert torch.equal(select_blocks(p.index_q_TGJ, p.index_k_MBJ, *p.where, **counts, codes=codes), plain)


@pytest.mark.parametrize("width", [2, 64])
def test_a_million_tokens_select_by_the_definition(width: int) -> None:
    """Widths that matrix tiles take and that they do not."""
    generator = torch.Generator().manual_seed(3)
    q, k = whole((2, 4, width), generator), whole(((1 << 20) // B, B, width), generator).bfloat16()
    call = one_request(q.bfloat16(), k, 1 << 20)
    assert torch.equal(select_blocks(*call, codes=codes_of(k)), reference.select_blocks(*call, 16, 1))


def test_bounds_hold() -> None:
    """Every product of a query with a key is as close to that of their codes as the page's bounds say."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn((6, B, 50), generator=generator) * torch.tensor([1e-4, 1.0, 1e4, 1.0, 1.0, 1.0])[:, None, None]
    k[3, :, ::7] *= 100
    codes = codes_of(k)
    tiles = codes.code_MC.view(6, B // 16, 13, 16, 4)
    code = (tiles.permute(0, 1, 3, 2, 4).reshape(6, B, 52)[..., :50].double() - 128) * codes.bound_M3[:, 0, None, None]
    lost = (k.double() - code).norm(dim=-1).amax(-1)
    assert (lost <= codes.bound_M3[:, 1]).all() and (lost > 0.9 * codes.bound_M3[:, 1]).all()
    size = code.norm(dim=-1).amax(-1)
    assert (size <= codes.bound_M3[:, 2]).all() and (size > 0.99 * codes.bound_M3[:, 2]).all()


def test_few_blocks_are_looked_at_again() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn((512, B, J), generator=generator).bfloat16()
    q = torch.randn((6, 4, J), generator=generator).bfloat16()
    call = one_request(q, k, 512 * B)
    blocks, statistics = counted(*call, 16, 1, codes_of(k))
    assert torch.equal(blocks, reference.select_blocks(*call, 16, 1))
    assert statistics.scanned_blocks == 511 * 24
    assert 15 * 24 <= statistics.rescored_blocks < 0.15 * statistics.scanned_blocks
    assert statistics.rescored_keys < 8 * statistics.rescored_blocks
    keys = 511 * B
    assert statistics.nbytes == keys * J + statistics.rescored_keys * J * 2
    assert statistics.operations == 2 * J * (24 * keys + statistics.rescored_keys)


def test_codes_that_know_nothing_are_harmless() -> None:
    """What the reference writes: infinite bounds, so every key is looked at."""
    q, k = adversarial("plain", torch.float32)
    codes = codes_of(k)
    reference.encode_pages(k, torch.arange(0, 40, 3) * B, codes)
    call = one_request(q, k, 40 * B)
    assert torch.equal(select_blocks(*call, codes=codes), reference.select_blocks(*call, 16, 1))


def test_keys_that_come_one_by_one_select_by_the_definition() -> None:
    """Larger and larger ones, ones that break codes, and again over a page that held others before."""
    generator = torch.Generator().manual_seed(5)
    q, k = whole((2, 2, J), generator), torch.zeros(9, B, J)
    codes = new_codes(k)
    assert codes is not None
    encode_pages(k, torch.arange(8) * B, codes)
    k[:8] = whole((8, B, J), generator)
    encode_pages(k, torch.arange(8) * B, codes)
    call = one_request(q, k, 9 * B)
    for broken in (math.inf, math.nan):
        for slot in range(B):
            k[5, slot] = whole((J,), generator) * (1 + slot // 8)
            if slot in (50, 90):
                k[5, slot, 3] = broken
            encode_pages(k, torch.tensor([5 * B + slot]), codes)
            if slot % 16 == 0 or slot in (1, 50, 51, 90, 127):
                wanted = reference.select_blocks(*call, 4, 1)
                assert torch.equal(select_blocks(*call, num_selected=4, codes=codes), wanted)
        assert torch.equal(codes.bound_M3[5], codes_of(k).bound_M3[5])
        k[5, 50:91] = 0
        encode_pages(k, torch.arange(50, 91) + 5 * B, codes)
        assert torch.equal(codes.code_MC[5], codes_of(k).code_MC[5])


def test_small_and_large_requests_side_by_side_select_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(6)
    counts, lengths = [1, 1, 40, 1, 3, 0, 1, 1], [1000, 1280, 1200, 70, 900, 500, 1279, 1]
    k = whole((10, B, J), generator)
    pages = torch.stack([torch.randperm(10, generator=generator) for _ in counts]).int()
    where = pages, torch.tensor([0, *counts]).cumsum(0), torch.tensor(lengths)
    case = (whole((sum(counts), 2, J), generator), k, *where)
    wanted = reference.select_blocks(*case, 4, 1)
    assert torch.equal(select_blocks(*case, num_selected=4, codes=codes_of(k)), wanted)
    assert torch.equal(select_blocks(*case, num_selected=4), wanted)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    call = one_request(
        torch.randn((70, 2, 32), generator=generator), torch.randn((60, B, 32), generator=generator), 7600
    )
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        found.append(select_blocks(*call))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"page_RP": torch.tensor([[0, 1, 9]], dtype=torch.int32)},
            "page 9 of request 0 is outside the pool of 3 pages",
        ),
        ({"page_RP": torch.tensor([[0, -1, 2]], dtype=torch.int32)}, "page -1 of request 0 is outside"),
    ],
    ids=["beyond", "negative"],
)
def test_pages_outside_the_pool_raise(change: dict[str, Tensor], message: str) -> None:
    call = dict(
        zip(
            ("index_q_TGJ", "index_k_MBJ", "page_RP", "start_R1", "length_R"),
            one_request(torch.ones(1, 1, 4), torch.ones(3, B, 4), 3 * B),
            strict=True,
        )
    )
    with pytest.raises(ValueError, match=message):
        select_blocks(**(call | change))
