"""What the operators' tests share: running one implementation, or saying why it cannot run."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

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
