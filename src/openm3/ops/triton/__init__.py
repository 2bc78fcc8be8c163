"""Triton kernels: one source for every CUDA GPU, each in the `triton.py` of its operator, loaded with its first call.

Triton takes long to import, so nothing here or beside imports it before a call brings CUDA tensors. For tests there is
Triton's interpreter: in a process that starts with `TRITON_INTERPRET=1` the kernels also take CPU tensors, slowly and
only inside `with use("triton"):`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openm3.ops.dispatch import Implementation, forced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""

STORED = (*DTYPES, torch.float8_e4m3fn)
"""What keys and values may be stored as."""


class Machine(NamedTuple):
    """A device as tile choices see it: multiprocessors to fill, and the shared memory that one program may use."""

    processors: int
    shared_bytes: int


INTERPRETER = Machine(processors=1, shared_bytes=227 << 10)
"""Triton's interpreter, which runs one program at a time."""

HOPPER = Machine(processors=132, shared_bytes=227 << 10)
"""An H100 or H200."""

_elsewhere: ContextVar[Machine | None] = ContextVar("openm3_machine", default=None)


def implementation(operator: str, name: str) -> Implementation:
    """The function `name` of `openm3.ops.<operator>.triton`, refused by its `supports_<name>`; loaded when needed."""

    @functools.cache
    def loaded(attribute: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"openm3.ops.{operator}.triton"), attribute)
        return found

    def supports(*args: Any) -> str | None:
        reason = refused_device(next(_tensors(args))) or missing()
        return reason or loaded(f"supports_{name}")(*args)

    def run(*args: Any) -> Any:
        # Launches go to the current device, whatever their arguments' is.
        with torch.cuda.device_of(next(_tensors(args))):
            return loaded(name)(*args)

    return Implementation("triton", supports, run)


@functools.cache
def missing() -> str | None:
    """Why no Triton kernel can run, None if they can."""
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed (pip install triton)"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refused_device(x: Tensor) -> str | None:
    """Why a tensor is not where kernels run, None if it is."""
    if x.is_cuda or (x.is_cpu and interpreting() and forced() == "triton"):
        return None
    if x.is_meta and _elsewhere.get() is not None:
        return None
    return f"needs CUDA tensors, not {x.device.type}"


def refusal(*tensors: Tensor, stored: Sequence[Tensor] = ()) -> str | None:
    """Why kernels cannot take these tensors: `supports` of an implementation begins with it.

    Keys and values of a pool are given as `stored`, and may have eight bits.
    """
    for x, dtypes in (*((x, DTYPES) for x in tensors), *((x, STORED) for x in stored)):
        if reason := refused_device(x):
            return reason
        if x.dtype not in dtypes:
            *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"takes {', '.join(names)} and {last}, not {str(x.dtype).removeprefix('torch.')}"
        if x.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
    return None


def machine(device: torch.device) -> Machine:
    """What tile choices have to know of a device."""
    if device.type == "cuda":
        return _machine(device)
    return _elsewhere.get() or INTERPRETER


@contextmanager
def elsewhere(machine: Machine) -> Iterator[None]:
    """Takes meta tensors for those of a GPU that is not here: how kernels are compiled without one."""
    token = _elsewhere.set(machine)
    try:
        yield
    finally:
        _elsewhere.reset(token)


@functools.cache
def _machine(device: torch.device) -> Machine:
    found = torch.cuda.get_device_properties(device)
    shared_bytes: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Machine(found.multi_processor_count, shared_bytes)


def padded(size: int, least: int = 1) -> int:
    """The smallest power of two that holds `size` and `least`: tiles are powers of two."""
    return 1 << (max(size, least, 1) - 1).bit_length()


def described() -> str:
    """One line for a report: the version, or why there is none."""
    return missing() or importlib.metadata.version("triton")


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from _tensors(x)
