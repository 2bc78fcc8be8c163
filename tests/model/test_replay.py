"""Decoding from buffers that stay on the device gives the tokens of decoding step by step; on a GPU it is captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openm3.config import BLOCK
from openm3.model.model import Model, load
from openm3.model.replay import FEWEST_PAGES, Replay, pages_seen
from openm3.model.session import Session

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
IDS = torch.randint(300, (3000,), generator=torch.Generator().manual_seed(1)).tolist()

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def replayed(session: Session, ids: list[int], limit: int) -> list[int]:
    logit_V = session.read(ids)
    replay = Replay(session.network, session.pools, torch.arange(-(-session.capacity // BLOCK), dtype=torch.int32))
    return list(replay.tokens(logit_V, len(ids), limit))


@pytest.mark.parametrize("length", [1, 127, 300, FEWEST_PAGES * BLOCK - 5])
def test_the_tokens_are_those_of_single_steps(length: int, model: Model) -> None:
    """Among them steps that begin a page, and ones that outgrow the first page table."""
    wanted = list(model.generate(IDS[:length], max_new_tokens=12))
    assert len(set(wanted)) > 1
    assert replayed(model.session(length + 12), IDS[:length], 12) == wanted
    assert replayed(model.session(length + 5000), IDS[:length], 12) == wanted


def test_a_replay_goes_on_where_it_is_told(model: Model) -> None:
    session = model.session(400)
    replay = Replay(session.network, session.pools, torch.arange(4, dtype=torch.int32))
    first = list(replay.tokens(session.read(IDS[:100]), 100, 8))
    session.rewind(40)
    second = list(replay.tokens(session.read(IDS[40:90]), 90, 8))
    assert first == list(model.generate(IDS[:100], max_new_tokens=8))
    assert second == list(model.generate(IDS[:90], max_new_tokens=8))
    assert list(replay.tokens(session.read(IDS[90:91]), 91, 0)) == []


def test_page_tables_grow_by_doubling() -> None:
    lengths = (1, FEWEST_PAGES * BLOCK, FEWEST_PAGES * BLOCK + 1, 5000, 1 << 20, (1 << 20) + 1)
    assert [pages_seen(n) for n in lengths] == [16, 16, 32, 64, 8192, 16384]


@needs_gpu
@pytest.mark.parametrize("length", [1, 300, FEWEST_PAGES * BLOCK - 5])
def test_a_gpu_generates_what_the_cpu_does(length: int, model: Model) -> None:
    on_gpu = load(GOLDEN / "model", device="cuda")
    logit_TV = on_gpu.logits(IDS[:length])
    torch.testing.assert_close(logit_TV.cpu(), model.logits(IDS[:length]), rtol=1e-4, atol=1e-4)
    wanted = list(model.generate(IDS[:length], max_new_tokens=12))
    assert list(on_gpu.generate(IDS[:length], max_new_tokens=12)) == wanted
    for layer, blocks in model.trace(IDS[:length]).blocks.items():
        assert (on_gpu.trace(IDS[:length]).blocks[layer] == blocks).all()


@needs_gpu
def test_a_session_counts_the_keys_of_tokens_that_were_asked_for() -> None:
    model = load(GOLDEN / "model", device="cuda")
    session = model.session(400)
    tokens = session.decode(session.read(IDS[:200]), 20)
    first = [next(tokens) for _ in range(5)]
    assert session.length == 204
    session.rewind(200)
    again = session.decode(session.read(IDS[200:201]), 5)
    assert first == list(model.generate(IDS[:200], max_new_tokens=5))
    assert list(again) == list(model.generate(IDS[:201], max_new_tokens=5))
