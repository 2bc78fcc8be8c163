"""Which implementation of an operator runs a call: the first that supports it, and the reason why each other does not.

An operator lists its implementations, fastest first. Each has `supports(call) -> None | reason`, which looks at device,
dtype and static shape only, and `run(call)`. An implementation that fails while running is an error, never a silent
detour. `with use("reference"):` forces one implementation by name in the current context.
"""

from __future__ import annotations

import functools
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from openm3.errors import UnsupportedError

_forced: ContextVar[str | None] = ContextVar("openm3_implementation", default=None)

NAMES = ("reference", "blocked", "native", "triton", "compiled")
"""Every implementation name that `use` accepts."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator: `supports` and `run` take the operator's arguments.

    An `opt_in` implementation runs only inside `with use(name):`.
    """

    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]
    opt_in: bool = False


@dataclass(frozen=True)
class Operator:
    """A named contract and its implementations, fastest first; the reference is the last that is not opt-in."""

    name: str
    implementations: tuple[Implementation, ...]

    def __call__(self, *args: Any) -> Any:
        run = self.choose(*args).run
        found = _watcher.get()
        return run(*args) if found is None else found.watch(self.name, run, args)

    def choose(self, *args: Any) -> Implementation:
        """The implementation that would run this call. Raises UnsupportedError with every reason."""
        reasons = []
        for implementation in self._candidates[_forced.get()]:
            reason = implementation.supports(*args)
            if reason is None:
                return implementation
            reasons.append(f"{implementation.name}: {reason}")
        raise UnsupportedError(f"no implementation of {self.name} supports this call ({'; '.join(reasons)})")

    @functools.cached_property
    def _candidates(self) -> dict[str | None, tuple[Implementation, ...]]:
        """The implementations to ask, in order, by the name that is forced."""
        usual = tuple(i for i in self.implementations if not i.opt_in)
        forced = {name: tuple(i for i in self.implementations if i.name == name) for name in NAMES}
        return {None: usual} | {name: found or usual for name, found in forced.items()}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force the implementation `name` wherever an operator has it; other operators keep their own choice.

    Raises ValueError for a name that no operator has.
    """
    if name not in NAMES:
        raise ValueError(f"unknown implementation {name!r}; choose one of {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each operator inside the block, by its name; in one that others call, without theirs.

    GPUs are waited for before and after each operator, which slows them down.
    """
    clock = _Clock()
    with watched(clock):
        yield clock.seconds


class Watcher(Protocol):
    """Makes the calls of operators in place of `Operator`."""

    def watch(self, name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> Any: ...


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Have somebody else make the calls of operators in the current context."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def watcher() -> Watcher | None:
    """Who makes the calls of operators in the current context, None if nobody in particular."""
    return _watcher.get()


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0

    def watch(self, name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        outer, self._within = self._within, 0.0
        begin = self._now()
        try:
            return run(*args)
        finally:
            spent = self._now() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._within
            self._within = outer + spent

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return perf_counter()


_watcher: ContextVar[Watcher | None] = ContextVar("openm3_watcher", default=None)


def forced() -> str | None:
    """The name that `use` forces in the current context, None outside of it."""
    return _forced.get()


def always(*_args: Any) -> None:
    """`supports` of an implementation that takes every valid call."""


def compiled(function: Callable[..., Any]) -> Implementation:
    """The function through torch.compile, opt-in: training profits, but the first calls take seconds."""

    def supports(*_args: Any) -> str | None:
        return missing_compiler()

    return Implementation("compiled", supports, compile_late(function), opt_in=True)


def compile_late(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile from its first call on: the compiler takes longer to load than torch."""

    @functools.cache
    def compiled_function() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)

    return lambda *args: compiled_function()(*args)


@functools.cache
def missing_compiler() -> str | None:
    """What torch.compile lacks on this machine, None if nothing."""
    compiler = "clang++" if sys.platform == "darwin" else "g++"
    if shutil.which(compiler) is None:
        return f"torch.compile needs the C++ compiler {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch.compile needs Python's C headers (Python.h)"
    return None
