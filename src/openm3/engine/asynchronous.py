"""The engine for asyncio: a thread of its own steps it, and any number of tasks listen to replies."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from openm3.engine.constraint import Constraint
from openm3.engine.engine import Engine, Prompt
from openm3.engine.request import Completion, Delta, SamplingParams
from openm3.errors import BusyError, EngineError


class AsyncEngine:
    """An engine that several tasks may use. `close` it, or use it as an async context manager.

    A reply waits for its listener in one piece: who listens slowly gets fewer, longer deltas, and holds back nobody. A
    listener that goes away, by cancellation or by leaving its loop, ends its request within one step. If a step fails,
    every listener gets the error, and the engine refuses what comes later.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._replies: dict[int, Reply] = {}
        self._failure: BaseException | None = None
        self._closed = False
        # Once the thread has ended nobody would carry out a call: none is put then.
        self._gate = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="openm3 engine", daemon=True)
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
        pace: float = 0.0,
    ) -> Reply:
        """Let a request in; its reply, to be closed by whoever may stop listening early. Raises as `Engine.add` does.

        Deltas come `pace` seconds apart or more, the first and the last at once: the listener's loop has less to do.
        """
        reply = Reply(asyncio.get_running_loop(), pace, self._leave)
        try:
            await self._call(lambda: self._add(prompt, params, constraint, reply))
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
                for number, delta in self.engine.step().items():
                    self._tell(number, delta)
        except BaseException as error:
            self._failure = error
        with self._gate:
            self._ended = True
        for number in list(self._replies):
            last = None if self._failure is not None else self.engine.abort(number)
            self._replies.pop(number).put(self._refusal() if last is None else last)
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

    def _add(self, prompt: Prompt, params: SamplingParams | None, constraint: Constraint | None, reply: Reply) -> None:
        if self._closed or self._ended:
            raise self._refusal()
        reply.number = self.engine.add(prompt, params, constraint=constraint)
        self._replies[reply.number] = reply

    def _leave(self, reply: Reply) -> None:
        """Have a listener forgotten, and its request ended if it has not been."""

        def leave() -> None:
            if self._replies.pop(reply.number, None) is not None:
                self.engine.abort(reply.number)

        self._calls.put(leave)

    def _tell(self, number: int, delta: Delta) -> None:
        reply = self._replies.get(number)
        if reply is not None:
            reply.put(delta)
            if delta.completion is not None:
                del self._replies[number]


class Reply:
    """A reply as one listener hears it: an iterator of deltas. What it has not heard yet waits in one piece."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pace: float, leave: Callable[[Reply], None]) -> None:
        self.number = 0
        self._loop = loop
        self._pace = pace
        self._leave = leave
        self._heard_at = -math.inf
        self._pending: Delta | Exception | None = None
        self._lock = threading.Lock()
        self._arrived = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        with self._lock:
            item, self._pending = self._pending, None
            self._arrived.clear()
        self._heard_at = self._loop.time()
        self._ended = not isinstance(item, Delta) or item.completion is not None
        if isinstance(item, Exception):
            raise item
        assert item is not None
        return item

    def close(self) -> None:
        """Stop listening: a request that has not ended ends within one step."""
        self._ended = True
        self._leave(self)

    def put(self, item: Delta | Exception) -> None:
        """Called by the engine's thread."""
        with self._lock:
            before = self._pending
            joins = isinstance(before, Delta) and isinstance(item, Delta)
            self._pending = joined(before, item) if joins else item  # type: ignore[arg-type]
        is_last = not isinstance(item, Delta) or item.completion is not None
        if before is None or is_last:
            # The listener's loop may be gone: then nobody listens any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake, is_last)

    def _wake(self, is_last: bool) -> None:
        early = self._heard_at + self._pace - self._loop.time()
        if is_last or early <= 0:
            self._arrived.set()
        else:
            self._loop.call_later(early, self._arrived.set)


def joined(a: Delta, b: Delta) -> Delta:
    """Two deltas of a reply as one."""
    return Delta(
        a.ids + b.ids,
        a.text + b.text,
        b.finish_reason,
        b.completion,
        _added(a.logprobs, b.logprobs),
        _added(a.blocks, b.blocks),
        _added(a.prompt_logprobs, b.prompt_logprobs),
    )


_Item = TypeVar("_Item")


def _added(a: list[_Item] | None, b: list[_Item] | None) -> list[_Item] | None:
    return None if a is None and b is None else [*(a or ()), *(b or ())]
