"""The cache changes nothing: any chunking, any rewinding, the same logits and the same blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
IDS = load_file(GOLDEN / "golden/batch_row2.safetensors")["input_ids"][0].tolist()


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


@pytest.fixture(scope="module")
def logit_TV(model: Model) -> Tensor:
    return model.logits(IDS)


@pytest.mark.parametrize("chunk", [1, 7, 128, 1000])
def test_chunks_change_nothing(model: Model, logit_TV: Tensor, chunk: int) -> None:
    count = 300 if chunk == 1 else len(IDS)
    session = model.session(count)
    blocks: dict[int, list[Tensor]] = {}
    hidden: list[int] = []

    def observer(layer: int, heads: Heads, batch: Batch) -> None:
        if heads.block_TGK is not None:
            blocks.setdefault(layer, []).append(heads.block_TGK)

    last_V = session.read(IDS[:count], chunk=chunk, observer=observer, on_progress=hidden.append)
    assert (last_V - logit_TV[count - 1]).abs().max() < 1e-5
    assert hidden == [*range(chunk, count, chunk), count]
    for layer, expected in model.trace(IDS[:count]).blocks.items():
        assert torch.cat(blocks[layer]).equal(torch.from_numpy(expected))


def test_every_token_gives_its_logits(model: Model, logit_TV: Tensor) -> None:
    session = model.session(600)
    session.read(IDS[:500])
    for i in range(500, 600):
        assert (session.read([IDS[i]]) - logit_TV[i]).abs().max() < 1e-5
    assert session.length == 600


def test_rewind_forgets(model: Model, logit_TV: Tensor) -> None:
    session = model.session(len(IDS) + 20)
    for kept, wrong in ((0, 50), (130, 400), (128, 3), (1, 699)):
        session.rewind(0)
        if kept:
            session.read(IDS[:kept])
        session.read([7] * wrong)
        session.rewind(kept)
        assert session.length == kept
        assert (session.read(IDS[kept:]) - logit_TV[-1]).abs().max() < 1e-5


def test_decode_reads_no_more_than_it_must(model: Model) -> None:
    session = model.session(53)
    made = list(session.decode(session.read(IDS[:50]), 4))
    assert made == list(model.generate(IDS[:50], max_new_tokens=4))
    assert session.length == 53


def test_equal_logits_take_the_smaller_id(model: Model) -> None:
    session = model.session(4)
    logit_V = torch.zeros(320)
    logit_V[[40, 30, 50]] = 1.0
    assert list(session.decode(logit_V, 1)) == [30]


def test_interrupted_reading_can_go_on(model: Model, logit_TV: Tensor) -> None:
    session = model.session(len(IDS))

    def stop(done: int) -> None:
        if done >= 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(IDS, chunk=128, on_progress=stop)
    assert session.length == 256
    assert (session.read(IDS[256:]) - logit_TV[-1]).abs().max() < 1e-5


def test_requests_of_a_batch_do_not_meet(model: Model, logit_TV: Tensor) -> None:
    rows = [torch.tensor(IDS[:n]) for n in (1, 700, 128, 257)]
    with torch.inference_mode():
        packed_TV = model.network(Batch.whole(rows))
    for r, part_TV in enumerate(packed_TV.split([len(row) for row in rows])):
        assert (part_TV - logit_TV[: len(rows[r])]).abs().max() < 1e-5
