"""A service without a model: it says what a test wrote, and keeps what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from openm3.engine.request import Usage
from openm3.server.calls import Call, Event, Finished, Started
from openm3.server.errors import RequestError
from openm3.tokens import StreamDecoder

Line = Event | Exception | float
"""An event to yield, an exception to raise, or seconds to be silent."""

Script = Sequence[Line] | Callable[[Call], Sequence[Line]]


class FakeService:
    """Plays a script for each call: `Started` comes before it, and after it `Finished("stop")` if it has no end.

    The scripts are played in turns, the last one over and over. `calls` are those that came, `num_closed` counts those
    that the listener ended early.
    """

    def __init__(
        self,
        *scripts: Script,
        names: Sequence[str] = ("m3-tiny",),
        max_tokens: int = 524_288,
        prompt_tokens: int = 7,
        cached_tokens: int = 0,
    ) -> None:
        self.calls: list[Call] = []
        self.num_closed = 0
        self.model_names = names
        self.max_tokens = max_tokens
        self._scripts = scripts or ((),)
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens

    def usage(self, completion_tokens: int) -> Usage:
        """Usage that fits the prompts of this service."""
        return Usage(self._prompt_tokens, self._cached_tokens, completion_tokens)

    def check_model(self, name: object) -> str:
        """As the real one."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            message = f"the model {name!r} does not exist here; this server has: {served}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return str(name)

    async def stream(self, call: Call) -> AsyncGenerator[Event]:
        """The next script."""
        self.calls.append(call)
        script = self._scripts[min(len(self.calls), len(self._scripts)) - 1]
        lines = list(script(call) if callable(script) else script)
        ended = False
        try:
            if lines and isinstance(lines[0], Exception):
                raise lines[0]
            yield Started(self._prompt_tokens)
            for line in lines:
                if isinstance(line, Exception):
                    raise line
                if isinstance(line, float):
                    await asyncio.sleep(line)
                    continue
                ended = isinstance(line, Finished)
                yield line
            if not ended:
                yield Finished("stop", self.usage(len(lines)))
        except (GeneratorExit, asyncio.CancelledError):
            self.num_closed += not ended
            raise

    async def count(self, call: Call) -> int:
        """Always the same."""
        self.calls.append(call)
        return self._prompt_tokens

    async def ids(self, call: Call) -> list[int]:
        """As many as `count` says."""
        return list(range(await self.count(call)))

    def decoder(self) -> StreamDecoder:
        """Ids are code points here."""
        return StreamDecoder({i: chr(i).encode() for i in range(128)})

    def token_bytes(self, id: int) -> bytes:
        """The same."""
        return chr(id).encode() if 0 <= id < 128 else b""
