"""The page as people meet it, in a real Chromium; without one these tests are skipped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from openm3.server.errors import RequestError
from openm3.tokens.prompt import user_message
from tests.server.browsing import Open, expect, finished, frames, say, until
from tests.server.fake_page import NUM_GROUPS, NUM_LAYERS, FakeService, Script, make_app, selection, serving, tokenizer

LINES = "".join(f"line {i} of the long text\n" for i in range(1, 301))
LONG = {"name": "long.txt", "mimeType": "text/plain", "buffer": LINES.encode()}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with serving(make_app(service)) as url:
        yield url


def with_xray(view: Any, service: FakeService) -> None:
    """An answer of some tokens behind a long document, its X-ray open and complete."""
    service.script = Script(content=("One, two, ", "three and four."))
    view.set_input_files("#files", [LONG])
    view.locator("#xray-on").check()
    say(view, "How long?")
    finished(view)
    if not view.locator("#xray").is_visible():
        view.click(".open-xray")
    expect(view.locator("#tokens")).to_have_text("One, two, three and four.")


def go(view: Any, token: int) -> None:
    script = "(slider, token) => { slider.value = token; slider.dispatchEvent(new Event('input')); }"
    view.locator("#token").evaluate(script, token)
    frames(view)


def prompt_ids(body: dict[str, Any]) -> list[int]:
    return tokenizer().chat(body["messages"])


def test_an_answer_comes_as_it_is_written(service: FakeService, open_page: Open) -> None:
    view = open_page()
    service.script = Script(content=("Hello ", "**wor", "ld**\n\n- a\n", "- b"), pause=0.1)
    say(view, "Hi there")
    expect(view.locator(".answer .text")).to_contain_text("Hello")
    assert view.get_attribute("#log", "aria-busy") == "true"
    assert "world" not in view.inner_text(".answer .text")
    finished(view)
    assert view.locator(".answer .text").evaluate("node => node.innerHTML") == (
        "<p>Hello <strong>world</strong></p><ul><li><span>a</span></li><li><span>b</span></li></ul>"
    )
    cost = r"\d+ tokens at [\d.,]+/s · first after \d\.\d s · context \d+"
    assert re.fullmatch(cost, view.inner_text(".answer footer"))
    assert view.inner_text(".question") == "Hi there"
    assert view.inner_text("#status") == "The answer is complete."
    body = service.bodies[0]
    assert (body["model"], body["stream"], body["reasoning_split"]) == ("m3-tiny", True, True)
    assert (body["messages"], body["thinking"]) == ([{"role": "user", "content": "Hi there"}], {"type": "adaptive"})
    assert (body["temperature"], body["max_tokens"], body["evidence"]) == (1, 4096, True)
    assert "xray" not in body and not view.locator(".open-xray").count()
    assert view.evaluate("document.activeElement.id") == "input"


def test_thinking_is_folded_and_goes_back_with_the_next_question(service: FakeService, open_page: Open) -> None:
    view = open_page()
    service.script = Script(thinking=("First ", "this."), content=("Then that.",))
    say(view, "Why?")
    finished(view)
    thinking = view.locator(".thinking")
    assert re.fullmatch(r"Thought for \d\.\d s", thinking.locator("summary").inner_text())
    assert not thinking.locator("div").is_visible()
    thinking.locator("summary").click()
    assert thinking.locator("div").inner_text() == "First this."
    say(view, "And?")
    finished(view)
    answer = {"role": "assistant", "content": "Then that.", "reasoning_content": "First this."}
    assert service.bodies[1]["messages"][1:] == [answer, {"role": "user", "content": "And?"}]


def test_stop_ends_the_answer_and_keeps_what_is_there(service: FakeService, open_page: Open) -> None:
    view = open_page()
    service.script = Script(content=("begun ",) * 1000, pause=0.02)
    say(view, "Go on")
    expect(view.locator(".answer .text")).to_contain_text("begun")
    view.click("#stop")
    finished(view)
    assert service.ended.wait(5)
    assert view.inner_text(".answer footer").endswith("stopped")
    kept = view.inner_text(".answer .text")
    service.script = Script(content=("more",))
    say(view, "Again")
    finished(view)
    assert service.bodies[1]["messages"][1]["content"].strip() == kept
    assert len(service.bodies) == 2


def test_a_message_without_an_answer_goes_back_to_be_written(service: FakeService, open_page: Open) -> None:
    view = open_page(allowed="400 \\(Bad Request\\)")
    view.set_input_files("#files", [LONG])
    service.script = Script(pause=60)
    say(view, "Nothing yet")
    expect(view.locator("#stop")).to_be_visible()
    view.keyboard.press("Escape")
    finished(view)
    assert view.input_value("#input") == "Nothing yet"
    assert view.locator("#documents li span").all_inner_texts() == ["long.txt"]
    assert view.locator("article").count() == 0
    service.script = Script(refusal=RequestError("the prompt is too long"))
    view.press("#input", "Enter")
    finished(view)
    assert view.inner_text("[role=alert]") == "the prompt is too long (2013)"
    assert view.input_value("#input") == "Nothing yet"
    service.script = Script(content=("half ",), broken="the engine has stopped")
    view.press("#input", "Enter")
    finished(view)
    assert view.locator("[role=alert]").all_inner_texts() == ["the engine has stopped"]
    service.script = Script()
    view.press("#input", "Enter")
    finished(view)
    assert [len(body["messages"]) for body in service.bodies] == [1, 1, 1, 1]
    assert view.locator("[role=alert]").count() == 0 and view.input_value("#input") == ""


def test_documents_go_in_front_of_the_question(service: FakeService, open_page: Open) -> None:
    view = open_page()
    files = [
        {"name": "a\tb.txt", "mimeType": "text/plain", "buffer": "één\r\ntwo  \n\n".encode()},
        {"name": "latin.txt", "mimeType": "text/plain", "buffer": b"caf\xe9"},
        {"name": "wide.txt", "mimeType": "text/plain", "buffer": "wide".encode("utf-16")},
        {"name": "bin.dat", "mimeType": "text/plain", "buffer": b"\x00\x01"},
        {"name": "empty.txt", "mimeType": "text/plain", "buffer": b" \n"},
    ]
    view.set_input_files("#files", files)
    expect(view.locator("#notes")).to_have_text("bin.dat is no text file. empty.txt is empty")
    drop = """() => {
      const data = new DataTransfer();
      data.items.add(new File(["dropped"], "d.txt"));
      const send = (type) => document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true }));
      send("dragenter");
      const shown = !document.getElementById("drop").hidden;
      send("drop");
      return shown && document.getElementById("drop").hidden;
    }"""
    assert view.evaluate(drop)
    expect(view.locator("#documents li")).to_have_count(4)
    view.get_by_label("Remove wide.txt").click()
    texts = [("a\ufffdb.txt", "één\ntwo"), ("latin.txt", "café"), ("d.txt", "dropped")]
    content = user_message(texts, "What?")
    view.fill("#input", "What?")
    tokens = len(tokenizer().chat([{"role": "user", "content": content}]))
    expect(view.locator("#size")).to_have_text(f"{tokens} tokens of 524,288")
    service.script = Script(evidence=[{"text": "café", "share": 0.5, "source": "latin.txt", "lines": [1, 1]}])
    view.press("#input", "Enter")
    finished(view)
    sent = service.bodies[0]["messages"][0]["content"]
    assert "".join(part["text"] for part in sent) == content and len(sent) == 4
    assert view.locator(".question li").all_inner_texts() == [name for name, _ in texts]
    assert view.locator("#documents li").count() == 0
    assert view.inner_text(".evidence summary") == "Drawn from 1 passage"
    view.click(".evidence summary")
    assert view.inner_text(".evidence li").split("\n") == ["latin.txt:1 50 % of the attention", "café"]


def test_a_new_chat_forgets_and_an_old_answer_ends(service: FakeService, open_page: Open) -> None:
    view = open_page()
    service.script = Script(content=("old ",) * 1000, pause=0.02)
    say(view, "One")
    expect(view.locator(".answer .text")).to_contain_text("old")
    view.click("#new")
    assert service.ended.wait(5)
    finished(view)
    assert view.locator("article").count() == 0 and view.locator("#welcome").is_visible()
    service.script = Script()
    say(view, "Two")
    finished(view)
    assert [message["content"] for message in service.bodies[1]["messages"]] == ["Two"]


def test_settings_are_sent_and_kept_and_the_key_is_not_stored(service: FakeService, open_page: Open, url: str) -> None:
    view = open_page(allowed="401 \\(Unauthorized\\)")
    view.click("#open-settings")
    assert view.evaluate("document.activeElement.id") == "temperature"
    view.locator("#temperature").fill("0.25")
    view.fill("#max-tokens", "77")
    view.select_option("#thinking", "disabled")
    view.locator("#evidence").uncheck()
    view.keyboard.press("Escape")
    service.script = Script(refusal=RequestError("no such key", status=401))
    say(view, "Hi")
    expect(view.locator("#settings")).to_be_visible()
    assert view.evaluate("document.activeElement.id") == "key"
    view.keyboard.type("sk-1")
    with view.expect_request("**/v1/models") as asked:
        view.keyboard.press("Enter")
    assert asked.value.headers["authorization"] == "Bearer sk-1"
    expect(view.locator("#settings")).to_be_hidden()
    service.script = Script()
    with view.expect_request("**/v1/chat/completions") as asked:
        view.press("#input", "Enter")
    assert asked.value.headers["authorization"] == "Bearer sk-1"
    finished(view)
    body = service.bodies[-1]
    assert (body["temperature"], body["max_tokens"], body["thinking"]) == (0.25, 77, {"type": "disabled"})
    assert "evidence" not in body
    stored = json.loads(view.evaluate("JSON.stringify({ ...localStorage })"))
    assert "sk-1" not in str(stored)
    view.reload()
    assert view.input_value("#max-tokens") == "77" and view.input_value("#key") == "sk-1"


def pixels(view: Any, cells: list[tuple[int, int]], num_rows: int, num_blocks: int) -> list[list[int]]:
    """Colours of cells (row, block), in the middle of each."""
    return view.evaluate(
        """([cells, rows, blocks]) => {
          const canvas = document.getElementById("cells");
          const height = Math.floor(canvas.height / rows);
          const context = canvas.getContext("2d");
          return cells.map(([row, block]) => {
            const x = Math.floor(((block + 0.4) * canvas.width) / blocks);
            return [...context.getImageData(x, Math.floor((row + 0.4) * height), 1, 1).data.slice(0, 3)];
          });
        }""",
        [cells, num_rows, num_blocks],
    )


def swatch(view: Any, name: str) -> list[int]:
    color = view.locator(f"#c-{name}").evaluate("node => getComputedStyle(node).backgroundColor")
    return [int(number) for number in re.findall(r"\d+", color)[:3]]


def expected_cells(token: int, tokens: int, num_blocks: int) -> dict[tuple[int, int], str]:
    """What each cell of the map must be at a token: the colours' names."""
    found = {}
    rows = [(layer, group) for layer in range(1, NUM_LAYERS) for group in range(NUM_GROUPS)]
    for row, (layer, group) in enumerate(rows):
        sets = [set(selection(t, layer, group, num_blocks)) for t in range(tokens)]
        for block in range(num_blocks):
            times = sum(block in one for one in sets)
            if block in sets[token]:
                found[row, block] = "kept" if token and block in sets[token - 1] else "new"
            elif times:
                found[row, block] = "ever-1" if times < 4 else "ever-2" if times < 32 else "ever-3"
            else:
                found[row, block] = "odd" if layer % 2 else "even"
    return found


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_map_shows_each_selected_block(service: FakeService, open_page: Open, ratio: int) -> None:
    view = open_page(device_scale_factor=ratio)
    with_xray(view, service)
    tokens = int(view.get_attribute("#token", "max")) + 1
    assert (
        tokens
        == view.locator("#tokens span").count()
        == sum(len(tokenizer().encode(t)) for t in service.script.content)
    )
    num_blocks = -(-len(prompt_ids(service.bodies[0])) // 128)
    assert num_blocks > 16
    names = ("new", "kept", "ever-1", "ever-2", "even", "odd")
    colors = {name: swatch(view, name) for name in names}
    assert len({tuple(color) for color in colors.values()}) == len(names)
    for token in (tokens - 1, 0, 3, 2):
        go(view, token)
        expected = expected_cells(token, tokens, num_blocks)
        found = pixels(view, list(expected), (NUM_LAYERS - 1) * NUM_GROUPS, num_blocks)
        wrong = {
            cell: name for (cell, name), color in zip(expected.items(), found, strict=True) if color != colors[name]
        }
        assert wrong == {}
    kept = sum(name == "kept" for name in expected.values())
    chosen = kept + sum(name == "new" for name in expected.values())
    assert view.inner_text("#overlap") == f"3 / {tokens} · {round(100 * kept / chosen)} % kept"
    assert view.inner_text("#xray-sum").endswith("· dense: layer 0")
    assert view.locator("#tokens [aria-current]").inner_text() == view.locator("#tokens span").nth(2).inner_text()


def test_a_click_on_a_block_reads_it(service: FakeService, open_page: Open) -> None:
    view = open_page()
    with_xray(view, service)
    ids = prompt_ids(service.bodies[0])
    box = view.locator("#cells").bounding_box()
    num_blocks = -(-len(ids) // 128)
    view.mouse.click(box["x"] + box["width"] * 5.5 / num_blocks, box["y"] + 30)
    expect(view.locator("#reader-text")).to_contain_text("of the long text")
    text = tokenizer().decode(ids[5 * 128 : 6 * 128])
    assert view.locator("#reader-text").text_content() == text
    first = LINES[: LINES.index(text)].count("\n") + 1
    last = first + text[:-1].count("\n")
    assert view.inner_text("#reader-title") == f"Block 5 · long.txt:{first}-{last} · tokens 640 to 767"
    assert re.match(r"block 5 · layer 1, group 1 · \w+", view.inner_text("#hover"))
    view.locator("#top button").first.click()
    expect(view.locator("#reader-title")).to_contain_text(f"Block {num_blocks - 1} · long.txt")
    assert view.locator("#reader-text").text_content().endswith("three and four.")
    assert "answer" in view.inner_text("#reader-title")


def test_the_map_zooms_and_obeys_keys(service: FakeService, open_page: Open) -> None:
    view = open_page()
    with_xray(view, service)
    box = view.locator("#cells").bounding_box()
    view.mouse.move(box["x"] + 5, box["y"] + 5)
    assert "block 0 " in view.inner_text("#hover")
    for _ in range(4):
        view.mouse.wheel(0, -300)
        frames(view)
    view.mouse.move(box["x"] + box["width"] - 5, box["y"] + 5)
    assert "block 0 " not in view.inner_text("#hover")
    near = int(re.findall(r"block (\d+)", view.inner_text("#hover"))[0])
    view.mouse.down()
    view.mouse.move(box["x"] + 20, box["y"] + 5, steps=4)
    view.mouse.up()
    frames(view)
    view.mouse.move(box["x"] + 25, box["y"] + 5)
    assert abs(int(re.findall(r"block (\d+)", view.inner_text("#hover"))[0]) - near) <= 1
    assert not view.locator("#reader").is_visible()
    view.click("#zoom-fit")
    view.focus("#cells")
    view.mouse.move(0, 0)
    view.keyboard.press("0")
    before = int(re.findall(r"\d+", view.get_attribute("#cells", "aria-label"))[1])
    for key in ("ArrowDown", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowLeft", "ArrowRight", "+"):
        view.keyboard.press(key)
    assert before > 16 and view.inner_text("#hover").startswith("block 1 · layer 2, group 0")
    view.keyboard.press("Enter")
    expect(view.locator("#reader-title")).to_contain_text("Block 1 · long.txt")
    view.fill("#block", "3")
    view.press("#block", "Enter")
    expect(view.locator("#reader-title")).to_contain_text("Block 3 · long.txt")
    view.keyboard.press("Escape")
    assert not view.locator("#xray").is_visible()


def test_tokens_play_and_a_forgotten_context_is_asked_for_again(
    service: FakeService, open_page: Open, url: str
) -> None:
    view = open_page(allowed="404 \\(Not Found\\)")
    with_xray(view, service)
    go(view, 0)
    view.click("#play")
    assert view.get_attribute("#play", "aria-label") == "Pause"
    last = int(view.get_attribute("#token", "max"))
    until(view, f"document.getElementById('token').value === '{last}'")
    expect(view.locator("#play")).to_have_attribute("aria-label", "Play")
    view.locator("#tokens span").nth(1).click()
    frames(view)
    assert view.input_value("#token") == "1"
    for i in range(8):
        view.request.post(f"{url}/xray/context", data={"messages": [{"role": "user", "content": str(i)}]})
    view.fill("#block", "2")
    view.press("#block", "Enter")
    expect(view.locator("#reader-title")).to_contain_text("Block 2 · long.txt")


def test_the_map_grows_with_the_answer(service: FakeService, open_page: Open) -> None:
    view = open_page()
    service.script = Script(content=[f"{i} " for i in range(12)], pause=0.05)
    view.set_input_files("#files", [LONG])
    view.locator("#xray-on").check()
    say(view, "Count")
    expect(view.locator("#xray")).to_be_visible()
    # All at one moment: the answer goes on meanwhile.
    slider, busy = "document.getElementById('token')", "document.getElementById('log').ariaBusy"
    until(view, f"{slider}.max >= 4 && {slider}.value === {slider}.max && {busy} === 'true'")
    go(view, 1)
    finished(view)
    frames(view)
    assert view.input_value("#token") == "1" and int(view.get_attribute("#token", "max")) > 10
    view.click("#xray-close")
    say(view, "Again")
    finished(view)
    assert view.locator(".open-xray").count() == 2
    view.locator(".open-xray").first.click()
    assert view.evaluate("document.activeElement.id") == "xray-close"
    view.keyboard.press("Enter")
    assert view.evaluate("document.activeElement.className") == "open-xray"


def luminance(color: str) -> float:
    parts = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(service: FakeService, open_page: Open, scheme: str) -> None:
    view = open_page(color_scheme=scheme)
    with_xray(view, service)
    body = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")
    texts = view.evaluate(
        """() => {
          const opaque = (node) => {
            for (; node; node = node.parentElement) {
              const color = getComputedStyle(node).backgroundColor;
              if (!/, 0\\)$/.test(color) && !color.startsWith("color(")) return color;
            }
          };
          return [...document.querySelectorAll("body *")]
            .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
            .filter((node) => node.checkVisibility())
            .map((node) => [node.outerHTML.slice(0, 60), getComputedStyle(node).color, opaque(node)]);
        }"""
    )
    assert len(texts) > 20
    assert [text for text in texts if contrast(text[1], text[2]) < 4.5] == []
    pressed = {"light": "false", "dark": "true"}
    assert view.get_attribute("#theme", "aria-pressed") == pressed[scheme]
    before = pixels(view, [(0, 0)], 10, 18)
    view.click("#theme")
    frames(view)
    other = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(other) > 0.5) != (scheme == "light")
    assert pixels(view, [(0, 0)], 10, 18) != before
    view.reload()
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == other


def test_the_phone_never_scrolls_sideways(service: FakeService, open_page: Open) -> None:
    view = open_page(width=360, height=640, device_scale_factor=2, has_touch=True)

    def fits() -> None:
        assert view.evaluate("document.documentElement.scrollWidth") == 360
        wide = """[...document.querySelectorAll('#xray, #log, #composer, header')]
          .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id || node.tagName)"""
        assert view.evaluate(wide) == []
        small = """[...document.querySelectorAll('button, select, input, textarea')].filter((node) => {
          const { left, right, width, height } = node.getBoundingClientRect();
          return width && (left < 0 || right > 360 || Math.min(width, height) < (node.type === "range" ? 16 : 20));
        }).map((node) => node.id || node.outerHTML)"""
        assert view.evaluate(small) == []

    fits()
    long = {**LONG, "name": f"{'a-very-long-name' * 8}.txt"}
    view.set_input_files("#files", [long, LONG, {**LONG, "name": "c.txt"}])
    fits()
    code = f"```\n{'x = 1; ' * 40}\n```\n\n| {'wide | ' * 20}\n|{'---|' * 20}\n\n{'unbroken' * 40}"
    service.script = Script(
        content=(code,), evidence=[{"text": "y" * 300, "share": 1, "source": "z" * 90, "lines": None}]
    )
    view.locator("#xray-on").check()
    say(view, "w" * 200)
    finished(view)
    view.click(".evidence summary")
    fits()
    view.locator(".open-xray").tap()
    expect(view.locator("#tokens span").first).to_be_visible()
    covered = "[...document.querySelectorAll('header, main')].map((node) => node.inert)"
    assert view.evaluate(covered) == [True, True]
    view.locator("#cells").tap()
    expect(view.locator("#reader")).to_be_visible()
    fits()
    view.click("#xray-close")
    assert view.evaluate(covered) == [False, False]
    view.click("#open-settings")
    fits()


def test_every_control_has_a_name_and_its_turn(service: FakeService, open_page: Open) -> None:
    view = open_page()
    with_xray(view, service)
    session = view.context.new_cdp_session(view)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "textbox",
        "combobox",
        "slider",
        "spinbutton",
        "switch",
        "application",
        "dialog",
        "log",
        "complementary",
    }
    shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(shown) > 15
    assert [node["role"]["value"] for node in shown if not node.get("name", {}).get("value", "").strip()] == []
    ids = view.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    view.evaluate("document.activeElement.blur()")
    order: list[str] = []
    while len(order) < 40:
        view.keyboard.press("Tab")
        name = view.evaluate("document.activeElement.id || document.activeElement.className")
        if name and name in order:
            break
        order += [name] if name else []
    first = order.index("xray-on")
    order = order[first:] + order[:first]
    assert order[:18] == [
        *("xray-on", "new", "open-settings", "theme", "log", "open-xray", "input", "attach", "send"),
        *("xray-close", "tokens", "play", "token", "cells", "zoom-in", "zoom-out", "zoom-fit", "block"),
    ]


MARKDOWN = {
    "a *b* **c** `d*e*` \\*f\\*": "<p>a <em>b</em> <strong>c</strong> <code>d*e*</code> *f*</p>",
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
    "# One\ntwo\n\n###### Six #": "<h3>One</h3><p>two</p><h6>Six</h6>",
    "one\ntwo  \nthree": "<p>one\ntwo<br>three</p>",
    "1. a\n2. b\n   - c\n\n     d\n3. e": (
        '<ol start="1"><li><span>a</span></li><li><span>b</span><ul><li><span>c</span><p>d</p></li></ul></li>'
        "<li><span>e</span></li></ol>"
    ),
    "> q\n> **r**\n\n---": "<blockquote><p>q\n<strong>r</strong></p></blockquote><hr>",
    "```py\na < b\n\n# c\n```\nafter": (
        '<pre tabindex="0" aria-label="Code, py"><code>a &lt; b\n\n# c</code></pre><p>after</p>'
    ),
    "~~~\nopen": '<pre tabindex="0" aria-label="Code"><code>open</code></pre>',
    "|a|b|\n|-|:-:|\n|1|`2`|": (
        '<div class="scroll"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>"
    ),
    "[x](https://e.org/a_(b)) [y](javascript:alert(1)) [z](data:text/html,1)": (
        '<p><a href="https://e.org/a_(b)" target="_blank" rel="noopener noreferrer">x</a>'
        " [y](javascript:alert(1)) [z](data:text/html,1)</p>"
    ),
    "<img src=x onerror=alert(1)><script>alert(1)</script> &amp;": (
        "<p>&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp;</p>"
    ),
    "": "",
}


def test_markdown_is_elements_and_never_markup(open_page: Open) -> None:
    view = open_page()
    script = """async ([text, size]) => {
      const { Markdown } = await import("/page/markdown.js");
      const node = document.createElement("div");
      const markdown = new Markdown(node);
      for (let i = 0; i < text.length; i += size) markdown.append(text.slice(i, i + size));
      return node.innerHTML;
    }"""
    for text, expected in MARKDOWN.items():
        for size in (1, 3, 1000):
            assert view.evaluate(script, [text, size]) == expected, (text, size)
    whole = "\n\n".join(MARKDOWN)
    assert view.evaluate(script, [whole, 7]) == view.evaluate(script, [whole, len(whole)])
    begin = time.perf_counter()
    for awkward in ("**a " * 20_000, "`" * 50_000, "[" * 50_000, "| " * 20_000 + "\n|-|", "* " * 20_000, "> " * 500):
        view.evaluate(script, [awkward, len(awkward)])
    assert time.perf_counter() - begin < 10


def test_the_screen_holds_still_for_a_reader_above(service: FakeService, open_page: Open) -> None:
    view = open_page(height=500)
    service.script = Script(content=["a line of text\n\n"] * 60, pause=0.01)
    say(view, "Many")
    until(view, "document.getElementById('log').scrollTop > 100")
    view.locator("#log").evaluate("log => log.scrollTo(0, 20)")
    frames(view)
    finished(view)
    assert view.locator("#log").evaluate("log => log.scrollTop") == 20
