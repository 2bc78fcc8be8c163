"""Steps of one token a request that are captured once and replayed: as a graph on a GPU, as a recording on a CPU.

What a step computes depends on its shape alone, so it is captured for each number of requests and width of their page
tables, the latter a power of two; on a GPU the former is one too, with rows that belong to no request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openm3.errors import UnsupportedError
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.model.replay import FEWEST_PAGES
from openm3.ops import native
from openm3.ops.cache import Pool
from openm3.ops.dispatch import forced
from openm3.ops.native.recording import Recording

MOST_STEPS = 32
"""Captured steps that are kept, the longest unused one going first: each holds what lies between its layers."""


class Capture:
    """The logits of batches of one token a request, over the pools given."""

    def __init__(self, network: Network, pools: Sequence[Pool]) -> None:
        self._network = network
        self._pools = pools
        self._steps: OrderedDict[tuple[int, int, int], _Step] = OrderedDict()
        self._refused = False

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [R, V] of a batch on the host, in a tensor that the next call may overwrite.

        None where such steps are not captured: where implementations are forced, or PyTorch has to do what cannot be
        recorded.
        """
        if self._refused or forced() is not None:
            return None
        requests, width = batch.page_RP.shape
        on_gpu = self._network.embed.weight.is_cuda
        if not on_gpu and native.missing() is not None:
            return None
        rooms = power_of_two(requests) if on_gpu else requests
        key = rooms, max(FEWEST_PAGES, power_of_two(width)), native.threads()
        step = self._steps.get(key)
        if step is None:
            try:
                step = _Step(self._network, self._pools, *key[:2], batch)
            except UnsupportedError:
                self._refused = True
                return None
            self._steps[key] = step
            if len(self._steps) > MOST_STEPS:
                self._steps.popitem(last=False)
            # Capturing has computed nothing on a GPU, and on a CPU it has computed this very step.
            if not on_gpu:
                return step.logit_RV
        self._steps.move_to_end(key)
        step.load(batch)
        step.replay()
        return step.logit_RV[:requests]


class _Step:
    """Buffers for the inputs of one step, and how to run it."""

    def __init__(
        self, network: Network, pools: Sequence[Pool], num_requests: int, num_pages: int, batch: Batch
    ) -> None:
        device = network.embed.weight.device
        self._batch = Batch(
            ids_T=torch.zeros(num_requests, dtype=torch.long, device=device),
            position_T=torch.zeros(num_requests, dtype=torch.long, device=device),
            slot_T=torch.zeros(num_requests, dtype=torch.long, device=device),
            page_RP=torch.zeros((num_requests, num_pages), dtype=torch.int32, device=device),
            start_R1=torch.zeros(num_requests + 1, dtype=torch.int32, device=device),
            length_R=torch.zeros(num_requests, dtype=torch.int32, device=device),
        )
        self.load(batch)
        self.logit_RV: Tensor
        self.replay: Callable[[], None]
        if device.type == "cuda":
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # Kernels are compiled and tables made, which cannot be captured. It writes the keys that it will write.
                network(self._batch, pools)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logit_RV = network(self._batch, pools)
            self.replay = graph.replay
        else:
            recording = Recording()
            with recording:
                self.logit_RV = network(self._batch, pools)
            self.replay = recording.replay

    def load(self, batch: Batch) -> None:
        """Put a step's numbers where the captured one reads them; rows without a request have no slot and no key."""
        mine, (requests, width) = self._batch, batch.page_RP.shape
        rooms = mine.length_R.shape[0]
        mine.page_RP[:requests, :width] = batch.page_RP
        for name in ("ids_T", "position_T", "slot_T", "length_R"):
            getattr(mine, name)[:requests] = getattr(batch, name)
        if requests == rooms:
            mine.start_R1.copy_(batch.start_R1)
        else:
            mine.slot_T[requests:] = -1
            mine.length_R[requests:] = 0
            mine.start_R1.copy_(torch.arange(rooms + 1).clamp(max=requests))


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below a count of at least one."""
    return 1 << (count - 1).bit_length()
