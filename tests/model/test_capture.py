"""Captured steps give, to the last bit, what the network gives when it runs; on a GPU they are padded graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.engine.request import Request, SamplingParams
from openm3.engine.runner import batch_of
from openm3.engine.scheduler import Work
from openm3.errors import UnsupportedError
from openm3.model import capture
from openm3.model.batch import Batch
from openm3.model.capture import Capture
from openm3.model.model import Model, load
from openm3.ops import native
from openm3.ops.cache import Pool
from openm3.ops.dispatch import timed, use
from openm3.ops.native.recording import Recording

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
PAGES = 60

needs_native = pytest.mark.skipif(native.missing() is not None, reason="needs the native operators")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


@torch.inference_mode()
def read(model: Model, lengths: list[int]) -> tuple[list[Request], list[Pool]]:
    """Requests whose prompts, but for their last token, are in the pools; pages in no order."""
    generator = torch.Generator().manual_seed(2)
    free = torch.randperm(PAGES, generator=generator).tolist()
    requests = []
    for i, length in enumerate(lengths):
        ids = torch.randint(300, (length,), generator=generator).tolist()
        requests.append(Request(i, ids, SamplingParams(), 0, 0.0))
        requests[-1].pages = [free.pop() for _ in range((length + 40) // BLOCK + 1)]
    pools = model.network.new_pools(PAGES, torch.float32)
    works = [Work(request, 0, len(request.ids) - 1) for request in requests if len(request.ids) > 1]
    model.network.hidden(batch_of(works).to(model.network.embed.weight.device), pools)
    return requests, pools


def step_of(requests: list[Request]) -> Batch:
    return batch_of([Work(request, len(request.ids) - 1, 1) for request in requests])


def cloned(pools: list[Pool]) -> list[Tensor]:
    return [x.clone() for pool in pools for x in pool.tensors()]


def holds(pools: list[Pool], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(cloned(pools), expected, strict=True))


@needs_native
@torch.inference_mode()
def test_captured_steps_are_those_of_the_network(model: Model) -> None:
    """Requests come and go, begin pages and outgrow page tables; each step writes the same keys too."""
    requests, pools = read(model, [1, 127, 300, 2040, 700])
    captured = Capture(model.network, pools)
    for step in range(20):
        present = requests[: [5, 3, 1][step % 3]] if step > 4 else requests
        batch = step_of(present)
        before = cloned(pools)
        wanted = model.network(batch, pools).clone()
        after = cloned(pools)
        for x, old in zip([x for pool in pools for x in pool.tensors()], before, strict=True):
            x.copy_(old)
        found = captured.logits(batch)
        assert found is not None and torch.equal(found, wanted)
        assert holds(pools, after)
        for request, token in zip(present, wanted.argmax(-1).tolist(), strict=True):
            request.ids.append(token)
    assert len(captured._steps) == 4


@needs_native
@torch.inference_mode()
def test_the_longest_unused_step_goes_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_STEPS", 2)
    requests, pools = read(model, [10, 20, 30])
    captured = Capture(model.network, pools)
    for count in (1, 2, 1, 3, 1):
        batch = step_of(requests[:count])
        found = captured.logits(batch)
        assert found is not None and torch.equal(found, model.network(batch, pools))
    assert [key[0] for key in captured._steps] == [3, 1]


@torch.inference_mode()
def test_what_is_forced_is_not_captured(model: Model) -> None:
    requests, pools = read(model, [10])
    with use("reference"):
        assert Capture(model.network, pools).logits(step_of(requests)) is None


@needs_native
@torch.inference_mode()
def test_what_cannot_be_recorded_runs_uncaptured(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, pools = read(model, [10])
    norm = model.network.head.forward
    monkeypatch.setattr(model.network.head, "forward", lambda x: norm(x).tanh())
    captured = Capture(model.network, pools)
    assert captured.logits(step_of(requests)) is None
    assert captured.logits(step_of(requests)) is None and not captured._steps


@needs_native
@torch.inference_mode()
def test_operators_in_a_replay_are_timed(model: Model) -> None:
    requests, pools = read(model, [3000])
    captured = Capture(model.network, pools)
    captured.logits(step_of(requests))
    with timed() as replayed:
        captured.logits(step_of(requests))
    with timed() as run:
        model.network(step_of(requests), pools)
    assert set(replayed) == set(run) >= {"select_blocks", "sparse_attention", "mixture", "linear"}


@torch.inference_mode()
def test_a_recording_refuses_what_it_cannot_repeat() -> None:
    x = torch.ones(2, 3)
    with Recording() as recording:
        y = (x * 2 + 1).view(3, 2).t().contiguous()
    x[0, 1] = 5
    recording.replay()
    assert y.tolist() == [[3, 3, 3], [11, 3, 3]]
    with pytest.raises(UnsupportedError, match=r"cannot repeat aten\.relu"), Recording():
        x.relu()
    with pytest.raises(UnsupportedError, match=r"cannot repeat aten\.add_"), Recording():
        x.add_(1)


@needs_gpu
@torch.inference_mode()
def test_a_gpu_pads_its_graphs() -> None:
    model = load(GOLDEN / "model", device="cuda")
    requests, pools = read(model, [1, 127, 300, 2040, 700])
    captured = Capture(model.network, pools)
    for step in range(8):
        present = requests[: [5, 3, 1][step % 3]]
        batch = step_of(present)
        wanted = model.network(batch.to(torch.device("cuda")), pools)
        found = captured.logits(batch)
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for request, token in zip(present, wanted.argmax(-1).tolist(), strict=True):
            request.ids.append(token)
    assert [key[0] for key in captured._steps] == [8, 4, 1]
