"""What the server's tests share: m3-tiny, and a way to run an asynchronous test on a service of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from openm3.model.model import Model, load
from openm3.server.service import Service
from tests.server.serving import serving


@pytest.fixture(scope="session")
def model() -> Model:
    return load("m3-tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.server.browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Opens the page at the test's own `url`."""
    from tests.server.browsing import opening

    with opening(browser, url) as opened:
        yield opened


@pytest.fixture
def play(model: Model) -> Callable[..., None]:
    """Runs an asynchronous test with a service."""

    def run(test: Callable[[Service], Coroutine[Any, Any, None]], **options: Any) -> None:
        async def whole() -> None:
            async with serving(model, **options) as service:
                await asyncio.wait_for(test(service), 60)

        asyncio.run(whole())

    return run
