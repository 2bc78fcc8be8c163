"""Carries out a step on the device: copies pages, runs the network over all the work, draws tokens.

The only part of the engine that holds tensors. Knows neither queues nor pages' owners nor text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.engine.request import Logprob, Request
from openm3.engine.scheduler import Plan, Work
from openm3.model.attention import Observer
from openm3.model.batch import Batch
from openm3.model.capture import Capture
from openm3.model.network import Network
from openm3.ops.sample import SampleParams, sample, top_logprobs


@dataclass(frozen=True)
class Drawn:
    """The tokens after a work's last token and after each of its draft tokens, as if all before it were right.

    -1 where the logits are NaN or +inf or forbid every token.
    """

    ids: list[int]
    logprobs: list[Logprob] | None = None


class Runner:
    """A network and its pools of `num_pages` pages. `end_ids` are forbidden before a reply's least length."""

    def __init__(self, network: Network, num_pages: int, end_ids: frozenset[int] = frozenset()) -> None:
        self.network = network
        self.device = network.embed.weight.device
        self.pools = network.new_pools(num_pages, network.embed.weight.dtype)
        self._end_ids = sorted(end_ids)
        self._capture = Capture(network, self.pools)
        self._page_rows = PageRows()

    @torch.inference_mode()
    def run(self, plan: Plan, observer: Observer | None = None) -> list[Drawn | None]:
        """The step's results, one for each of its works: None for prompts that are not read to their end."""
        self._copy(plan.copies)
        if not plan.works:
            return []
        batch = batch_of(plan.works, self._page_rows)
        single = observer is None and len(batch.ids_T) == len(plan.works)
        logit_SV = self._capture.logits(batch) if single and all(work.samples for work in plan.works) else None
        if logit_SV is not None:
            return list(self._draw(logit_SV.float(), plan.works))
        hidden_TD = self.network.hidden(batch.to(self.device), self.pools, observer)
        rows: list[int] = []
        end = 0
        for work in plan.works:
            end += work.count + len(work.draft)
            rows += range(end - 1 - len(work.draft), end) if work.samples else ()
        if not rows:
            return [None] * len(plan.works)
        logit_SV = self.network.head(hidden_TD[torch.tensor(rows, device=self.device)]).float()
        drawing = [work for work in plan.works if work.samples]
        drawn = iter(self._draw(logit_SV, drawing))
        return [next(drawn) if work.samples else None for work in plan.works]

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        source, target = (torch.tensor(side, device=self.device) for side in zip(*copies, strict=True))
        for pool in self.pools:
            for pages in pool.tensors():
                pages[target] = pages[source]

    def _draw(self, logit_SV: Tensor, works: Sequence[Work]) -> list[Drawn]:
        places = [(work.request, i, work.draft[:i]) for work in works for i in range(1 + len(work.draft))]
        requests = [request for request, _, _ in places]
        for row, (request, i, _) in enumerate(places):
            if request.num_output + i < request.params.min_tokens:
                logit_SV[row, [*self._end_ids, *request.params.stop_ids]] = -torch.inf
        best_S, id_S = logit_SV.max(-1)
        broken = [not math.isfinite(best) for best in best_S.tolist()]
        if any(broken):
            logit_SV = logit_SV.masked_fill(torch.tensor(broken, device=logit_SV.device)[:, None], 0.0)
        if not all(request.params.plain for request in requests):
            id_S, _ = sample(logit_SV, *_sampling(places))
        ids = [-1 if no_number else token for token, no_number in zip(id_S.tolist(), broken, strict=True)]
        chosen = _logprobs(logit_SV, ids, requests) if any(r.params.logprobs is not None for r in requests) else None
        drawn, first = [], 0
        for work in works:
            part = slice(first, first + 1 + len(work.draft))
            asked = work.request.params.logprobs is not None
            drawn.append(Drawn(ids[part], chosen[part] if asked and chosen is not None else None))
            first = part.stop
        return drawn


class PageRows:
    """Requests' pages as arrays, made anew for those that have got others since the last step."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[list[int], npt.NDArray[np.int32]]] = {}

    def of(self, works: Sequence[Work]) -> list[npt.NDArray[np.int32]]:
        """The pages of each work's request."""
        rows = {}
        for request in (work.request for work in works):
            pages, row = self._rows.get(request.id, (None, _NO_PAGES))
            # Pages are added to a request's list; one that loses them gets a new list.
            if pages is not request.pages or len(row) != len(pages):
                row = np.array(request.pages, dtype=np.int32)
            rows[request.id] = request.pages, row
        self._rows = rows
        return [row for _, row in rows.values()]


_NO_PAGES = np.zeros(0, dtype=np.int32)


def batch_of(works: Sequence[Work], rows: PageRows | None = None) -> Batch:
    """A step's works as the network takes them; each is another request's."""
    ends = [work.first + work.count + len(work.draft) for work in works]
    widths = [-(-end // BLOCK) for end in ends]
    page_RP = np.zeros((len(works), max(widths)), dtype=np.int32)
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    pages = (rows or PageRows()).of(works)
    for row, own, work, end, width in zip(page_RP, pages, works, ends, widths, strict=True):
        row[:width] = own[:width]
        ids += work.ids
        positions += range(work.first, end)
        starts.append(len(ids))
    position_T = np.array(positions)
    row_T = np.repeat(np.arange(len(works)), np.diff(starts))
    slot_T = page_RP[row_T, position_T // BLOCK].astype(np.int64) * BLOCK + position_T % BLOCK
    return Batch(
        ids_T=torch.tensor(ids),
        position_T=torch.from_numpy(position_T),
        slot_T=torch.from_numpy(slot_T),
        page_RP=torch.from_numpy(page_RP),
        start_R1=torch.tensor(starts, dtype=torch.int32),
        length_R=torch.tensor(ends, dtype=torch.int32),
    )


_Places = list[tuple[Request, int, tuple[int, ...]]]


def _sampling(places: _Places) -> tuple[SampleParams, list[list[int]], list[list[int]]]:
    """Each place's parameters, and where penalties ask for them the tokens before it."""
    params = [request.params for request, _, _ in places]
    values = SampleParams(
        temperature=[p.temperature for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        repetition=[p.repetition_penalty for p in params],
        presence=[p.presence_penalty for p in params],
        frequency=[p.frequency_penalty for p in params],
        seed=[request.seed for request, _, _ in places],
        step=[request.num_output + i for request, i, _ in places],
    )
    if not any(p.penalises for p in params):
        return values, [], []
    prompts = [request.prompt if request.params.penalises else [] for request, _, _ in places]
    outputs = [[*request.output, *draft] if request.params.penalises else [] for request, _, draft in places]
    return values, prompts, outputs


def _logprobs(logit_SV: Tensor, ids: Sequence[int], requests: Sequence[Request]) -> list[Logprob]:
    id_S = torch.tensor(ids, device=logit_SV.device).clamp(min=0)
    logprob_S = logit_SV.log_softmax(-1).gather(1, id_S[:, None])[:, 0].tolist()
    most = max(request.params.logprobs or 0 for request in requests)
    top_ids, top_values = (x.tolist() for x in top_logprobs(logit_SV, most))
    return [
        Logprob(i, value, tuple(zip(best[:count], values[:count], strict=True)))
        for i, value, best, values, count in zip(
            ids, logprob_S, top_ids, top_values, [r.params.logprobs or 0 for r in requests], strict=True
        )
    ]
