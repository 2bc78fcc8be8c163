"""The engine for asyncio: a thread of its own steps it, and any number of tasks listen to replies."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from openm3.engine.constraint import Constraint
from openm3.engine.engine import Engine, Prompt
from openm3.engine.request import Completion, Delta, SamplingParams
from openm3.errors import BusyError, EngineError
from openm3.ops import native
from openm3.tokens.media import Media


class AsyncEngine:
    """An engine that several tasks may use. `close` it, or use it as an async context manager.

    A reply waits for its listener in one piece: who listens slowly gets fewer, longer deltas, and holds back nobody. A
    listener that goes away, by cancellation or by leaving its loop, ends its request within one step. If a step fails,
    every listener gets the error, and the engine refuses what comes later.

    The thread that makes it gives up the threads that helped it compute so far: the engine's own would be slowed down.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._replies: dict[int, Reply] = {}
        self._bells: dict[asyncio.AbstractEventLoop, _Bell] = {}
        self._failure: BaseException | None = None
        self._closed = False
        # Once the thread has ended nobody would carry out a call: none is put then.
        self._gate = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="openm3 engine", daemon=True)
        native.release_threads()
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether requests are let in: neither closed nor stopped by a step that failed."""
        return not (self._closed or self._ended)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        media: Sequence[Media] = (),
        pace: float = 0.0,
    ) -> Reply:
        """Let a request in; its reply, to be closed by whoever may stop listening early. Raises as `Engine.add` does.

        The first delta and the last come at once, others `pace` seconds apart or more, those of all replies of one loop
        and pace at the same moments: the listeners' loop has less to do, and holds up the engine's thread less often.
        """
        reply = Reply(self._bell(), pace, self._leave)
        try:
            await self._call(lambda: self._add(prompt, params, constraint, media, reply))
        except BaseException:
            reply.close()
            raise
        return reply

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, constraint: Constraint | None = None
    ) -> AsyncIterator[Delta]:
        """One reply, as it is written. Raises as `Engine.add` does."""
        with contextlib.closing(await self.submit(prompt, params, constraint=constraint)) as reply:
            async for delta in reply:
                yield delta

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, constraint: Constraint | None = None
    ) -> Completion:
        """One whole reply."""
        async for delta in self.stream(prompt, params, constraint=constraint):
            if delta.completion is not None:
                return delta.completion
        raise AssertionError("a reply ended without its last delta")

    async def stats(self) -> dict[str, float]:
        """What `Engine.stats` says."""
        found: dict[str, float] = await self._call(self.engine.stats)
        return found

    async def close(self) -> None:
        """End all requests and the thread. Requests that run are aborted."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Have the engine's thread call a function, between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        with self._gate:
            if self._closed or self._ended:
                raise self._refusal()
            self._calls.put(run)
        return await asyncio.wrap_future(future)

    def _refusal(self) -> Exception:
        if self._failure is None:
            return BusyError("the engine is closed")
        error = EngineError(f"the engine has stopped: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    def _run(self) -> None:
        try:
            while self._answer_calls():
                self._tell(self.engine.step())
        except BaseException as error:
            self._failure = error
        with self._gate:
            self._ended = True
        for number in list(self._replies):
            last = None if self._failure is not None else self.engine.abort(number)
            reply = self._replies.pop(number)
            reply.put(self._refusal() if last is None else last)
            reply.bell.ring([reply])
        while not self._calls.empty():
            if (call := self._calls.get()) is not None:
                call()
        self.engine.close()

    def _answer_calls(self) -> bool:
        """Carry out what tasks asked for; waits for them when there is nothing else to do. False to stop."""
        while not self._calls.empty() or not self.engine.has_work:
            call = self._calls.get()
            if call is None:
                return False
            call()
        return True

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        constraint: Constraint | None,
        media: Sequence[Media],
        reply: Reply,
    ) -> None:
        if self._closed or self._ended:
            raise self._refusal()
        reply.number = self.engine.add(prompt, params, constraint=constraint, media=media)
        self._replies[reply.number] = reply

    def _leave(self, reply: Reply) -> None:
        """Have a listener forgotten, and its request ended if it has not been."""

        def leave() -> None:
            if self._replies.pop(reply.number, None) is not None:
                self.engine.abort(reply.number)

        self._calls.put(leave)

    def _tell(self, deltas: Mapping[int, Delta]) -> None:
        """Have listeners hear what a step wrote."""
        news: dict[_Bell, list[Reply]] = {}
        for number, delta in deltas.items():
            reply = self._replies.get(number)
            if reply is None:
                continue
            reply.put(delta)
            news.setdefault(reply.bell, []).append(reply)
            if delta.completion is not None:
                del self._replies[number]
        for bell, replies in news.items():
            bell.ring(replies)

    def _bell(self) -> _Bell:
        loop = asyncio.get_running_loop()
        if loop not in self._bells:
            self._bells = {other: bell for other, bell in self._bells.items() if not other.is_closed()}
            self._bells[loop] = _Bell(loop)
        return self._bells[loop]


