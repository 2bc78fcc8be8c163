"""Clients of all kinds, many at a time: most behave; some vanish, read slowly, or send what is no request.

Each request comes to an outcome in a few words. `Load.errors` are those that a server in good health gives nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openm3.eval.http import Address, ReplyError, opened, packets

SECONDS = 120.0
"""How long a request may take."""

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")

_DONE = b"data: [DONE]\n\n"
_ENDS = {"message_stop", "response.completed", "response.incomplete"}


def body(path: str, model: str, text: str, max_tokens: int, *, stream: bool = True) -> dict[str, Any]:
    """A request for a reply to `text`, as the protocol at a path has it."""
    message = [{"role": "user", "content": text}]
    own = {
        "/v1/chat/completions": {"messages": message, "max_tokens": max_tokens, "ignore_eos": True},
        "/v1/completions": {"prompt": text, "max_tokens": max_tokens, "ignore_eos": True},
        "/v1/messages": {"messages": message, "max_tokens": max_tokens},
        "/v1/responses": {"input": text, "max_output_tokens": max_tokens},
    }
    return {"model": model, "stream": stream, **own[path]}


def ending(heard: bytes) -> str:
    """How a stream ended: "ended" as its protocol has it, "failed" with an error in its words, or "cut off"."""
    told = packets(heard)
    kinds = {packet.get("type") for packet in told}
    if kinds & {"error", "response.failed"}:
        return "failed"
    is_whole = heard.endswith(_DONE) or bool(told and told[-1].get("type") in _ENDS)
    return "ended" if is_whole else "cut off"


@dataclass
class Load:
    """Requests to a server, one after the other by each of `streams` clients, and what has come of them.

    Prompts begin with one of `documents`. Anything but "ended", "answered", "vanished" and "refused" is an error.
    """

    address: Address
    model: str
    documents: Sequence[str]
    seed: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    took: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of the requests of each kind."""

    async def run(self, streams: int, seconds: float) -> None:
        """Go on for some time; what runs then is let end."""
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._client(random.Random(f"{self.seed} {i}"), end) for i in range(streams)))

    @property
    def errors(self) -> dict[str, int]:
        """Outcomes that are none of the intended, with their number."""
        intended = {"ended", "answered", "vanished", "refused"}
        return {f"{kind}: {what}": count for (kind, what), count in self.outcomes.items() if what not in intended}

    async def _client(self, chance: random.Random, end: float) -> None:
        kinds: dict[str, Callable[[random.Random], Awaitable[str]]] = {
            "stream": self._stream,
            "whole": self._whole,
            "vanishing": self._vanish,
            "slow": self._slow,
            "garbage": self._garbage,
            "half": self._half,
        }
        while asyncio.get_running_loop().time() < end:
            (kind,) = chance.choices(list(kinds), weights=(60, 12, 12, 6, 8, 2))
            begin = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(SECONDS):
                    outcome = await kinds[kind](chance)
            except TimeoutError:
                outcome = f"no end in {SECONDS:.0f} s"
            except (OSError, ReplyError) as error:
                outcome = f"no answer, {error}"
            self.outcomes[kind, outcome] += 1
            self.took.setdefault(kind, []).append(asyncio.get_running_loop().time() - begin)

    def _request(self, chance: random.Random, *, stream: bool = True) -> tuple[str, dict[str, Any]]:
        path = chance.choice(PATHS)
        # One in eight reads a long document; others the beginning of one, which they share.
        document = chance.choice(self.documents)
        text = document if chance.random() < 1 / 8 else document[: chance.choice((200, 2000, 8000))]
        question = " ".join(f"{chance.getrandbits(32):x}" for _ in range(chance.randrange(2, 40)))
        tokens = chance.choice((8, 32, 64, 128, 256))
        return path, body(path, self.model, f"{text}\n\n{question}", tokens, stream=stream)

    async def _stream(self, chance: random.Random) -> str:
        path, request = self._request(chance)
        async with opened(self.address, "POST", path, request) as (status, parts):
            heard = b"".join([part async for part in parts])
        return ending(heard) if status == 200 else _refusal(status, heard)

    async def _whole(self, chance: random.Random) -> str:
        path, request = self._request(chance, stream=False)
        async with opened(self.address, "POST", path, request) as (status, parts):
            heard = b"".join([part async for part in parts])
        return "answered" if status == 200 and json.loads(heard)["usage"] else _refusal(status, heard)

    async def _vanish(self, chance: random.Random) -> str:
        """Hang up before the answer, or in the middle of it."""
        path, request = self._request(chance, stream=chance.random() < 0.8)
        left = chance.randrange(12)
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(chance.uniform(0.05, 5)),
                opened(self.address, "POST", path, request, abort=True) as (status, parts),
            ):
                if status != 200:
                    return _refusal(status, b"".join([part async for part in parts]))
                async for _ in parts:
                    left -= 1
                    if left < 0:
                        break
        return "vanished"

    async def _slow(self, chance: random.Random) -> str:
        """Ask for much, the blocks of every token, and leave it lying."""
        request = {**body(PATHS[0], self.model, "Say something.", 128), "xray": True}
        async with opened(self.address, "POST", PATHS[0], request, limit=1024) as (status, parts):
            heard = b""
            async for part in parts:
                heard += part
                await asyncio.sleep(chance.uniform(0, 0.4))
        return ending(heard) if status == 200 else _refusal(status, heard)

    async def _garbage(self, chance: random.Random) -> str:
        path, request = self._request(chance)
        good = json.dumps(request).encode()
        data = chance.choice(
            (
                chance.randbytes(chance.randrange(1, 5000)),
                good[: chance.randrange(len(good))],
                good.replace(b'"model"', b'"model": 1, "x"'),
                json.dumps({**request, "max_tokens": -1, "max_output_tokens": "many"}).encode(),
                b"[" * 100_000,
                b"",
            )
        )
        async with opened(self.address, "POST", path, data) as (status, parts):
            heard = b"".join([part async for part in parts])
        return "refused" if 400 <= status < 500 else f"garbage got {_refusal(status, heard)}"

    async def _half(self, chance: random.Random) -> str:
        """Hang up in the middle of sending."""
        path, request = self._request(chance)
        data = self.address.request("POST", path, request)
        _, writer = await self.address.connect()
        writer.write(data[: chance.randrange(len(data))])
        await asyncio.sleep(chance.uniform(0, 1))
        writer.transport.abort()
        return "vanished"


def _refusal(status: int, heard: bytes) -> str:
    """Errors of one kind in the same words."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f"{status} {json.loads(heard)['error']['message'][:80]}"
    return f"{status} {heard[:80]!r}"
