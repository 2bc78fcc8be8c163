"""What a CUDA graph is to a GPU, for native operators: calls made once and noted, to be made again with new numbers.

Between two native calls of a small model PyTorch and Python take longer than the calls. A recording is their bare list:
no shapes are looked at, nothing is allocated, no module is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openm3.errors import UnsupportedError
from openm3.ops.dispatch import watched, watcher

aten = torch.ops.aten


def _rows(weight: Tensor, ids: Tensor, *_options: object, out: Tensor) -> None:
    torch.index_select(weight, 0, ids, out=out)


def _copy(x: Tensor, *_options: object, out: Tensor, **_more: object) -> None:
    out.view(-1).copy_(x.reshape(-1))


AGAIN: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.embedding.default: _rows,
    aten.to.dtype: _copy,
    aten._to_copy.default: _copy,
    aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    aten.reshape.default: _copy,
    aten.flatten.using_ints: _copy,
}
"""PyTorch's operators that may stand between native ones, each as a function that takes where its result goes; so may
`linear` without a bias."""

ROOM = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


class Recording(TorchDispatchMode):
    """A context: what is computed in it can be computed again by `replay`, in the same tensors.

    Numbers that decide what is called next, or that Python has read, stay what they were. Raises UnsupportedError at an
    operator of PyTorch that it does not know to repeat.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[], Any]] = []
        self._names: list[str | None] = []
        self._name: str | None = None
        self._contexts = ExitStack()

    def replay(self) -> None:
        """Compute it again, out of what the tensors hold now. Whoever watches operators sees their calls."""
        found = watcher()
        if found is None:
            for call in self._calls:
                call()
        else:
            for name, call in zip(self._names, self._calls, strict=True):
                call() if name is None else found.watch(name, call, ())

    def watch(self, name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """An operator runs: what it calls bears its name."""
        before, self._name = self._name, name
        try:
            return run(*args)
        finally:
            self._name = before

    def note(self, call: Callable[[], Any]) -> None:
        """Have a call made in every replay."""
        self._names.append(self._name)
        self._calls.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in ROOM or (_is_view(out, args) and not func._schema.is_mutable):
            return out
        if func in AGAIN:
            self.note(partial(AGAIN[func], *args, **kwargs, out=out))
        elif func is aten.linear.default and args[0].ndim == 2 and len(args) == 2:
            self.note(partial(torch.mm, args[0], args[1].t(), out=out))
        else:
            raise UnsupportedError(f"a recording cannot repeat {func}")
        return out

    def __enter__(self) -> Self:
        self._contexts.enter_context(watched(self))
        self._contexts.enter_context(_recorded_by(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._contexts.close()


def _is_view(out: Any, args: Any) -> bool:
    """Whether all that an operator returned lies in what it was given, so that it changes with that."""
    places = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    found = out if isinstance(out, list | tuple) else [out]
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in places for x in found)


current: ContextVar[Recording | None] = ContextVar("openm3_recording", default=None)
"""Who records native calls in the current context."""


@contextmanager
def _recorded_by(recording: Recording) -> Iterator[None]:
    token = current.set(recording)
    try:
        yield
    finally:
        current.reset(token)


class Noted:
    """A native module whose calls are noted by a recording."""

    def __init__(self, module: ModuleType, recording: Recording) -> None:
        self._module = module
        self._recording = recording

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def noted(*args: Any) -> Any:
            result = value(*args)
            self._recording.note(partial(value, *args))
            return result

        return noted
