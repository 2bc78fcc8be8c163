"""The engine for asyncio: a thread of its own steps it, and any number of tasks listen to replies."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
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
        self._replies: dict[int, _Reply] = {}
        self._failure: BaseException | None = None
        self._closed = False
        # Once the thread has ended nobody would carry out a call: none is put then.
        self._gate = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="openm3 engine", daemon=True)
        self._thread.start()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, constraint: Constraint | None = None
    ) -> AsyncIterator[Delta]:
        """One reply, as it is written. Raises as `Engine.add` does."""
        reply = _Reply(asyncio.get_running_loop())
        try:
            await self._call(lambda: self._add(prompt, params, constraint, reply))
            while True:
                delta = await reply.next()
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._calls.put(lambda: self._leave(reply))

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

    def _add(self, prompt: Prompt, params: SamplingParams | None, constraint: Constraint | None, reply: _Reply) -> None:
        if self._closed or self._ended:
            raise self._refusal()
        reply.number = self.engine.add(prompt, params, constraint=constraint)
        self._replies[reply.number] = reply

    def _leave(self, reply: _Reply) -> None:
        if self._replies.pop(reply.number, None) is not None:
            self.engine.abort(reply.number)

    def _tell(self, number: int, delta: Delta) -> None:
        reply = self._replies.get(number)
        if reply is not None:
            reply.put(delta)
            if delta.completion is not None:
                del self._replies[number]


@dataclass
class _Reply:
    """What one listener has not heard yet, in one piece."""

    loop: asyncio.AbstractEventLoop
    number: int = 0
    pending: Delta | Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: Delta | Exception) -> None:
        with self.lock:
            joins = isinstance(self.pending, Delta) and isinstance(item, Delta)
            self.pending = joined(self.pending, item) if joins else item  # type: ignore[arg-type]
        # The listener's loop may be gone: then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.arrived.set)

    async def next(self) -> Delta:
        await self.arrived.wait()
        with self.lock:
            item, self.pending = self.pending, None
            self.arrived.clear()
        if isinstance(item, Exception):
            raise item
        assert item is not None
        return item


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
