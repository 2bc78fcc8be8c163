"""One reply on its way out: the engine's deltas become the events that protocols speak of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

from openm3.engine.request import Completion, Delta
from openm3.server.calls import Call, Event, Finished, Looked, Progress, PromptScores, Reason, Scores
from openm3.server.packets import Packets
from openm3.tokens import Content, StreamRouter, Thinking, Tokenizer, ToolArguments, ToolEnd, ToolStart
from openm3.tokens import Event as TextEvent


class ReplyEvents:
    """Routes, counts and cuts one call's reply.

    Calls that the client did not ask for are left out: all of them with no tools or tool choice "none", those after the
    first without `parallel_tool_calls`.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._router = None if call.messages is None else StreamRouter(offered(call), call.thinking)
        self._packets = Packets()
        self._thoughts = _Thoughts(tokenizer.token_id("</mm:think>"))
        self._most_calls = 0 if offered(call) is None else math.inf if call.parallel_tool_calls else 1
        self._has_called = False
        self._num_ids = 0

    def take(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta; of the last one the last event is `Finished`."""
        if delta.prompt_logprobs:
            yield PromptScores(delta.prompt_logprobs)
        events = self._routed(delta)
        self._thoughts.take(delta.ids, events)
        # What is said of tokens goes with their own text: what came before leaves first, and none of it waits.
        about = list(self._said(delta))
        if about:
            yield from self._packets.flush()
            yield from about
        yield from self._packets.push(self._wanted(events), hold=delta.completion is None and not about)
        if delta.completion is not None:
            yield self._finished(delta.completion)

    @property
    def holds(self) -> bool:
        """Whether text waits for more: what `flush` gives."""
        return self._packets.holds

    def flush(self) -> Iterator[Event]:
        """The text that waits, however short."""
        return self._packets.flush()

    @property
    def answers(self) -> bool:
        """Whether the reply so far is more than thinking."""
        return not self._thoughts.go_on

    def _said(self, delta: Delta) -> Iterator[Event]:
        """What the client wanted to know of a delta's tokens beside their text."""
        self._num_ids += len(delta.ids)
        if self._call.progress and delta.ids:
            yield Progress(self._num_ids)
        if delta.logprobs:
            yield Scores(delta.logprobs)
        if delta.blocks:
            # Ids are ascending, and -1 stands behind the last.
            looks = [
                [[[i for i in row if i >= 0] for row in layer] for layer in step.tolist()] for step in delta.blocks
            ]
            yield Looked(delta.ids, looks)

    def _routed(self, delta: Delta) -> list[TextEvent]:
        if self._router is None:
            return [Content(delta.text)] if delta.text else []
        events = self._router.push(delta.text)
        return events if delta.completion is None else events + self._router.finish()

    def _wanted(self, events: Iterable[TextEvent]) -> Iterator[TextEvent]:
        for event in events:
            if isinstance(event, ToolStart | ToolArguments | ToolEnd) and event.index >= self._most_calls:
                continue
            self._has_called |= isinstance(event, ToolEnd) and event.complete
            yield event

    def _finished(self, completion: Completion) -> Finished:
        reason = cast(Reason, completion.finish_reason)
        if reason == "stop" and self._has_called:
            reason = "tool_calls"
        return Finished(reason, completion.usage, self._thoughts.count, self._stop(completion))

    def _stop(self, completion: Completion) -> str | None:
        """The stop string that ended the reply: its tokens say what stood behind the text."""
        stops = self._call.params.stop
        if completion.finish_reason != "stop" or not stops:
            return None
        rest = self._tokenizer.decode(completion.ids)[len(completion.text) :]
        return min((stop for stop in stops if rest.startswith(stop)), key=len, default=None)


class _Thoughts:
    """Counts the tokens up to the end of thinking, tags included; 0 for a reply that thinks nothing."""

    def __init__(self, end: int | None) -> None:
        self._end = end
        self._num_ids = 0
        self._has_thought = self._is_over = False

    def take(self, ids: list[int], events: Iterable[TextEvent]) -> None:
        if self._is_over:
            return
        kinds = [isinstance(event, Thinking) for event in events]
        self._has_thought |= any(kinds)
        self._is_over = self._end in ids or not all(kinds)
        if self._end in ids:
            self._num_ids += ids.index(self._end) + 1
        elif any(kinds) or not kinds:
            self._num_ids += len(ids)

    @property
    def go_on(self) -> bool:
        """Whether the reply still thinks."""
        return self._has_thought and not self._is_over

    @property
    def count(self) -> int:
        return self._num_ids if self._has_thought else 0


def offered(call: Call) -> list[dict[str, object]] | None:
    """The tools that a call's prompt offers; None for none."""
    return None if call.tool_choice == "none" or not call.tools else [dict(tool) for tool in call.tools]
