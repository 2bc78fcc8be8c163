"""A reply's text cut into packets worth sending: a network and a client take hundreds a second, not one a character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from openm3.tokens import Content, Event, Thinking, ToolArguments

LEAST, MOST = 5, 200
"""Characters in a packet; the last of its kind may have fewer, the first of a reply comes at once."""


class Packets:
    """Joins neighbours of one kind, holds back what is too short to be sent, and cuts what is too long."""

    def __init__(self) -> None:
        self._held: Thinking | Content | ToolArguments | None = None
        self._is_first = True

    @property
    def holds(self) -> bool:
        """Whether something is held back."""
        return self._held is not None

    def push(self, events: Iterable[Event], *, hold: bool = True) -> Iterator[Event]:
        """What may be sent by now; without `hold` all of it."""
        for event in events:
            if not isinstance(event, Thinking | Content | ToolArguments):
                yield from self.flush()
                yield event
            elif self._held is not None and replace(event, text="") == replace(self._held, text=""):
                self._held = replace(self._held, text=self._held.text + event.text)
            else:
                yield from self.flush()
                self._held = event
        if self._held is not None and (not hold or self._is_first or len(self._held.text) >= LEAST):
            yield from self.flush()

    def flush(self) -> Iterator[Event]:
        """What was held back, in pieces of about the same length."""
        held, self._held = self._held, None
        if held is None:
            return
        self._is_first = False
        length = len(held.text)
        count = -(-length // MOST)
        for i in range(count):
            yield replace(held, text=held.text[i * length // count : (i + 1) * length // count])
