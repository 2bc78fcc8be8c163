"""Probes, models and the tokenizer over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from openm3.tokens.prompt import user_message
from tests.server.serving import serving

Test = Callable[[httpx.AsyncClient, Service], Awaitable[None]]
NAMES = ("M3", "org/m3")


@pytest.fixture
def ask(model: Model) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def whole() -> None:
            async with serving(model, ServerSettings(names=NAMES)) as service:
                transport = httpx.ASGITransport(create_app(service))
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    await test(client, service)

        asyncio.run(whole())

    return run


def test_probes_follow_the_servers_life(ask: Any) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for method in (client.get, client.head):
            assert [(await method(path)).status_code for path in ("/health", "/ready")] == [200, 200]
        assert (await client.get("/health")).json() == {"status": "ok"}
        service._closing = True
        assert [(await client.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
        await service.close()
        assert [(await client.get(path)).status_code for path in ("/health", "/ready")] == [503, 503]
        assert (await client.get("/metrics")).status_code == 200

    ask(test)


def test_models_in_both_shapes(ask: Any) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == list(NAMES)
        one = (await client.get("/v1/models/org/m3")).json()
        assert one == listed["data"][1]
        assert (one["object"], one["owned_by"], one["max_model_len"]) == ("model", "openm3", service.max_model_len)
        assert one["created"] == service.created and one["root"] == "M3"
        for path, headers in (("/v1/models", {"anthropic-version": "2026-10-21"}), ("/anthropic/v1/models", {})):
            other = (await client.get(path, headers=headers)).json()
            assert (other["first_id"], other["last_id"], other["has_more"]) == ("M3", "org/m3", False)
            entry = (await client.get(f"{path}/M3", headers=headers)).json()
            assert entry == other["data"][0] and entry["type"] == "model" and entry["display_name"] == "M3"
            assert entry["created_at"].endswith("Z")
        gone = await client.get("/v1/models/gpt-7")
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"
        assert (await client.get("/anthropic/v1/models/x")).json()["error"]["type"] == "not_found_error"

    ask(test)


def test_text_to_tokens_and_back(ask: Any, model: Model) -> None:
    tokenizer = model.tokenizer

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        text = "def main(): # größer 🙂"
        body = {"prompt": text, "add_special_tokens": False, "return_token_strs": True, "model": "M3"}
        answer = (await client.post("/tokenize", json=body)).json()
        ids = tokenizer.encode(text)
        assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), service.max_model_len)
        assert answer["token_strs"][:2] == ["def", " main"]
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": text}
        messages = [{"role": "user", "content": "Hi"}]
        chat = (await client.post("/tokenize", json={"messages": messages, "thinking": "enabled"})).json()
        assert chat["tokens"] == tokenizer.chat(messages, thinking="enabled") and chat["token_strs"] is None
        document = {"name": "a.txt", "text": "one\r\ntwo\n"}
        body = {"messages": messages, "documents": [document], "thinking": "enabled"}
        read = [{"role": "user", "content": user_message([("a.txt", "one\ntwo\n")], messages[0]["content"])}]
        assert (await client.post("/tokenize", json=body)).json()["tokens"] == tokenizer.chat(read, thinking="enabled")
        assert (await client.post("/tokenize", json={"prompt": ""})).json()["count"] == 0

    ask(test)


def test_a_harness_finds_the_end_token(ask: Any, model: Model) -> None:
    """As lm-evaluation-harness does: the named token's text, and then its id by way of /tokenize."""

    async def test(client: httpx.AsyncClient, _: Service) -> None:
        info = (await client.get("/tokenizer_info")).json()
        for name, number in (("eos_token", model.tokenizer.eos_id), ("bos_token", model.tokenizer.bos_id)):
            body = {"prompt": info[name], "add_special_tokens": False}
            assert (await client.post("/tokenize", json=body)).json()["tokens"] == [number]
        assert info["chat_template"] == model.tokenizer.chat_template

    ask(test)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": []}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400),
        ("/tokenize", {"prompt": "x", "model": "gpt-7"}, 404),
        ("/tokenize", {"prompt": "x", "documents": [{"name": "a", "text": "b"}]}, 400),
        (
            "/tokenize",
            {"messages": [{"role": "system", "content": "x"}], "documents": [{"name": "a", "text": "b"}]},
            400,
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}], "documents": [{"name": "a", "text": "b"}]}, 400),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "thinking": True}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [10**30]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
        ("/detokenize", {"tokens": None}, 400),
    ],
)
def test_what_has_no_answer_is_refused(ask: Any, path: str, body: dict[str, Any], status: int) -> None:
    async def test(client: httpx.AsyncClient, _: Service) -> None:
        assert (await client.post(path, json=body)).status_code == status

    ask(test)


def test_lone_surrogates_are_survived(ask: Any) -> None:
    async def test(client: httpx.AsyncClient, _: Service) -> None:
        headers = {"content-type": "application/json"}
        answer = await client.post("/tokenize", content=b'{"prompt": "a\\ud800b"}', headers=headers)
        assert answer.status_code in (200, 400)
        answer = await client.post("/tokenize", content=b'{"prompt": "x", "model": "\\ud800"}', headers=headers)
        assert answer.status_code in (400, 404) and answer.json()["type"] == "error"

    ask(test)
