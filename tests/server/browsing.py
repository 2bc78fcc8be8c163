"""A real Chromium for the page's tests, which are skipped where there is none."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
# Patience for machines that do other work as well.
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

Open = Callable[..., Any]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser for the time of a with block."""
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@contextmanager
def opening(browser: Any, url: str) -> Iterator[Open]:
    """Opens the page; afterwards nothing may have gone wrong in it, and nothing been asked of anybody else."""
    contexts, problems, asked = [], [], []

    def opened(width: int = 1280, height: int = 800, allowed: str = "(?!)", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        view = context.new_page()
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))

        def heard(message: Any) -> None:
            if message.type in ("error", "warning") and not re.search(allowed, message.text):
                problems.append(message.text)

        view.on("console", heard)
        view.goto(url)
        expect(view.locator("#model option")).to_have_count(1)
        return view

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert [address for address in asked if not address.startswith((f"{url}/", "blob:", "data:"))] == []


def say(view: Any, text: str) -> None:
    view.fill("#input", text)
    view.press("#input", "Enter")


def finished(view: Any) -> None:
    expect(view.locator("#log")).to_have_attribute("aria-busy", "false")
    expect(view.locator("#send")).to_be_visible()


def frames(view: Any) -> None:
    view.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(view: Any, condition: str) -> None:
    """As Playwright's wait_for_function, which the page's policy forbids: it makes functions of text."""
    for _ in range(500):
        if view.evaluate(condition):
            return
        time.sleep(0.02)
    pytest.fail(f"never: {condition}")
