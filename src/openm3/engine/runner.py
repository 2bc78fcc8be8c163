"""Carries out a step on the device: copies pages, runs the network over all the work, draws tokens.

The only part of the engine that holds tensors. Knows neither queues nor pages' owners nor text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openm3.config import BLOCK
from openm3.engine.encoder import Encoder
from openm3.engine.logprobs import logprobs, prompt_logprobs
from openm3.engine.request import Attention, Logprob, Request
from openm3.engine.scheduler import Plan, Work
from openm3.engine.trace import Trace, together
from openm3.model.attention import Observer
from openm3.model.batch import Batch
from openm3.model.capture import Capture
from openm3.model.network import Network
from openm3.model.witness import Witness
from openm3.ops.sample import SampleParams, sample

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """The tokens after a work's last token and after each of its draft tokens, as if all before it were right.

    -1 where no token can be drawn: the logits are NaN or +inf, or none is allowed. No tokens for a prompt that is not
    read to its end. `blocks` are `Trace`'s for each token, `attention` what a `Witness` saw of it, `scores` the
    log-probabilities that `Work.scored` asks for.
    """

    ids: Sequence[int] = ()
    logprobs: list[Logprob] | None = None
    blocks: list[NDArray[np.int32]] | None = None
    scores: Sequence[Logprob] = ()
    attention: list[Attention] | None = None


class Runner:
    """A network and its pools of `num_pages` pages. `end_ids` are forbidden before a reply's least length.

    Pictures are there when the `encoder` has encoded them; None for a network that sees none.
    """

    def __init__(
        self,
        network: Network,
        num_pages: int,
        end_ids: frozenset[int] = frozenset(),
        encoder: Encoder | None = None,
    ) -> None:
        self.network = network
        self.encoder = encoder
        self.device = network.embed.weight.device
        self.pools = network.new_pools(num_pages, network.embed.weight.dtype)
        self._end_ids = sorted(end_ids)
        self._capture = Capture(network, self.pools)
        self._page_rows = PageRows()

    @torch.inference_mode()
    def run(self, plan: Plan, observer: Observer | None = None) -> list[Drawn]:
        """The step's results, one for each of its works."""
        self._copy(plan.copies)
        if self.encoder is not None:
            self.encoder.run(writing=any(work.count == 1 for work in plan.works))
        if not plan.works:
            return []
        batch = batch_of(plan.works, self._page_rows)
        if self.encoder is not None and (images := self.encoder.inputs(_spans(plan.works))):
            batch = batch.with_images(*images)
        observers = [] if observer is None else [observer]
        rows: list[int] = []
        witnesses: dict[int, list[Witness]] = {}
        end = 0
        for i, work in enumerate(plan.works):
            end += work.count + len(work.draft)
            own = range(end - 1 - len(work.draft), end) if work.samples else range(0)
            rows += own
            if own and work.request.params.attention:
                length = len(work.request.prompt)
                witnesses[i] = [Witness(length, request=i, tokens=slice(row, row + 1)) for row in own]
                observers += witnesses[i]
        drawing = [work for work in plan.works if work.samples]
        trace = None
        if any(work.request.params.trace for work in drawing):
            trace = Trace(self.network.config, rows, self.device)
            observers.append(trace)
        single = not observers and batch.place_I is None and len(batch.ids_T) == len(plan.works) == len(drawing)
        logit_SV = self._capture.logits(batch) if single else None
        if logit_SV is not None:
            return self._draw(logit_SV.float(), drawing)
        hidden_TD = self.network.hidden(batch.to(self.device), self.pools, together(observers))
        drawn: Iterator[Drawn] = iter(())
        if rows:
            logit_SV = self.network.head(hidden_TD[torch.tensor(rows, device=self.device)]).float()
            drawn = iter(self._draw(logit_SV, drawing, trace))
        results = [next(drawn) if work.samples else Drawn() for work in plan.works]
        for i, seen in witnesses.items():
            attention = [Attention(one.mass_S.cpu().numpy(), one.attended_share) for one in seen]
            results[i] = replace(results[i], attention=attention)
        for i, (work, start) in enumerate(zip(plan.works, batch.start_R1.tolist(), strict=False)):
            if work.scored:
                results[i] = replace(results[i], scores=self._scores(work, hidden_TD[start:]))
        return results

    def _scores(self, work: Work, hidden_TD: Tensor) -> list[Logprob]:
        """The log-probabilities that a work asks for, from the hidden states of its tokens on."""
        places, request = work.scored, work.request
        hidden_SD = hidden_TD[places.start - work.first : places.stop - work.first]
        ids = request.prompt[places.start + 1 : places.stop + 1]
        return prompt_logprobs(self.network.head, hidden_SD, ids, request.params.prompt_logprobs or 0)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        source, target = (torch.tensor(side, device=self.device) for side in zip(*copies, strict=True))
        for pool in self.pools:
            for pages in pool.tensors():
                pages[target] = pages[source]

    def _draw(self, logit_SV: Tensor, works: Sequence[Work], trace: Trace | None = None) -> list[Drawn]:
        places = [(work.request, i, work.draft[:i]) for work in works for i in range(1 + len(work.draft))]
        requests = [request for request, _, _ in places]
        for row, (request, i, _) in enumerate(places):
            if request.constraint is None and request.num_output + i < request.params.min_tokens:
                logit_SV[row, self._ends(request)] = -torch.inf
        free_SV, logit_SV = logit_SV, self._constrained(logit_SV, requests)
        best_S, id_S = logit_SV.max(-1)
        broken = [not math.isfinite(best) for best in best_S.tolist()]
        if any(broken):
            broken_S1 = torch.tensor(broken, device=logit_SV.device)[:, None]
            free_SV, logit_SV = (x.masked_fill(broken_S1, 0.0) for x in (free_SV, logit_SV))
        if not all(request.params.plain for request in requests):
            id_S, _ = sample(logit_SV, *_sampling(places))
        ids = [-1 if no_number else token for token, no_number in zip(id_S.tolist(), broken, strict=True)]
        asked = [request.params.logprobs for request in requests]
        # A constraint changes what is drawn, not how likely the model holds it.
        own = None if set(asked) == {None} else logprobs(free_SV, ids, [count or 0 for count in asked])
        blocks = None if trace is None else list(trace.block_SLGK.cpu().numpy())
        drawn, first = [], 0
        for work in works:
            part, params = slice(first, first + 1 + len(work.draft)), work.request.params
            drawn.append(
                Drawn(
                    ids[part],
                    own[part] if own is not None and params.logprobs is not None else None,
                    blocks[part] if blocks is not None and params.trace else None,
                )
            )
            first = part.stop
        return drawn

    def _ends(self, request: Request) -> list[int]:
        return [*self._end_ids, *request.params.stop_ids]

    def _constrained(self, logit_SV: Tensor, requests: Sequence[Request]) -> Tensor:
        """The logits with -inf for what constraints forbid."""
        masks = {row: self._mask(request) for row, request in enumerate(requests) if request.constraint is not None}
        if all(mask is None for mask in masks.values()):
            return logit_SV
        forbidden_SV = np.zeros(logit_SV.shape, dtype=np.bool_)
        for row, mask in masks.items():
            if mask is not None:
                forbidden_SV[row] = ~mask
        return logit_SV.masked_fill(torch.from_numpy(forbidden_SV).to(logit_SV.device), -torch.inf)

    def _mask(self, request: Request) -> NDArray[np.bool_] | None:
        """What a request's constraint allows, [V]: nothing if it fails, so that this request alone ends."""
        assert request.constraint is not None
        allowed = np.zeros(self.network.config.vocab_size, dtype=np.bool_)
        try:
            if (mask := request.constraint.mask()) is None:
                return None
            allowed[: len(mask)] = mask
        except Exception:
            _log.exception("request %d: its constraint has failed", request.id)
        if request.num_output < request.params.min_tokens:
            later = allowed.copy()
            later[self._ends(request)] = False
            # What must end here does, however short it is.
            allowed = later if later.any() else allowed
        return allowed


class PageRows:
    """Requests' pages as arrays, made anew for those that have got others since the last step."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[list[int], NDArray[np.int32]]] = {}

    def of(self, works: Sequence[Work]) -> list[NDArray[np.int32]]:
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


def _spans(works: Sequence[Work]) -> Iterator[tuple[Request, int, int, int]]:
    """Each work's request, its first token and the one behind its last, and where they begin in the step."""
    start = 0
    for work in works:
        yield work.request, work.first, work.first + work.count, start
        start += work.count + len(work.draft)


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
