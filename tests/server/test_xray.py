"""The text of blocks: whole, in the right document, on the right lines."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from openm3.config import BLOCK
from openm3.server import xray
from openm3.tokens.prompt import document_text, user_message
from tests.server.fake_page import FakeService, make_app, tokenizer

DOCUMENTS = [
    ("a.py", "".join(f"line {i} of the first\n" for i in range(1, 61))),
    ("notes/b.txt", "été 日本 🦜\n\nFile: not a header\n" + "".join(f"{i}: gamma delta\n" for i in range(4, 40))),
]
QUESTION = "What is\n\nsaid?"


def parts(documents: list[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    """The page's form: each document a part of its own."""
    texts = [*(document_text(*document) for document in documents), question]
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


def test_parts_make_the_prompt_that_ask_makes() -> None:
    whole = [{"role": "user", "content": user_message(DOCUMENTS, QUESTION)}]
    assert tokenizer().chat(parts(DOCUMENTS, QUESTION)) == tokenizer().chat(whole)


def test_documents_are_told_apart_from_the_messages(client: TestClient) -> None:
    asked = [{"role": "user", "content": QUESTION}]
    reply = tokenizer().encode("So.")
    named = {"messages": asked, "documents": [{"name": name, "text": text} for name, text in DOCUMENTS]}
    known, expected = (
        client.post("/xray/context", json={**body, "reply": reply}).json()
        for body in (named, {"messages": parts(DOCUMENTS, QUESTION)})
    )
    assert known.pop("context") != expected.pop("context") and known == expected
    assert [part["source"] for part in known["parts"]] == ["a.py", "notes/b.txt", None, None]
    for block in range(known["tokens"] // BLOCK):
        texts = [
            client.post("/xray/block", json={**body, "reply": reply, "block": block}).json()["text"]
            for body in (named, {"messages": parts(DOCUMENTS, QUESTION)})
        ]
        assert texts[0] == texts[1] != ""


def test_blocks_are_the_whole_text_of_prompt_and_reply(client: TestClient) -> None:
    messages, reply = parts(DOCUMENTS, QUESTION), tokenizer().encode("Gamma 🦜 and delta, " * 40)
    ids = [*tokenizer().chat(messages), *reply]
    known = client.post("/xray/context", json={"messages": messages, "reply": reply}).json()
    assert (known["tokens"], known["block_size"]) == (len(ids), BLOCK)
    texts = []
    for block in range(-(-len(ids) // BLOCK)):
        found = client.post("/xray/block", json={"context": known["context"], "block": block}).json()
        assert found["tokens"] == [block * BLOCK, min(len(ids), (block + 1) * BLOCK)]
        assert found["block"] == block and found["context"] == known["context"]
        texts.append(found["text"])
    assert "".join(texts) == tokenizer().decode(ids)
    assert texts[1] == tokenizer().decode(ids[BLOCK : 2 * BLOCK])
    assert "".join(known["reply"]) == tokenizer().decode(reply)
    assert len(known["reply"]) == len(reply)


def test_a_character_between_two_blocks_is_told_once(client: TestClient) -> None:
    bird = tokenizer().encode("🦜")
    assert len(bird) > 1
    for shift in range(BLOCK):
        content = " b" * shift + "🦜 tail " * 30
        ids = tokenizer().chat([{"role": "user", "content": content}])
        if "\ufffd" in tokenizer().decode(ids[:BLOCK]):
            break
    else:
        pytest.fail("no character lies between blocks")
    body = {"messages": [{"role": "user", "content": content}]}
    first, second = (client.post("/xray/block", json={**body, "block": block}).json()["text"] for block in (0, 1))
    assert first == tokenizer().decode(ids[:BLOCK]).rstrip("\ufffd")
    assert second.startswith("🦜")


@pytest.mark.parametrize("form", ["parts", "text"])
def test_places_name_the_document_and_its_lines(client: TestClient, form: str) -> None:
    documents = DOCUMENTS if form == "parts" else DOCUMENTS[:1]
    question = QUESTION if form == "parts" else "What is said?"
    messages = parts(documents, question)
    if form == "text":
        messages = [{"role": "user", "content": user_message(documents, question)}]
    seen: dict[str, set[int]] = {}
    num_blocks = -(-len(tokenizer().chat(messages)) // BLOCK)
    for block in range(num_blocks):
        found = client.post("/xray/block", json={"messages": messages, "block": block}).json()
        for place in found["places"]:
            if place["source"] is None:
                assert (place["lines"], block) == (None, num_blocks - 1)
                continue
            if place["lines"] is None:
                continue
            first, last = place["lines"]
            lines = dict(documents)[place["source"]].split("\n")[first - 1 : last]
            assert all(line in found["text"] for line in lines[1:-1])
            assert lines[0][-1:] in found["text"] and lines[-1][:1] in found["text"]
            before = seen.setdefault(place["source"], set())
            # A line that begins in one block may end in the next.
            assert first - max(before, default=0) in (0, 1)
            before.update(range(first, last + 1))
    assert seen == {name: set(range(1, text.rstrip().count("\n") + 2)) for name, text in documents}


def test_a_context_lists_its_parts_in_order(client: TestClient) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    messages = [*system, *parts(DOCUMENTS, "Why?"), {"role": "assistant", "content": "So."}]
    messages.append({"role": "user", "content": user_message([("c.txt", "x\n\nFile: d\ny"), ("e", "z")], "And?")})
    reply = tokenizer().encode("Because.")
    known = client.post("/xray/context", json={"messages": messages, "reply": reply}).json()
    named = [(part["role"], part["source"]) for part in known["parts"]]
    assert named == [
        ("system", None),
        ("user", "a.py"),
        ("user", "notes/b.txt"),
        ("user", None),
        ("assistant", None),
        # A text in one piece is cut wherever a header could be.
        *[("user", name) for name in ("c.txt", "d", "e", None)],
        ("assistant", None),
    ]
    ids = [*tokenizer().chat(messages), *reply]
    texts = [tokenizer().decode(ids[slice(*part["tokens"])]) for part in known["parts"]]
    assert "Be brief." in texts[0] and "Why?" in texts[3] and "And?" in texts[-2] and texts[-1] == "Because."
    assert texts[1].startswith("File: a.py\nline 1 of") and texts[1].rstrip().endswith("line 60 of the first")
    edges = [edge for part in known["parts"] for edge in part["tokens"]]
    assert edges == sorted(edges)


def test_a_context_is_made_once_and_the_last_are_kept(service: FakeService, client: TestClient) -> None:
    def body(i: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"number {i}"}]}

    names = [client.post("/xray/context", json=body(i)).json()["context"] for i in range(xray.NUM_KEPT)]
    assert len(set(names)) == len(service.calls) == xray.NUM_KEPT
    assert client.post("/xray/block", json={**body(0), "block": 0}).json()["context"] == names[0]
    assert len(service.calls) == xray.NUM_KEPT
    client.post("/xray/context", json=body(99))
    assert client.post("/xray/block", json={"context": names[0], "block": 0}).status_code == 200
    gone = client.post("/xray/block", json={"context": names[1], "block": 0})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "context_not_found"
    again = client.post("/xray/block", json={"context": names[1], "block": 0, **body(1)})
    assert again.json()["context"] == names[1]


def test_the_prompt_is_the_one_that_was_answered(service: FakeService, client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "thinking": {"type": "disabled"}}
    text = client.post("/xray/block", json={**body, "block": 0}).json()["text"]
    assert "look_up" in text
    assert service.calls[0].thinking == "disabled" and list(service.calls[0].tools) == [tool]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"block": 0}, 400, "context or messages is missing"),
        ({"block": 0, "context": "gone"}, 404, "not kept any more"),
        ({"block": 1, "messages": [{"role": "user", "content": "hi"}]}, 400, "block must be below 1"),
        ({"block": -1, "messages": [{"role": "user", "content": "hi"}]}, 400, "greater than or equal to 0"),
        ({"block": 0, "messages": []}, 400, "messages is empty"),
        ({"block": 0, "messages": [{"role": "cat", "content": "hi"}]}, 400, "role"),
        ({"block": 0, "messages": [{"role": "user", "content": [3]}]}, 400, "content part"),
        ({"block": 0, "messages": "hi"}, 400, "valid list"),
        ({"block": 0, "messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "much"}}, 400, "adaptive"),
        ({"block": 0, "messages": [{"role": "user", "content": "hi"}], "reply": ["x"]}, 400, "integer"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, body: dict[str, Any], status: int, words: str) -> None:
    found = client.post("/xray/block", json=body)
    assert found.status_code == status
    assert words in found.json()["error"]["message"]


def test_odd_replies_and_contents_are_no_error(client: TestClient) -> None:
    user = {"role": "user", "content": [{"type": "text", "text": " \n"}, {"type": "text", "text": "\ud800 hi"}]}
    body = {"messages": [user], "reply": [-1, 10**9, *tokenizer().encode("🦜")[:1]]}
    # Python's client would refuse to send half a character; JSON allows it.
    known = client.post("/xray/context", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert known.status_code == 200
    assert known.json()["reply"] == ["", "", "\ufffd"]
