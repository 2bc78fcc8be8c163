"""Greedy decoding that nothing waits for: a step's inputs lie on the device, and each step writes those of the next.

So a GPU can replay one captured step again and again, and works on the next token while the host looks at the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.ops.cache import Pool

FEWEST_PAGES = 16
"""The page table of the first captured step; longer ones double."""


class Replay:
    """The next tokens of one request whose keys are in `pools`, at the pages `page_P` (int32).

    On a GPU a step is captured once for each power of two of pages that a request has come to. Elsewhere it just runs.
    """

    def __init__(self, network: Network, pools: Sequence[Pool], page_P: Tensor) -> None:
        self._network = network
        self._pools = pools
        self._page_P = page_P
        with torch.inference_mode():
            self._id_1 = torch.zeros(1, dtype=torch.long, device=page_P.device)
            self._length_1 = torch.zeros(1, dtype=torch.int32, device=page_P.device)
            self._start_R1 = torch.tensor([0, 1], dtype=torch.int32, device=page_P.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def tokens(self, logit_V: Tensor, length: int, limit: int) -> Iterator[int]:
        """Greedy tokens after the `length` keys in the pools, at most `limit`; equal logits take the smaller id.

        When a token comes, its own key and the next token are being computed already.
        """
        on_gpu = self._page_P.is_cuda
        host_1 = torch.empty(1, dtype=torch.long, pin_memory=on_gpu)
        copied = torch.cuda.Event() if on_gpu else None
        self._id_1.copy_(logit_V.argmax())
        self._length_1.fill_(length)
        for i in range(limit):
            host_1.copy_(self._id_1, non_blocking=True)
            if copied is not None:
                copied.record()
            if i + 1 < limit:
                self._advance(length + i + 1)
            if copied is not None:
                copied.synchronize()
            yield int(host_1)

    def _advance(self, length: int) -> None:
        """One step, after which there are `length` keys."""
        num_pages = min(pages_seen(length), self._page_P.shape[0])
        if not self._page_P.is_cuda:
            self._step(num_pages)
            return
        if num_pages not in self._graphs:
            self._graphs[num_pages] = self._captured(num_pages)
        self._graphs[num_pages].replay()

    def _step(self, num_pages: int) -> None:
        page_P, position_1 = self._page_P[:num_pages], self._length_1.long()
        batch = Batch(
            ids_T=self._id_1,
            position_T=position_1,
            slot_T=page_P[position_1 // BLOCK].long() * BLOCK + position_1 % BLOCK,
            page_RP=page_P[None],
            start_R1=self._start_R1,
            length_R=self._length_1 + 1,
        )
        logit_1V = self._network(batch, self._pools)
        self._id_1.copy_(logit_1V.float().argmax(-1))
        self._length_1 += 1

    def _captured(self, num_pages: int) -> torch.cuda.CUDAGraph:
        """The step as a graph. It runs once before: kernels are compiled and tables made, which cannot be captured."""
        before = self._id_1.clone(), self._length_1.clone()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._step(num_pages)
        current.wait_stream(stream)
        self._id_1.copy_(before[0])
        self._length_1.copy_(before[1])
        graph = torch.cuda.CUDAGraph()
        # Graphs run one after another and leave nothing in their memory: they can share it.
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._step(num_pages)
        return graph


def pages_seen(length: int) -> int:
    """How many pages a step that makes `length` keys looks at: a power of two, so that few steps are captured."""
    return max(FEWEST_PAGES, 1 << (-(-length // BLOCK) - 1).bit_length())
