"""The two servers of the end-to-end tests: the bundled model as `openm3 serve` has it, and a scripted one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openm3.model.model import Model, load
from tests.e2e.programs import openm3_serve
from tests.e2e.questions import Question, asked
from tests.e2e.scripted import Stage, serving


@pytest.fixture(scope="session")
def model() -> Model:
    """m3-tiny in the test's own process: what the server says is compared with it."""
    return load("m3-tiny")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `openm3 serve` is."""
    with openm3_serve(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="session")
def theatre(model: Model) -> Iterator[tuple[Stage, str]]:
    """A stage and where it is served."""
    stage = Stage(model)
    with serving(stage) as address:
        yield stage, address


@pytest.fixture
def stage(theatre: tuple[Stage, str]) -> Iterator[Stage]:
    """The stage, on which nothing was asked yet; no request of the test may fail but where it says so."""
    stage, _ = theatre
    stage.reset()
    yield stage
    assert stage.refused == []


@pytest.fixture
def scripted(theatre: tuple[Stage, str]) -> str:
    """Where the stage is served."""
    return theatre[1]


@pytest.fixture(scope="session")
def questions(model: Model) -> list[Question]:
    """What m3-tiny can be asked."""
    return asked(model)


@pytest.fixture
def question(questions: list[Question]) -> Question:
    """One of them."""
    return questions[0]
