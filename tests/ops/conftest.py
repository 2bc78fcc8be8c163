"""What the operators' tests share: running one implementation or one native level, or saying why it cannot run."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from openm3.ops import native
from openm3.ops.dispatch import Implementation


@pytest.fixture
def run() -> Callable[..., Any]:
    """Call an implementation with an operator's positional arguments; skip the test where it does not support them."""

    def call(implementation: Implementation, *args: Any) -> Any:
        if reason := implementation.supports(*args):
            pytest.skip(f"{implementation.name}: {reason}")
        if implementation.name != "compiled":
            return implementation.run(*args)
        with warnings.catch_warnings():
            # Tracing sets off warnings, which torch.compile hides itself unless they are errors.
            warnings.simplefilter("ignore")
            return implementation.run(*args)

    return call


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has native code run at one instruction-set level; skips those that this machine lacks."""
    if native.missing() or request.param not in native.levels():
        pytest.skip(native.missing() or f"{request.param} is not compiled, or not what this processor runs")
    monkeypatch.setattr(native, "loaded", lambda: native.module(request.param))
    return str(request.param)
