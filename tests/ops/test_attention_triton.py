"""Attention in Triton: on the GPU or, without one, in Triton's interpreter, which is slow: there on fewer cases."""

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from openm3.ops.attention import dense_attention, reference, sparse_attention, sparse_attention_lse
from openm3.ops.cases import MILLION, PACKED, Packed, PackedCase, packed
from openm3.ops.triton import HOPPER

triton = pytest.importorskip("openm3.ops.attention.triton", exc_type=ModuleNotFoundError)

SCALE = 0.3
ON_GPU = torch.cuda.is_available()
SMALL = (
    PackedCase(name="few", num_tokens=(0, 1, 2, 0, 1), lengths=(5, 40, 97, 0, 16), block_size=16),
    PackedCase(name="tiles", num_tokens=(9, 0, 1, 37), lengths=(70, 9, 33, 37), block_size=16),
    PackedCase(name="odd", num_tokens=(11, 1), lengths=(60, 50), block_size=32, head_dim=5, heads_per_group=3),
    PackedCase(name="many_slots", num_tokens=(10,), lengths=(100,), block_size=16, num_selected=9, num_groups=1),
    PackedCase(name="sixteen", num_tokens=(12, 1), lengths=(150, 140), num_groups=1, heads_per_group=16),
    PackedCase(name="pages", num_tokens=(40,), lengths=(300,), num_groups=1, num_selected=2),
)
DENSE = frozenset(case.name for case in PACKED if ON_GPU or sum(case.num_tokens) < 10)
"""Cases of `PACKED` for dense attention too: in the interpreter those of a few tokens."""


