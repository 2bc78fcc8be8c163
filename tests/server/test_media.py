"""Pictures and videos through every protocol, to a model that sees."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from openm3 import ImageOptions, VideoOptions, read_image, read_video
from openm3.model.model import Model, load
from openm3.server.app import create_app
from openm3.server.calls import Call
from openm3.server.media.parts import with_media
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from tests.server.media.samples import SEEING, TOKENS, picture, uri
from tests.server.serving import serving
from tests.tokens.clips import make_clip

Test = Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, None]]

RED, BLUE = uri(picture()), uri(picture("blue"))


@pytest.fixture(scope="module")
def seeing() -> Model:
    return load(SEEING)


@pytest.fixture
def ask(seeing: Model) -> Callable[[Test], None]:
    """Runs a test with a client of an application over a model that sees."""

    def run(test: Test) -> None:
        async def whole() -> None:
            async with (
                serving(seeing, ServerSettings(names=("m3",))) as service,
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(create_app(service)), base_url="http://127.0.0.1", timeout=60
                ) as client,
            ):
                await asyncio.wait_for(test(client, service), 90)

        asyncio.run(whole())

    return run


def image(url: str = RED, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **options}}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m3", "messages": list(messages), "max_tokens": 4, "temperature": 0, **more}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}


def text_of(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_the_reply_is_what_the_model_makes_of_the_picture(ask: Callable[[Test], None], seeing: Model) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        tokenizer = seeing.tokenizer
        messages = [user(image(BLUE), image())]
        media = [read_image(picture("blue")), read_image(picture())]
        ids = tokenizer.chat(messages, media=media, thinking="disabled")
        own = list(seeing.generate(ids, media=media, max_new_tokens=4, stop_ids=[tokenizer.eos_id]))
        body = chat(*messages, thinking={"type": "disabled"})
        first = (await client.post("/v1/chat/completions", json=body)).json()
        assert text_of(first) == tokenizer.decode(own)
        assert first["usage"]["prompt_tokens"] == len(ids)
        # Streamed, and with the pictures known already.
        again = await client.post("/v1/chat/completions", json={**body, "stream": True})
        assert again.status_code == 200
        chunk = again.text.split("\n\n")[0].removeprefix("data: ")
        assert chunk.startswith("{")
        counted = await client.post("/tokenize", json={"messages": messages, "thinking": "disabled"})
        assert counted.json()["tokens"] == ids
        assert (await service.prompt(Call(messages=with_media(messages)))).media[1].size == (112, 112)

    ask(test)


def test_pictures_stand_in_every_role_and_keep_their_order(ask: Callable[[Test], None], seeing: Model) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [image(uri(picture("green"))), {"type": "text", "text": "Be brief."}]},
        user(image()),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "seen:"}, image(BLUE)]},
        {"role": "root", "content": [image(uri(picture("white")))]},
    ]

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        prompt = await service.prompt(Call(messages=with_media(messages)))
        # What root says comes first.
        digests = [read_image(picture(colour)).digest for colour in ("white", "green", "red", "blue")]
        assert [media.digest for media in prompt.media] == digests
        assert list(prompt.ids).count(seeing.config.image_id or -1) == 4 * TOKENS
        reply = await client.post("/v1/chat/completions", json=chat(*messages))
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["prompt_tokens"] == len(prompt.ids)

    ask(test)


def test_protocols_agree_on_tokens(ask: Callable[[Test], None]) -> None:
    data = RED.partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    text = {"type": "text", "text": "What is it?"}
    openai = chat({"role": "user", "content": [image(), text]})
    anthropic = {
        "model": "m3",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "image", "source": source}, text]}],
    }
    asked = [{"type": "input_image", "image_url": RED, "detail": "auto"}, {"type": "input_text", "text": text["text"]}]
    responses = {"model": "m3", "max_output_tokens": 16, "input": [{"role": "user", "content": asked}]}

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        counts = [
            (await client.post("/v1/chat/completions", json=openai)).json()["usage"]["prompt_tokens"],
            (await client.post("/v1/messages/count_tokens", json=anthropic)).json()["input_tokens"],
            (await client.post("/v1/responses/input_tokens", json=responses)).json()["input_tokens"],
            (await client.post("/v1/responses", json=responses)).json()["usage"]["input_tokens"],
            (await client.post("/tokenize", json={"messages": openai["messages"]})).json()["count"],
        ]
        usage = (await client.post("/anthropic/v1/messages", json=anthropic)).json()["usage"]
        counts.append(usage["input_tokens"] + usage["cache_read_input_tokens"])
        assert len(set(counts)) == 1 and counts[0] > TOKENS

    ask(test)


def test_results_of_tools_in_every_protocol(ask: Callable[[Test], None], seeing: Model) -> None:
    source = {"type": "url", "url": BLUE}
    anthropic = {
        "model": "m3",
        "max_tokens": 4,
        "system": [{"type": "image", "source": {"type": "url", "url": RED}}],
        "messages": [
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}]},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "is_error": True,
                        "content": [{"type": "image", "source": source}],
                    }
                ],
            },
        ],
    }
    responses = {
        "model": "m3",
        "max_output_tokens": 16,
        "input": [
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": BLUE}]},
        ],
    }

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for path, body in (("/v1/messages", anthropic), ("/v1/responses", responses)):
            reply = await client.post(path, json=body)
            assert reply.status_code == 200, reply.text
        count = await client.post("/v1/messages/count_tokens", json=anthropic)
        assert count.json()["input_tokens"] > 2 * TOKENS

    ask(test)


def test_videos_sent_and_uploaded(ask: Callable[[Test], None], seeing: Model) -> None:
    clip = make_clip([100 * i for i in range(40)])
    most = read_video(clip, VideoOptions(fps=5, max_long_side_pixel=150))

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        upload = await client.post("/v1/files/upload", files={"file": ("a.mp4", clip)})
        address = f"mm_file://{upload.json()['file']['file_id']}"
        options = {"fps": 5, "max_long_side_pixel": 150}
        anthropic = {"type": "video", "source": {"type": "url", "url": address}, **options}
        counts = []
        for url in (address, uri(clip, "video/mp4")):
            part = {"type": "video_url", "video_url": {"url": url, **options}}
            prompt = await service.prompt(Call(messages=with_media([user(part)])))
            assert [media.digest for media in prompt.media] == [most.digest]
            assert prompt.media[0].seconds == most.seconds
            counts.append(len(prompt.ids))
        body = {"model": "m3", "messages": [{"role": "user", "content": [anthropic, user()["content"][0]]}]}
        counts.append((await client.post("/v1/messages/count_tokens", json=body)).json()["input_tokens"])
        assert len(set(counts)) == 1
        # A file whose kind nobody says.
        unsaid = user({"type": "file", "file": {"file_id": address.removeprefix("mm_file://")}})
        assert (await service.prompt(Call(messages=with_media([unsaid])))).media[0].kind == "video"
        reply = await client.post("/v1/chat/completions", json=chat(unsaid))
        assert reply.status_code == 200, reply.text

    ask(test)


def test_options_decide_the_size(ask: Callable[[Test], None]) -> None:
    url = uri(picture(side=1024))

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for options in ({}, {"detail": "low"}, {"detail": "auto"}, {"max_long_side_pixel": 252}, {"detail": "high"}):
            (media,) = (await service.prompt(Call(messages=with_media([user(image(url, **options))])))).media
            assert media.num_tokens == read_image(picture(side=1024), ImageOptions(**options)).num_tokens
        (high,) = (await service.prompt(Call(messages=with_media([user(image(url, detail="original"))])))).media
        assert high.num_tokens == media.num_tokens > 1300

    ask(test)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (image("data:image/png;base64,AAAA*AAA"), "the base64 data is corrupted"),
        (image("https://example.org/a.png"), "--allow-media-urls"),
        (image("/etc/passwd"), "must begin with data:"),
        (image(uri(b"<html>")), "the file is HTML, not a picture"),
        (image(uri(picture()[:70])), "damaged or cut off"),
        ({"type": "video_url", "video_url": {"url": RED, "fps": 100}}, "fps must be a number from 0.2 to 5, not 100"),
        ({"type": "video_url", "video_url": {"url": uri(picture(form="JPEG"))}}, "not a video"),
    ],
)
def test_bad_media_is_a_400_that_names_the_part(ask: Callable[[Test], None], part: dict[str, Any], words: str) -> None:
    source = {"type": "url", **part[part["type"]]}
    block = {"type": part["type"].removesuffix("_url"), "source": source}

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for path in ("/v1/chat/completions", "/v1/messages"):
            shown = part if path.endswith("completions") else block
            body = chat({"role": "user", "content": [{"type": "text", "text": "x"}, shown]}, stream=True)
            reply = await client.post(path, json=body)
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert words in error["message"] and error["message"].startswith("messages[0].content[1]: ")
            if path.endswith("completions"):
                assert error["param"] == "messages[0].content[1]" and error["code"] == "2013"
            else:
                assert error["type"] == "invalid_request_error"

    ask(test)


def test_a_worker_that_dies_fails_one_request(ask: Callable[[Test], None]) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        assert (await client.post("/v1/chat/completions", json=chat(user(image())))).status_code == 200
        (pid,) = service._media._workers.pids
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat(user(image(BLUE)))))
        text = await client.post("/v1/chat/completions", json=chat({"role": "user", "content": "hi"}))
        assert text.status_code == 200
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        reply = await running
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "media_worker_died"
        assert (await client.post("/v1/chat/completions", json=chat(user(image(BLUE))))).status_code == 200

    ask(test)


def test_a_model_that_reads_text_alone_says_so(play: Callable[..., None], model: Model) -> None:
    if model.config.vision is not None:
        pytest.skip("the bundled model sees")

    async def test(service: Service) -> None:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            reply = await client.post("/v1/chat/completions", json={"messages": [user(image())]})
            assert reply.status_code == 400
            assert "messages[0].content[0]: this model sees no pictures and videos" in reply.json()["error"]["message"]
            assert service._media._workers.pids == []

    play(test)


def test_the_xray_knows_where_the_cells_are(ask: Callable[[Test], None], seeing: Model) -> None:
    clip = make_clip([100 * i for i in range(60)], size=(96, 128))
    video = {"type": "video_url", "video_url": {"url": uri(clip, "video/mp4")}}
    messages = [user(image(uri(picture(side=280)))), {"role": "assistant", "content": "Red."}, user(video)]

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        told = (await client.post("/xray/context", json={"messages": messages, "reply": [65]})).json()
        prompt = await service.prompt(Call(messages=with_media(messages)))
        still, moving = told["media"]
        assert (still["kind"], still["size"], still["grid"], still["seconds"]) == (
            "image",
            [280, 280],
            [1, 10, 10],
            None,
        )
        ((token, cell, count),) = still["runs"]
        assert (cell, count) == (0, 100)
        assert set(prompt.ids[token : token + count]) == {seeing.config.image_id}
        seen = prompt.media[1]
        assert seen.seconds is not None
        frames, rows, columns = moving["grid"]
        assert (moving["kind"], moving["size"], moving["seconds"]) == ("video", [96, 128], list(seen.seconds))
        assert frames == len(seen.seconds) and frames * rows * columns == seen.num_tokens
        assert [run[1:] for run in moving["runs"]] == [[i * rows * columns, rows * columns] for i in range(frames)]
        assert all(
            prompt.ids[run[0]] == prompt.ids[run[0] + run[2] - 1] == seeing.config.video_id for run in moving["runs"]
        )
        block = (await client.post("/xray/block", json={"context": told["context"], "block": 0})).json()
        assert block["text"].count("]<]image[>[") == 100

    ask(test)


def test_too_many(ask: Callable[[Test], None]) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        small = image(uri(picture(side=28)))
        reply = await client.post("/v1/chat/completions", json=chat(user(*[small] * 201)))
        assert reply.status_code == 400 and "at most 200" in reply.text
        prompt = await service.prompt(Call(messages=with_media([user(*[small] * 200)])))
        assert len(prompt.media) == 200

    ask(test)
