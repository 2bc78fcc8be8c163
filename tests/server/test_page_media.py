"""Pictures and videos on the page, in a real Chromium, with a server and a model that sees."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.model.model import load
from openm3.server.app import create_app
from openm3.server.service import Service
from tests.server.browsing import Open, expect, finished, frames, pytestmark, say, until
from tests.server.media.samples import SEEING
from tests.server.serving import served
from tests.tokens.clips import make_clip

__all__ = ["pytestmark"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = load(SEEING)
    service = Service(AsyncEngine(Engine(model, EngineConfig(cache_tokens=16384))), model)
    with served(create_app(service)) as url:
        yield url
    # Playwright's loop runs in this thread.
    ending = threading.Thread(target=lambda: asyncio.run(service.close()))
    ending.start()
    ending.join()


def stripes(width: int, height: int) -> dict[str, Any]:
    """A picture of columns of many colours."""
    picture = Image.new("RGB", (width, height))
    for x in range(0, width, 40):
        picture.paste((x * 7 % 256, x * 3 % 256, 255 - x * 5 % 256), (x, 0, x + 40, height))
    target = io.BytesIO()
    picture.save(target, "PNG")
    return {"name": "stripes.png", "mimeType": "image/png", "buffer": target.getvalue()}


CLIP = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": make_clip([100 * i for i in range(60)])}
NOTES = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"one fish\n"}


def short(view: Any) -> None:
    view.click("#open-settings")
    view.fill("#max-tokens", "12")
    view.locator("#temperature").evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')) }")
    view.select_option("#thinking", "disabled")
    view.click("#settings .primary")


def test_files_are_shown_and_can_be_removed(open_page: Open) -> None:
    view = open_page()
    view.set_input_files("#files", [stripes(448, 336), CLIP, NOTES])
    expect(view.locator("#documents li")).to_have_count(3)
    assert view.locator("#documents li span").all_inner_texts() == ["stripes.png", "clip.mp4", "notes.txt"]
    expect(view.locator("#documents img")).to_have_attribute("alt", "stripes.png")
    expect(view.locator("#documents video")).to_have_attribute("aria-label", "clip.mp4")
    expect(view.locator("#size")).to_contain_text("tokens")
    until(view, "document.querySelector('#documents img').naturalWidth === 448")
    view.get_by_role("button", name="Remove clip.mp4").click()
    view.get_by_role("button", name="Remove notes.txt").click()
    assert view.locator("#documents li span").all_inner_texts() == ["stripes.png"]
    assert view.evaluate("document.activeElement.id") == "input"


def test_what_is_no_picture_goes_back_with_a_reason(open_page: Open) -> None:
    view = open_page(allowed="400")
    short(view)
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"<html>"}
    view.set_input_files("#files", [broken])
    say(view, "What?")
    expect(view.get_by_role("alert")).to_contain_text("messages[0].content[0]: the file is HTML, not a picture")
    assert view.locator("#documents li span").all_inner_texts() == ["broken.png"]
    assert view.input_value("#input") == "What?"


def test_an_empty_picture_is_not_taken(open_page: Open) -> None:
    view = open_page()
    view.set_input_files("#files", [{"name": "none.png", "mimeType": "image/png", "buffer": b""}])
    expect(view.locator("#notes")).to_have_text("none.png is empty")


def test_the_xray_is_drawn_over_the_picture(open_page: Open) -> None:
    view = open_page(width=1400, height=1000)
    short(view)
    bodies: list[Any] = []
    view.on("request", lambda request: bodies.append(request.post_data_json) if "completions" in request.url else None)
    view.locator("#xray-on").check()
    view.set_input_files("#files", [stripes(1024, 768), CLIP, NOTES])
    expect(view.locator("#documents li")).to_have_count(3)
    say(view, "What is in it?")
    finished(view)
    ((message,),) = (body["messages"] for body in bodies)
    assert [part["type"] for part in message["content"]] == ["image_url", "video_url", "text", "text"]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert message["content"][1]["video_url"]["url"].startswith("mm_file://file-")
    expect(view.locator(".question .views img")).to_have_attribute("alt", "stripes.png")

    figures = view.locator("#sights figure")
    expect(figures).to_have_count(2)
    expect(figures.nth(0).locator("img")).to_have_attribute("alt", "Picture 1")
    expect(figures.nth(1).locator("video")).to_have_attribute("aria-label", "Video 2")
    expect(figures.nth(0).locator("figcaption")).to_contain_text("Picture 1 · blocks 0 to 4 · this token reads")
    frames(view)
    # Cells that some row read are tinted, the others veiled.
    colours = (
        figures.nth(0)
        .locator("canvas")
        .evaluate(
            """canvas => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const found = new Set();
          for (let i = 3; i < data.length; i += 4) found.add(data[i]);
          return [...found].sort((a, b) => a - b);
        }"""
        )
    )
    assert colours and 0 not in colours
    # A click reads the block of the cell.
    figures.nth(0).locator("canvas").click(position={"x": 4, "y": 4})
    expect(view.locator("#reader-title")).to_contain_text("Block 0")
    expect(view.locator("#reader-text")).to_contain_text("tokens of image]")
    slider = figures.nth(1).locator("input")
    expect(slider).to_have_attribute("max", "2")
    slider.evaluate("e => { e.value = 2; e.dispatchEvent(new Event('input')) }")
    expect(figures.nth(1).locator("output")).to_have_text("4.0 s")


def test_a_second_turn_keeps_what_was_shown(open_page: Open) -> None:
    view = open_page()
    short(view)
    view.set_input_files("#files", [stripes(448, 448)])
    for text in ("What is it?", "And its colour?"):
        say(view, text)
        finished(view)
    expect(view.locator(".answer footer").last).to_contain_text("cached")
    expect(view.locator(".views img")).to_have_count(1)
