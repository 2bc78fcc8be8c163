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
from openm3.ops.cases import PACKED, Packed, PackedCase, packed

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
INTERPRETED = ("one_token", "no_tokens", "no_requests", "three_groups_of_one")
CASES = (*SMALL, *(case for case in PACKED if ON_GPU or case.name in INTERPRETED))


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
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_the_reference(
    case: PackedCase, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.float16 and not ON_GPU and case is not SMALL[0]:
        pytest.skip("one case is enough for the interpreter")
    p = on(device, case, dtype)
    assert_right(p)
    assert_right_dense(p)


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
        patch.setattr(triton, "refusal", lambda *_: None)
        assert reason(p._replace(k_MGBH=far)) == "needs the keys of a page and head within 2^31 numbers of each other"


def test_tiles_fill_warpgroups_and_fit_shared_memory() -> None:
    tile = triton.choose_tile(16, 128, 128, 16, 2, 227 << 10)
    assert tile == triton.Tile(tokens=8, heads=16, keys=64, width=128, warps=8, stages=3)
    assert triton.choose_tile(16, 128, 128, None, 2, 99 << 10).stages == 1
    assert triton.choose_tile(1, 128, 128, 16, 2, 227 << 10).tokens == 32
    assert triton.choose_tile(16, 128, 128, 2000, 2, 227 << 10).tokens == 2
    split = triton.choose_split(16, 128, 128, 16, False, 2, 227 << 10)
    assert (split.blocks, split.splits, split.tile.tokens, split.tile.heads) == (4, 4, 1, 16)
    assert triton.choose_split(3, 128, 128, 1 << 13, True, 2, 227 << 10).splits == 128