@pytest.fixture(autouse=True)
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the kernels run."""
    if triton_device.type == "cuda":
        yield triton_device
        return
    from triton import language
    from triton.runtime import interpreter

    # The interpreter patches the language anew for each call of a function, and checks all sums of integers.
    modules = {"language": language, "core": language.core}
    patched = interpreter._patch_lang(types.SimpleNamespace(__globals__=modules))
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _function: interpreter._LangPatchScope())
    unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)
    yield triton_device
    patched.restore()


def on(device: torch.device, case: PackedCase, dtype: torch.dtype = torch.float32) -> Packed:
    return Packed(*(x.to(device) for x in packed(case, dtype=dtype)))


def wide(p: Packed) -> Packed:
    return p._replace(q_TNH=p.q_TNH.double(), k_MGBH=p.k_MGBH.double(), v_MGBH=p.v_MGBH.double())


def keys(p: Packed) -> tuple[Any, ...]:
    return p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where


def sparse(p: Packed) -> Tensor:
    return sparse_attention(*keys(p), p.block_TGK, scale=SCALE)


def assert_as_good(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus two units in the largest value's last place."""
    assert got.dtype == plain.dtype and got.shape == truth.shape
    if truth.numel():
        unit = torch.finfo(got.dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 2 * unit


def assert_right(p: Packed) -> None:
    truth_TNH, truth_TN = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    out_TNH, lse_TN = sparse_attention_lse(*keys(p), p.block_TGK, scale=SCALE)
    assert_as_good(out_TNH, plain_TNH, truth_TNH)
    assert lse_TN.dtype == torch.float32
    torch.testing.assert_close(lse_TN.double(), truth_TN, rtol=1e-6, atol=1e-5)


def assert_right_dense(p: Packed) -> None:
    truth_TNH, _ = reference.dense_attention(*keys(wide(p)), SCALE)
    plain_TNH, _ = reference.dense_attention(*keys(p), SCALE)
    assert_as_good(dense_attention(*keys(p), scale=SCALE), plain_TNH, truth_TNH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_the_reference(
    case: PackedCase, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.float16 and not ON_GPU and case is not SMALL[0]:
        pytest.skip("one case is enough for the interpreter")
    p = on(device, case, dtype)
    assert_right(p)
    if ON_GPU or dtype == torch.float32:
        assert_right_dense(p)


@pytest.mark.parametrize("case", (*PACKED, MILLION), ids=lambda case: case.name)
def test_every_case(case: PackedCase, device: torch.device) -> None:
    p = on(device, case, torch.bfloat16 if len(case.name) % 2 else torch.float32)
    assert_right(p)
    if case.name in DENSE:
        assert_right_dense(p)


@pytest.mark.parametrize("query", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(3, 1), (20, 2)], ids=str)
def test_eight_bit_caches(query: torch.dtype, tokens: tuple[int, int], device: torch.device) -> None:
    """Decode and prefill, sparse and dense. The stored values are what counts: their rounding is no error here."""
    case = PackedCase(name="eight_bits", num_tokens=tokens, lengths=(90, 33), block_size=16, num_groups=1)
    p = on(device, case, query)
    p = p._replace(k_MGBH=p.k_MGBH.to(torch.float8_e4m3fn), v_MGBH=p.v_MGBH.to(torch.float8_e4m3fn))
    assert p.v_MGBH.float().isnan().any()
    assert_right(p)
    assert_right_dense(p)


def block_by_block(monkeypatch: pytest.MonkeyPatch, tiles: int = 1 << 10) -> None:
    """Has no tile walk that sees anything."""
    scattering = triton.Scattering(most=0, shared=0, tiles=tiles, programs=3)
    monkeypatch.setattr(triton, "choose_scattering", lambda *_: scattering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SMALL[1], SMALL[2], SMALL[4]], ids=lambda case: case.name)
def test_block_by_block_is_right(
    case: PackedCase, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_by_block(monkeypatch)
    assert_right(on(device, case, dtype))


SCATTERED = PackedCase(
    name="scattered", num_tokens=(36, 2, 20), lengths=(140, 40, 70), block_size=16, num_selected=2, heads_per_group=3
)


def scattered_and_not(device: torch.device) -> Packed:
    """The first 32 tokens of the first request scatter; all tokens of the last choose the same blocks."""
    p = on(device, SCATTERED, torch.bfloat16)
    p.block_TGK[38:] = torch.tensor([0, 2], dtype=torch.int32, device=device)
    return p


def test_each_tile_goes_its_own_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p, marked, launch = scattered_and_not(device), [], triton.triton_scattered.launch

    def watched(*args: Any) -> None:
        marked.extend(args[3].listed_XG.tolist())
        launch(*args)

    monkeypatch.setattr(triton.triton_scattered, "launch", watched)
    assert_right(p)
    assert marked == [[1, 1]]
    first = p._replace(
        q_TNH=p.q_TNH[:36],
        block_TGK=p.block_TGK[:36],
        page_RP=p.page_RP[:1],
        start_R1=p.start_R1[:2],
        length_R=p.length_R[:1],
    )
    assert torch.equal(sparse(first), sparse(p)[:36])


def test_what_waits_to_be_merged_has_a_bounded_room(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p = scattered_and_not(device)
    block_by_block(monkeypatch)
    wanted = sparse(p)
    block_by_block(monkeypatch, tiles=1)
    monkeypatch.setattr(triton.triton_scattered, "WORKSPACE", 1)
    assert torch.equal(sparse(p), wanted)


def test_block_by_block_without_visible_keys(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails of -1, tokens without any block, blocks of the future, two requests that share their pages."""
    block_by_block(monkeypatch)
    p = on(device, PackedCase(name="holes", num_tokens=(20, 20), lengths=(90, 90), block_size=16, num_groups=1))
    p.page_RP[1] = p.page_RP[0]
    p.block_TGK[:8, :, 2:] = -1
    p.block_TGK[8:14] = -1
    p.block_TGK[14, :, 1] = 1 << 30
    assert_right(p)
    assert not sparse(p)[8:14].any()


def test_what_can_never_scatter_is_not_asked(device: torch.device) -> None:
    tile = triton.choose_tile(16, 128, 128, 16, 8192, 2, 2, HOPPER)

    def chosen(num_blocks: int, num_tokens: int) -> object:
        return triton.choose_scattering(tile, 16, 128, 16, num_blocks, num_tokens, 2, HOPPER)

    assert chosen(8192, 8192) == triton.Scattering(most=48, shared=8, tiles=1134, programs=264)
    assert chosen(48, 8192) is None and chosen(8192, 24) is None
    assert chosen(49, 25) is not None
    assert triton.choose_scattering(dataclasses.replace(tile, tokens=2), 64, 128, 16, 8192, 8192, 2, HOPPER) is None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tokens", [(3, 1), (20,), (1,) * 12], ids=str)
def test_tokens_of_no_request_get_zeros(tokens: tuple[int, ...], dense: bool, device: torch.device) -> None:
    """Captured steps have room for more tokens than a batch may bring."""
    case = PackedCase(name="padded", num_tokens=tokens, lengths=(60,) * len(tokens), block_size=16, num_groups=1)
    p, real = on(device, case), sum(tokens)
    out_TNH = dense_attention(*keys(p), scale=SCALE) if dense else sparse(p)
    padded = p._replace(
        q_TNH=torch.nn.functional.pad(p.q_TNH, (0, 0, 0, 0, 0, 7), value=math.nan),
        block_TGK=torch.nn.functional.pad(p.block_TGK, (0, 0, 0, 0, 0, 7)),
    )
    if dense:
        padded_TNH = triton.dense_attention(*keys(padded), SCALE)
    else:
        padded_TNH, lse_TN = triton.sparse_attention_lse(*keys(padded), padded.block_TGK, SCALE)
        assert (lse_TN[real:] == -math.inf).all()
    assert torch.equal(padded_TNH[:real], out_TNH)
    assert not padded_TNH[real:].any()


def test_a_batch_without_requests_gives_zeros(device: torch.device) -> None:
    p = on(device, PackedCase(name="nobody", num_tokens=(3,), lengths=(20,), block_size=16))
    p = p._replace(page_RP=p.page_RP[:0], start_R1=p.start_R1[:1], length_R=p.length_R[:0])
    out_TNH, lse_TN = triton.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    assert not out_TNH.any() and (lse_TN == -math.inf).all()


def test_more_programs_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the keys to each program, or eight; and merged in one go or in several."""
    case = PackedCase(name="split", num_tokens=(1, 1), lengths=(200, 90), block_size=16, num_selected=10, num_groups=1)
    p = on(device, case, torch.bfloat16)
    found = []
    for processors in (1, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(triton, "machine", lambda _, n=processors: HOPPER._replace(processors=n))
            found += [sparse(p)]
    found += [sparse(p)]
    dense_TNH = dense_attention(*keys(p), scale=SCALE)
    monkeypatch.setattr(triton.triton_splits, "WORKSPACE", 1)
    assert all(torch.equal(out_TNH, sparse(p)) for out_TNH in found)
    assert torch.equal(dense_attention(*keys(p), scale=SCALE), dense_TNH)


def test_smaller_tiles_are_right(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And change no bit, which NumPy, in which the interpreter multiplies, does not promise."""
    p, found = on(device, SMALL[4], torch.bfloat16), []
    for processors in (1, 1000):
        monkeypatch.setattr(triton, "machine", lambda _, n=processors: HOPPER._replace(processors=n))
        assert_right(p)
        found.append(sparse(p))
    assert not ON_GPU or torch.equal(*found)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_negative_scale(tokens: int, device: torch.device) -> None:
    p = on(device, PackedCase(name="negative", num_tokens=(tokens,), lengths=(60,), num_groups=1, block_size=16))
    truth_TNH, _ = reference.sparse_attention(*keys(wide(p)), p.block_TGK, -SCALE)
    out_TNH = sparse_attention(*keys(p), p.block_TGK, scale=-SCALE)
    torch.testing.assert_close(out_TNH.double(), truth_TNH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_queries_and_cache_may_differ_in_dtype(mixed: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    p = on(device, SMALL[2])
    query, cache = mixed
    p = p._replace(q_TNH=p.q_TNH.to(query), k_MGBH=p.k_MGBH.to(cache), v_MGBH=p.v_MGBH.to(cache))
    truth_TNH, _ = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    assert_as_good(sparse(p), plain_TNH, truth_TNH)


@pytest.mark.parametrize("heads", [1, 3, 5, 33, 128])
def test_any_number_of_heads(heads: int, device: torch.device) -> None:
    case = PackedCase(name="heads", num_tokens=(9, 1), lengths=(40, 30), block_size=16, num_groups=1, num_selected=2)
    assert_right(on(device, dataclasses.replace(case, heads_per_group=heads)))


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_lies_behind_the_last_key_is_never_seen(tokens: int, device: torch.device) -> None:
    case = PackedCase(name="stale", num_tokens=(tokens,), lengths=(100,), num_groups=1, block_size=32)
    p = on(device, case)
    wanted = sparse(p)
    last = int(p.page_RP[0, 100 // 32])
    k_MGBH, v_MGBH = p.k_MGBH.clone(), p.v_MGBH.clone()
    assert v_MGBH[last, :, 100 % 32 :].isnan().all()
    k_MGBH[last, :, 100 % 32 :] = math.inf
    v_MGBH[last, :, 100 % 32 :] = math.inf
    assert wanted.isfinite().all()
    assert torch.equal(sparse(p._replace(k_MGBH=k_MGBH, v_MGBH=v_MGBH)), wanted)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[1]], ids=lambda case: case.name)
def test_tokens_without_a_visible_key_give_zeros(case: PackedCase, device: torch.device) -> None:
    """All -1, or blocks of the future only; ids may stand anywhere and leave gaps."""
    p = on(device, case)
    block_TGK = p.block_TGK.flip(-1)
    block_TGK[::2] = -1
    block_TGK[1::4] = torch.tensor([100, 1 << 30, 2**31 - 1, 77], dtype=torch.int32, device=device)
    p = p._replace(block_TGK=block_TGK)
    assert_right(p)
    out_TNH, lse_TN = sparse_attention_lse(*keys(p), block_TGK, scale=SCALE)
    assert not out_TNH[::2].any() and not out_TNH[1::4].any() and (lse_TN[::2] == -torch.inf).all()


@pytest.mark.parametrize("case", [SMALL[1]], ids=lambda case: case.name)
def test_batch_composition_changes_nothing(case: PackedCase, device: torch.device) -> None:
    p = on(device, case)
    together_TNH, dense_TNH = sparse(p), dense_attention(*keys(p), scale=SCALE)
    for r, (start, stop) in enumerate(zip(p.start_R1[:-1].tolist(), p.start_R1[1:].tolist(), strict=True)):
        alone = p._replace(
            q_TNH=p.q_TNH[start:stop],
            block_TGK=p.block_TGK[start:stop],
            page_RP=p.page_RP[r : r + 1],
            start_R1=torch.tensor([0, stop - start], dtype=torch.int32, device=device),
            length_R=p.length_R[r : r + 1],
        )
        assert torch.equal(sparse(alone), together_TNH[start:stop])
        assert torch.equal(dense_attention(*keys(alone), scale=SCALE), dense_TNH[start:stop])


def test_memory_layout_changes_nothing(device: torch.device) -> None:
    p = on(device, SMALL[2])
    strided = p._replace(
        q_TNH=p.q_TNH.transpose(0, 1).contiguous().transpose(0, 1),
        k_MGBH=p.k_MGBH.transpose(1, 2).contiguous().transpose(1, 2),
        v_MGBH=p.v_MGBH.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        block_TGK=p.block_TGK.transpose(0, 1).contiguous().transpose(0, 1),
        page_RP=p.page_RP.long().t().contiguous().t(),
    )
    assert torch.equal(sparse(strided), sparse(p))


@pytest.mark.parametrize("tokens", [1, 9])
def test_large_scores_do_not_overflow(tokens: int, device: torch.device) -> None:
    p = on(device, PackedCase(name="large", num_tokens=(tokens,), lengths=(60,), num_groups=1, block_size=16))
    assert_right(p._replace(q_TNH=p.q_TNH * 1000))


def test_refusals_say_why(device: torch.device) -> None:
    p = on(device, SMALL[0])

    def reason(q: Packed) -> str | None:
        found: str | None = triton.supports_sparse_attention(*keys(q), q.block_TGK, SCALE)
        return found

    def widened(heads: int, block_size: int, width: int) -> Packed:
        k = torch.empty((1, 1, block_size, width), device=device)
        q = torch.empty((4, heads, width), device=device)
        return p._replace(q_TNH=q, k_MGBH=k, v_MGBH=k)

    assert reason(p) is None
    assert reason(wide(p)) == "takes float32, bfloat16 and float16, not float64"
    assert reason(widened(129, 16, 16)) == "takes at most 128 query heads a group, not 129"
    assert reason(widened(1, 16, 257)) == "takes heads of at most 256 numbers, not 257"
    assert reason(widened(1, 24, 16)) == "needs blocks of 16 tokens or a larger power of two, not 24"
    assert reason(widened(1, 8, 16)) == "needs blocks of 16 tokens or a larger power of two, not 8"
    assert (
        reason(p._replace(block_TGK=p.block_TGK.repeat(1, 1, 2000))) == "takes at most 4096 selected blocks, not 8000"
    )
    assert reason(p._replace(page_RP=p.page_RP.to("meta"))) == "needs all tensors on one device"
    far = torch.empty_strided((1, 2, 16, 16), (1, 1, 1 << 28, 1), device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "refusal", lambda *_, **__: None)
        assert reason(p._replace(k_MGBH=far)) == "needs the keys of a page and head within 2^31 numbers of each other"


def test_tiles_fill_warpgroups_and_share_multiprocessors() -> None:
    def tile(
        heads: int, num_selected: int | None, lines: int = 8192, stored_itemsize: int = 2, kibibytes: int = 227
    ) -> Any:
        machine = HOPPER._replace(shared_bytes=kibibytes << 10)
        return triton.choose_tile(heads, 128, 128, num_selected, lines, 2, stored_itemsize, machine)

    wanted = triton.Tile(tokens=8, heads=16, keys=32, width=128, warps=8, stages=4, registers=128)
    assert tile(16, 16) == tile(16, None) == wanted
    assert tile(16, 16, lines=8 * 132) == wanted
    few = tile(16, 16, lines=8 * 132 - 1)
    assert (few.tokens, few.keys, few.warps, few.registers) == (4, 32, 4, None)
    assert tile(16, None, stored_itemsize=1).stages == 5
    assert (tile(16, 16, kibibytes=99).stages, tile(16, 16, kibibytes=99).registers) == (4, None)
    assert tile(16, 16, kibibytes=48).stages == 1
    assert tile(1, 16).tokens == 32 and tile(1, None, lines=1 << 15).tokens == 128 and tile(1, None).tokens == 64
    assert tile(16, 2000).tokens == 2
    assert triton.choose_tile(16, 256, 128, 16, 8192, 2, 2, HOPPER).registers is None
    assert triton.choose_tile(16, 128, 128, 16, 8192, 4, 4, HOPPER).registers is None


def test_splits_fill_the_machine() -> None:
    def split(num_selected: int | None, num_blocks: int, lines: int) -> tuple[int, int, int]:
        chosen = triton.choose_split(16, 128, 128, num_selected, num_blocks, lines, 2, 2, HOPPER)
        assert (chosen.tile.tokens, chosen.tile.heads, chosen.tile.keys) == (1, 16, 64)
        return chosen.parts, chosen.splits, chosen.folded

    assert split(16, 8192, 64) == split(16, 1, 25) == (8, 4, 1)
    assert split(16, 8192, 1) == split(16, 1, 24) == (1, 32, 8)
    assert split(None, 8192, 1) == (4, 128, 1)
    assert split(None, 10, 64) == (4, 5, 1)
