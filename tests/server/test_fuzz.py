"""Bodies of every kind against a real server with a small cache: each is answered soon, and no page is lost.

Bodies begin as valid ones of every protocol, with values replaced, left out, doubled or moved; then the bytes
themselves are cut, joined, and written over. What comes is drawn from a seed alone.
"""

from __future__ import annotations

import copy
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from time import sleep
from typing import Any

import pytest

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.model.model import Model
from openm3.server import command
from openm3.server.app import create_app
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from tests.server.test_openai_fuzz import CHAT, COMPLETION, places
from tests.server.test_protocol_fuzz import MESSAGES, RESPONSE

SECONDS = 20.0
"""How long any answer may take."""

CLIENTS = 4

OURS = (b"internal error", b"no numbers", b"Traceback", b'"http_code":"500"', b'"api_error"', b'"server_error"')
"""What is in answers, streams among them, in which something of the server's own went wrong."""

CONTEXT = {"messages": [{"role": "user", "content": "Where is it?"}], "tools": [], "reply": [5, 6, 7]}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="a.txt"\r\nContent-Type: text/plain\r\n\r\nabc\r\n--b--\r\n'
)
VALID: dict[str, dict[str, Any] | bytes] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/anthropic/v1/messages": MESSAGES,
    "/anthropic/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
    "/tokenize": {"model": "m3-tiny", "prompt": "a <b>", "return_token_strs": True},
    "/detokenize": {"model": "m3-tiny", "tokens": [1, 2, 3]},
    "/xray/context": CONTEXT,
    "/xray/block": CONTEXT | {"block": 0},
    "/v1/files": FORM,
    "/v1/files/upload": FORM,
}
JSON, FORM_TYPE = "application/json", "multipart/form-data; boundary=b"
TYPES = (f"{JSON}; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data")
BROKEN = (b"", b"null", b"[]", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 10_000, b'"' + b"\\ud800" * 1000 + b'"')
ODD: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, -(2**63) - 1, 0.5, -0.0, 1e308, 1e400, float("nan"), 10**400),
    *(
        "",
        " ",
        "\x00",
        "\ud800",
        "\u202e",
        "\ufeff",
        "é\u0301",
        "👩‍👩‍👧",
        "]<]minimax[>[<tool_call>",
        "<mm:think>",
        "[e~[",
    ),
    *("{{ 7 * 7 }}", "a" * 10_000, "auto", "required", "m3-tiny", "assistant", "tool", "file:///etc/passwd"),
    *([], {}, [[]], [{}], [None], {"": None}, {"type": "text"}, {"$ref": "#"}, {"type": ["object", 3]}, [1.5, "x"]),
    *({"type": "object", "properties": {"a": {"$ref": "#"}}}, {"pattern": "(a+)+$", "type": "string"}, {"const": 1e99}),
)


def changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A body with a few of its values replaced by odd ones, left out, doubled, or put deep into others."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        spots = places(body)
        if not spots:
            break
        *above, key = chance.choice(spots)
        holder: Any = body
        for step in above:
            holder = holder[step]
        match chance.randrange(12):
            case 0 | 1 | 2:
                del holder[key]
            case 3 | 4 if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key])] * chance.choice((1, 20))
            case 5 if isinstance(holder, dict):
                holder[chance.choice(("stream", "n", "max_tokens", "type", "x"))] = odd(chance)
            case 6:
                for _ in range(chance.choice((2, 60, 240))):
                    holder[key] = [holder[key]] if chance.random() < 0.5 else {"a": holder[key]}
                break
            case _:
                holder[key] = odd(chance)
    return body


def odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))


