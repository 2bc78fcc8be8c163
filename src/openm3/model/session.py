"""One request's cache: read a prompt in chunks, then go on token by token. The engine's oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.model.attention import Observer
from openm3.model.batch import Batch
from openm3.model.capture import Capture
from openm3.model.network import Network
from openm3.model.replay import Replay

CHUNK = 1024
"""Tokens read at a time: enough to keep matrix products large, little enough for progress and Ctrl-C."""


class Session:
    """The keys and values of one sequence, up to `capacity` tokens, in pages of their own."""

    def __init__(self, network: Network, capacity: int) -> None:
        self.network = network
        self.capacity = capacity
        self.length = 0
        num_pages = -(-capacity // BLOCK)
        self.device = network.embed.weight.device
        self.pools = network.new_pools(num_pages, network.embed.weight.dtype)
        self._page_P = torch.arange(num_pages, dtype=torch.int32)
        self._capture: Capture | None = None
        self._replay: Replay | None = None

    @torch.inference_mode()
    def read(
        self,
        ids: list[int],
        *,
        chunk: int = CHUNK,
        on_progress: Callable[[int], None] | None = None,
        observer: Observer | None = None,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Append tokens; returns the logits [V] (float32) after the last. `on_progress` gets the tokens read so far.

        `images` are places among these tokens, ascending, and the inputs [I, D] that stand there for pictures.
        Interrupted between chunks, the session holds what was read and can go on from `length`.
        """
        assert ids and self.length + len(ids) <= self.capacity
        hidden_TD = None
        for first in range(0, len(ids), chunk):
            part = torch.tensor(ids[first : first + chunk])
            end = self.length + part.shape[0]
            batch = Batch.step(part, self.length, self._page_P[: -(-end // BLOCK)])
            batch = batch.to(self.device)
            if images is not None:
                begin, stop = torch.searchsorted(images[0], torch.tensor([first, first + chunk], device=self.device))
                batch = batch.with_images(images[0][begin:stop] - first, images[1][begin:stop])
            hidden_TD = self.network.hidden(batch, self.pools, observer)
            self.length = end
            if on_progress is not None:
                on_progress(first + part.shape[0])
        assert hidden_TD is not None
        logit_V: Tensor = self.network.head(hidden_TD[-1]).float()
        return logit_V

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens: the next read overwrites it."""
        assert 0 <= length <= self.length
        self.length = length

    def decode(self, logit_V: Tensor, limit: int, observer: Observer | None = None) -> Iterator[int]:
        """Greedy tokens from the logits after the prompt, at most `limit`; equal logits take the smaller id.

        Steps are captured and replayed, unless somebody observes them.
        """
        if self.device.type == "cuda" and observer is None:
            yield from self._replayed(logit_V, limit)
            return
        for i in range(limit):
            token = int(logit_V.argmax())
            yield token
            if i + 1 < limit:
                logit_V = self._next(token) if observer is None else self.read([token], observer=observer)

    @torch.inference_mode()
    def _next(self, token: int) -> Tensor:
        """The logits [V] after one more token."""
        if self._capture is None:
            self._capture = Capture(self.network, self.pools)
        pages_P = self._page_P[: self.length // BLOCK + 1]
        logit_1V = self._capture.logits(Batch.step(torch.tensor([token]), self.length, pages_P))
        if logit_1V is None:
            return self.read([token])
        self.length += 1
        return logit_1V[0].float()

    def _replayed(self, logit_V: Tensor, limit: int) -> Iterator[int]:
        if self._replay is None:
            self._replay = Replay(self.network, self.pools, self._page_P.to(self.device))
        for i, token in enumerate(self._replay.tokens(logit_V, self.length, limit)):
            # A token's key counts from when the next token is asked for, as if it were computed then.
            self.length += i > 0
            yield token
