"""Draft tokens without a draft model: what followed the last time that the text ended like this.

Replies that quote their prompt, as answers about documents and edits of code do, are mostly found there. The model
verifies every token, so a wrong one costs time and never changes a reply.
"""

from __future__ import annotations

from array import array

import numpy as np

from openm3.engine.request import Request

LAST = 3
"""Tokens at the end of the text that must have stood together before."""

PATIENCE = 8
"""After a draft none of which was right, so many tokens are written without one, doubled every time."""


class Lookup:
    """Proposes up to `most` tokens for each request, fewer where the last ones were wrong."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._texts: dict[int, _Text] = {}

    def __call__(self, request: Request) -> list[int]:
        text = self._texts.get(request.id)
        if text is None:
            text = self._texts[request.id] = _Text(self.most, (request.drafted, request.accepted))
        return text.propose(request)

    def forget(self, number: int) -> None:
        """Drop what is known of a request that has ended."""
        self._texts.pop(number, None)


class _Text:
    def __init__(self, most: int, seen: tuple[int, int]) -> None:
        self._ids = array("q")
        self._seen = seen
        self._most = most
        self._wanted = most
        self._rest = 0
        self._pause = PATIENCE

    def propose(self, request: Request) -> list[int]:
        self._learn(request)
        self._ids.extend(request.ids[len(self._ids) :])
        if self._rest > 0:
            self._rest -= 1
            return []
        ids = np.frombuffer(self._ids, dtype=np.int64)
        if len(ids) <= LAST:
            return []
        ends_alike = ids[LAST - 1 : -1] == ids[-1]
        for back in range(1, LAST):
            ends_alike &= ids[LAST - 1 - back : -1 - back] == ids[-1 - back]
        places = np.flatnonzero(ends_alike)
        if not len(places):
            return []
        first = int(places[-1]) + LAST
        found: list[int] = ids[first : first + self._wanted].tolist()
        return found

    def _learn(self, request: Request) -> None:
        """Longer drafts after right ones, none for a while after wrong ones."""
        drafted, accepted = request.drafted - self._seen[0], request.accepted - self._seen[1]
        self._seen = request.drafted, request.accepted
        if drafted == 0:
            return
        if accepted == drafted:
            self._wanted, self._pause = min(self._most, 2 * self._wanted), PATIENCE
        elif accepted > 0:
            self._wanted, self._pause = max(1, accepted + 1), PATIENCE
        else:
            self._wanted, self._rest, self._pause = max(1, self._wanted // 2), self._pause, 2 * self._pause