class Reply:
    """A reply as one listener hears it: an iterator of deltas. What it has not heard yet waits in one piece."""

    def __init__(self, bell: _Bell, pace: float, leave: Callable[[Reply], None]) -> None:
        self.number = 0
        self.bell = bell
        self.pace = pace
        self.is_urgent = True
        self._leave = leave
        self._is_new = True
        self._arrived = asyncio.Event()
        # The engine's thread adds at one end, the listener takes from the other.
        self._pending: deque[Delta | Exception] = deque()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        deltas: list[Delta] = []
        while self._pending:
            item = self._pending.popleft()
            if isinstance(item, Exception):
                self._ended = True
                raise item
            deltas.append(item)
        self._ended = deltas[-1].completion is not None
        return joined(deltas)

    def close(self) -> None:
        """Stop listening: a request that has not ended ends within one step."""
        self._ended = True
        self._leave(self)

    def put(self, item: Delta | Exception) -> None:
        """Called by the engine's thread, which rings the bell afterwards."""
        self._pending.append(item)
        is_last = not isinstance(item, Delta) or item.completion is not None
        self.is_urgent = self._is_new or is_last or not self.pace
        self._is_new = False

    def wake(self) -> None:
        """Called by the listener's loop: what is new may be heard."""
        if self._pending:
            self._arrived.set()


class _Bell:
    """Wakes the listeners of one loop: once for all that is new in a step, or in as long as their pace allows."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: dict[float, dict[Reply, None]] = {}

    def ring(self, replies: Iterable[Reply]) -> None:
        """Called by the engine's thread: there is something new for these."""
        urgent, begun = [], []
        with self._lock:
            for reply in replies:
                if reply.is_urgent:
                    urgent.append(reply)
                    continue
                if reply.pace not in self._waiting:
                    self._waiting[reply.pace] = {}
                    begun.append(reply.pace)
                self._waiting[reply.pace][reply] = None
        if urgent or begun:
            # The loop may be gone: then nobody listens any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._rung, urgent, begun)

    def _rung(self, urgent: Iterable[Reply], begun: Iterable[float]) -> None:
        for reply in urgent:
            reply.wake()
        for pace in begun:
            self._loop.call_later(pace, self._tell_waiting, pace)

    def _tell_waiting(self, pace: float) -> None:
        with self._lock:
            waiting = self._waiting.pop(pace)
        for reply in waiting:
            reply.wake()


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of a reply that follow each other as one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        ids=[token for delta in deltas for token in delta.ids],
        text="".join(delta.text for delta in deltas),
        logprobs=_chained([delta.logprobs for delta in deltas]),
        blocks=_chained([delta.blocks for delta in deltas]),
        prompt_logprobs=_chained([delta.prompt_logprobs for delta in deltas]),
    )


_Item = TypeVar("_Item")


def _chained(lists: Sequence[list[_Item] | None]) -> list[_Item] | None:
    given = [items for items in lists if items is not None]
    return [item for items in given for item in items] if given else None
