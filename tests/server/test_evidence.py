"""Evidence over HTTP: what `openm3 ask` shows for the same question and files, however they are sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from openm3 import cli
from openm3.ask import command
from openm3.config import BLOCK, EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.engine.request import Attention
from openm3.evidence.quotes import CHANGED, UNATTENDED
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.calls import Call
from openm3.server.evidence import NOTHING, UNANSWERED, find
from openm3.server.service import Service
from openm3.tokens.prompt import document_text, user_message
from openm3.tokens.tokenizer import Tokenizer

FILES = {
    "birds.py": "import os\n\n\nclass Heron(Bird):\n    legs = 2\n\n    def wade(self, depth):\n        return depth\n",
    "fish.py": "def swim(fast=True):\n    return fast\n\n\ndef sleep():\n    return None\n",
}
QUESTION = "Quote the line that defines wade."


@contextmanager
def connected(model: Model) -> Iterator[TestClient]:
    service = Service(AsyncEngine(Engine(model, EngineConfig(cache_tokens=8192, check=True))), model)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        yield client
        client.portal.call(service.close)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[TestClient]:
    with connected(model) as client:
        yield client


@pytest.fixture
def ask(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """What `openm3 ask --json` prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda *_, **__: model)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    files = [word for name in FILES for word in ("--file", name)]

    def run(*words: str) -> dict[str, Any]:
        assert cli.main(["ask", QUESTION, "--json", "--max-new-tokens", "24", *files, *words]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run


def body(content: object = QUESTION, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_tokens": 24, "thinking": {"type": "disabled"}, "evidence": True}
    return {"messages": [{"role": "user", "content": content}], **sampling, **more}


def post(client: TestClient, sent: dict[str, Any]) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json=sent)
    assert reply.status_code == 200, reply.text
    message: dict[str, Any] = reply.json()["choices"][0]["message"]
    return message


FORMS = {
    "documents": body(documents=[{"name": name, "text": text} for name, text in FILES.items()]),
    "parts": body([{"type": "text", "text": t} for t in (*(document_text(*f) for f in FILES.items()), QUESTION)]),
    "text": body(user_message(FILES.items(), QUESTION)),
}


def same_evidence(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    quoted = [(one["source"], *one["lines"], one["text"]) for one in found["evidence"]]
    expected = [(one["file"], one["first_line"], one["last_line"], one["text"]) for one in asked["evidence"]]
    shares = pytest.approx([one["share"] for one in asked["evidence"]], rel=1e-4)
    return quoted == expected and [one["share"] for one in found["evidence"]] == shares


@pytest.mark.parametrize("form", FORMS)
def test_the_same_as_on_the_command_line(client: TestClient, ask: Callable[..., dict[str, Any]], form: str) -> None:
    asked, message = ask(), post(client, FORMS[form])
    found = message["openm3"]
    assert message["content"] == asked["answer"] == "The line that defines wade is def wade(self, depth):"
    assert same_evidence(found, asked)
    assert (found["evidence"][0]["source"], found["evidence"][0]["lines"]) == ("birds.py", [7, 7])
    assert found["no_evidence"] is asked["no_evidence"] is None
    assert found["attended_share"] == pytest.approx(asked["attended_share"])
    for key in ("prompt", "documents", "answer"):
        assert found["tokens"][key] == asked["tokens"][key]
    assert set(asked["timings"]) < set(found["timings"])
    assert found["timings"]["read_seconds"] > 0 and found["timings"]["answer_tokens_per_second"] > 0


@pytest.mark.parametrize("thinking", ["adaptive", "enabled"])
def test_the_same_where_the_model_may_think(
    client: TestClient, ask: Callable[..., dict[str, Any]], thinking: str
) -> None:
    sent = {**FORMS["documents"], "thinking": {"type": thinking}, "reasoning_split": True}
    asked, message = ask("--thinking", thinking), post(client, sent)
    assert message["content"] == asked["answer"]
    assert message.get("reasoning_content", "") == asked["thinking"]
    assert same_evidence(message["openm3"], asked)
    assert message["openm3"]["attended_share"] == pytest.approx(asked["attended_share"])


def test_a_stream_ends_with_it(client: TestClient) -> None:
    whole = post(client, FORMS["documents"])["openm3"]
    lines = client.post("/v1/chat/completions", json={**FORMS["documents"], "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [i for i, delta in enumerate(deltas) if "openm3" in delta] == [len(deltas) - 1]
    found = deltas[-1]["openm3"]
    assert list(found) == list(whole)
    assert [one["lines"] for one in found["evidence"]] == [one["lines"] for one in whole["evidence"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_documents_stay_where_they_are_read_once(client: TestClient) -> None:
    first = body(documents=[{"name": name, "text": 10 * text} for name, text in FILES.items()])
    answer = post(client, first)
    turns = [*first["messages"], {"role": "assistant", "content": answer["content"]}]
    reply = client.post("/v1/chat/completions", json={**first, "messages": [*turns, *body("And sleep?")["messages"]]})
    found = reply.json()["choices"][0]["message"]["openm3"]
    assert found["tokens"]["documents"] > 3 * BLOCK
    assert found["tokens"]["read"] < BLOCK + 40
    assert {one["source"] for one in found["evidence"]} <= set(FILES)


def test_without_documents_the_users_own_lines_are_quoted(client: TestClient) -> None:
    found = post(client, body(FILES["birds.py"] + "\n" + QUESTION))["openm3"]
    (one,) = found["evidence"]
    assert one["text"] == "    def wade(self, depth):"
    assert (one["source"], one["lines"], found["no_evidence"]) == (None, None, None)
    assert 0.3 < one["share"] <= 1
    alone = post(client, body(QUESTION))["openm3"]
    assert (alone["evidence"], alone["no_evidence"], alone["tokens"]["documents"]) == ([], NOTHING, 0)


def test_a_reply_that_only_thinks_has_none(client: TestClient) -> None:
    sent = {**FORMS["documents"], "thinking": {"type": "enabled"}, "max_tokens": 3}
    found = post(client, sent)["openm3"]
    assert (found["evidence"], found["no_evidence"], found["attended_share"]) == ([], UNANSWERED, None)


def test_who_does_not_ask_gets_nothing(client: TestClient) -> None:
    assert "openm3" not in post(client, {**FORMS["documents"], "evidence": None})


DOCUMENTS = [{"name": name, "text": text} for name, text in FILES.items()]
OTHERS = {
    "/v1/messages": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 24},
}


def events_of(client: TestClient, path: str, sent: dict[str, Any]) -> list[dict[str, Any]]:
    lines = client.post(path, json={**sent, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("path", OTHERS)
def test_other_protocols_tell_the_same(client: TestClient, path: str) -> None:
    asked = {"evidence": True, "xray": True, "documents": DOCUMENTS}
    no_thoughts = {"thinking": {"type": "disabled"}, "reasoning": {"effort": "none"}}
    sent = {"model": "m3-tiny", "temperature": 0, **no_thoughts, **OTHERS[path], **asked}
    expected = post(client, {**FORMS["documents"], "xray": True})["openm3"]
    untimed = {key: value for key, value in expected.items() if key not in ("timings", "tokens")}

    found = client.post(path, json=sent).json()["openm3"]
    assert {key: found[key] for key in untimed} == untimed
    assert set(found["timings"]) == set(expected["timings"])
    assert found["tokens"]["documents"] == expected["tokens"]["documents"] > 0
    # The token that ends a reply is none of its text.
    assert len(found["ids"]) == len(found["blocks"]) == found["tokens"]["answer"] - 1

    events = events_of(client, path, sent)
    looked = [event["openm3"] for event in events if "ids" in event.get("openm3", {})]
    assert len(looked) > 1
    assert [one for told in looked for one in told["ids"]] == expected["ids"]
    assert [one for told in looked for one in told["blocks"]] == expected["blocks"]
    (last,) = [event for event in events if event["type"] in ("message_delta", "response.completed")]
    told = last.get("response", last)["openm3"]
    assert told["evidence"] == expected["evidence"] and set(told) == set(expected) - {"ids", "blocks"}

    plain = {key: value for key, value in sent.items() if key not in ("evidence", "xray")}
    assert "openm3" not in client.post(path, json=plain).json()
    assert not any("openm3" in json.dumps(event) for event in events_of(client, path, plain))


def test_a_prompt_is_read_for_the_cache_alone(client: TestClient) -> None:
    sent = {"model": "m3-tiny", "max_tokens": 0, "messages": [{"role": "user", "content": 20 * FILES["fish.py"]}]}
    first, second = (client.post("/v1/messages", json=sent).json() for _ in range(2))
    assert first["content"] == [] and first["usage"]["output_tokens"] == 0
    assert first["usage"]["cache_read_input_tokens"] == 0
    assert second["usage"]["cache_read_input_tokens"] >= 3 * BLOCK


@pytest.mark.parametrize(("path", "count"), [("/v1/messages", "/count_tokens"), ("/v1/responses", "/input_tokens")])
def test_documents_are_counted(client: TestClient, path: str, count: str) -> None:
    sent = {"model": "m3-tiny", **OTHERS[path]}
    alone, together = (
        client.post(path + count, json={**sent, "documents": documents}).json()["input_tokens"]
        for documents in (None, DOCUMENTS)
    )
    assert together > alone + 60
    refused = client.post(path, json={**sent, "documents": [{"name": "a", "text": " "}]})
    assert refused.status_code == 400 and "documents[0].text: must hold more" in refused.json()["error"]["message"]


def seen(ids: list[int], at: int) -> Attention:
    """All attention paid to one token."""
    mass_S = np.zeros(len(ids))
    mass_S[at] = 2.0
    return Attention(mass_S, 0.5)


def test_results_of_tools_are_quoted_and_replies_are_not(model: Model) -> None:
    tokenizer = model.tokenizer
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "alpha"},
        {"role": "user", "content": "beta\ngamma\neta?"},
        {"role": "assistant", "content": "delta", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "epsilon\nzeta"},
    ]
    ids = tokenizer.chat(messages, thinking="disabled")
    begins = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    text = tokenizer.decode(ids)
    for word, quoted in (("gamma", ["gamma"]), ("zeta", ["zeta"]), ("alpha", []), ("delta", []), ("eta?", [])):
        at = max(i for i, begin in enumerate(begins) if begin <= text.rindex(word))
        found = find(Call(messages=messages), ids, tokenizer.decoder(), seen(ids, at))
        assert [one.text for one in found.passages] == quoted
        assert found.missing == (None if quoted else UNATTENDED)
        assert found.attended_share == 0.5


def test_a_bare_prompt_is_quoted_by_its_lines(model: Model) -> None:
    ids = model.tokenizer.encode("one\ntwo\nthree")
    (found,) = find(Call(prompt=ids), ids, model.tokenizer.decoder(), seen(ids, len(ids) - 1)).passages
    assert (found.text, found.share, found.source, found.lines) == ("three", 1.0, None, None)


def test_a_template_that_changes_the_text_is_told(model: Model) -> None:
    plain = model.tokenizer
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    loud = Tokenizer(plain._spec, config=plain._config, chat_template=template)
    messages = [{"role": "user", "content": "one\ntwo"}]
    ids = loud.chat(messages)
    found = find(Call(messages=messages), ids, loud.decoder(), seen(ids, 0))
    assert (found.passages, found.missing, found.num_tokens) == ([], CHANGED, 0)