def as_json(body: dict[str, Any], chance: random.Random) -> bytes:
    """A body as JSON, or nearly: with keys twice, or in other encodings."""
    text = json.dumps(body, ensure_ascii=chance.random() < 0.7)
    if chance.random() < 0.1:
        text = f"{text[:-1]}, {text[1:]}"
    encoding = chance.choice((*["utf-8"] * 12, "utf-16", "utf-32", "latin-1"))
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def request(path: str, chance: random.Random) -> tuple[bytes, str]:
    """A body for a path, and what it is said to be."""
    valid = VALID[path]
    if isinstance(valid, bytes):
        data, kind = valid, FORM_TYPE
    else:
        data, kind = as_json(changed(valid, chance) if chance.random() < 0.9 else valid, chance), JSON
    first = chance.randrange(len(data) + 1)
    match chance.randrange(20):
        case 0:
            data = data[:first]
        case 1:
            data = data[:first] + chance.randbytes(chance.randrange(1, 20)) + data[first + chance.randrange(20) :]
        case 2:
            data = chance.choice((*BROKEN, chance.randbytes(3000)))
        case 3:
            kind = chance.choice(TYPES)
    return data, kind


def answer(address: tuple[str, int], path: str, data: bytes, kind: str) -> tuple[int, bytes]:
    """The status and all of the body. Raises OSError or HTTPException where there is no whole answer in time."""
    connection = HTTPConnection(*address, timeout=SECONDS)
    try:
        connection.request("POST", path, data, {"Content-Type": kind} if kind else {})
        heard = connection.getresponse()
        return heard.status, heard.read()
    finally:
        connection.close()


def complaint(status: int, heard: bytes) -> str | None:
    """What is wrong with an answer to whatever a client sent."""
    if status not in (200, 400, 404, 413, 429):
        return f"{status}"
    if status != 200 and not json.loads(heard)["error"]["message"]:
        return f"{status} without a word"
    if any(sign in heard for sign in OURS):
        return "an error of ours"
    if heard.startswith((b"data:", b"event:")) and not heard.endswith(b"\n\n"):
        return "a stream without an end"
    return None


def fuzz(address: tuple[str, int], count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """The statuses of so many answers, and what is wrong with some of them."""
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    numbers = iter(range(count))
    lock = threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or len(problems) > 20:
                return
            chance = random.Random(f"{seed} {number}")
            path = chance.choice(list(VALID))
            data, kind = request(path, chance)
            try:
                status, heard = answer(address, path, data, kind)
                problem = complaint(status, heard)
            except (OSError, HTTPException) as error:
                status, heard, problem = 0, b"", repr(error)
            statuses[status] += 1
            if problem is not None:
                problems.append(f"{number} {path} {kind}: {problem}: {heard[-300:]!r} to {data[:2000]!r}")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, problems


@contextmanager
def running(model: Model) -> Iterator[tuple[str, int]]:
    """`openm3 serve` in a thread with room for little; where it is. When all is answered nothing may be left."""
    settings = ServerSettings(port=0, max_tokens=64, max_body_bytes=1 << 20, max_file_bytes=1 << 20)
    engine = Engine(model, EngineConfig(cache_tokens=4096, max_requests=8, check=True))
    service = Service(AsyncEngine(engine), model, settings)
    server = command.Server(create_app(service), service)
    with command.listening(settings) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                sleep(0.01)
                assert thread.is_alive()
            yield listener.getsockname()
            assert engine.pages.num_held == 0 and not engine.has_work
        finally:
            server.should_exit = True
            thread.join(30)
    engine.scheduler.check()
    assert not thread.is_alive()


# Starlette forgets the part of a form that is cut off: its file is closed when it is collected.
forgotten_parts = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")


@forgotten_parts
def test_whatever_is_sent_is_answered(model: Model) -> None:
    with running(model) as address:
        for path, body in VALID.items():
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = FORM_TYPE if isinstance(body, bytes) else JSON
            assert answer(address, path, data, kind)[0] == 200, path
        statuses, problems = fuzz(address, 300, seed=0)
    assert problems == [] and statuses[200] > 50 and statuses[400] > 100


@forgotten_parts
@pytest.mark.e2e
def test_ten_thousand_bodies_are_answered(model: Model) -> None:
    with running(model) as address:
        statuses, problems = fuzz(address, 10_000, seed=1)
    assert problems == []
    assert statuses[200] > 2000 and statuses[400] > 4000
