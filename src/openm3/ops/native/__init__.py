"""The native operators: compiled with the package, one module for each instruction-set level, the best chosen here.

`OPENM3_LEVEL` (portable, avx2, avx512, avx512_vnni or amx) chooses another, or `none` for no native operators at all.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm3.ops.native.recording import Noted, current

LEVELS = ("amx", "avx512_vnni", "avx512", "avx2", "portable")
"""Every instruction-set level, best first. `portable` is what the compiler makes of any processor, Arm's included."""


DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels take."""

HUGE = 2 << 20
"""Bytes of a huge page."""


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that are compiled and that this processor runs, best first; none without a compiler at install."""
    portable = _module("portable")
    if portable is None:
        return ()
    return tuple(level for level in portable.levels() if _module(level) is not None)


@functools.cache
def module(level: str | None = None) -> ModuleType | None:
    """The module of a level (the best, or the one OPENM3_LEVEL names), None if there is none."""
    if level is None:
        level = os.environ.get("OPENM3_LEVEL") or next(iter(levels()), None)
    return _module(level) if level in levels() else None


@functools.cache
def missing() -> str | None:
    """Why the native operators cannot run, None if they can."""
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return f"PyTorch {torch.__version__} cannot lend tensors to native code: it has no __dlpack_c_exchange_api__"
    if module() is not None:
        return None
    asked = os.environ.get("OPENM3_LEVEL")
    if asked == "none":
        return "switched off by OPENM3_LEVEL=none"
    if not levels():
        return "not compiled: openm3 was installed without a C++ compiler"
    return f"OPENM3_LEVEL={asked} is not one of {', '.join(levels())}"


def loaded() -> Any:
    """The module, where `missing` has said that it is there; its calls are noted where somebody records them."""
    found = module()
    assert found is not None, missing()
    recording = current.get()
    return found if recording is None else Noted(found, recording)


def refusal(*tensors: Tensor) -> str | None:
    """Why native code cannot take these tensors, `missing` last: `supports` of an implementation begins with it."""
    for x in tensors:
        if not x.is_cpu:
            return f"needs CPU tensors, not {x.device.type}"
        if x.dtype not in DTYPES:
            return f"takes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
        if x.requires_grad and torch.is_grad_enabled():
            return "has no gradients"
    return missing()


def dense(x: Tensor) -> Tensor:
    """The tensor, dense in its last axis."""
    return x if x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def table(page_RP: Tensor) -> Tensor:
    """A page table as kernels read it."""
    return page_RP.to(torch.int32).contiguous()


def on_huge_pages(x: Tensor) -> Tensor:
    """Ask for huge pages under a dense tensor that nothing was written to yet: reads all over it translate less."""
    if missing() is None and x.device.type == "cpu":
        loaded().prefer_huge_pages(x)
    return x


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take memory only where they are written to, in huge pages, beginning with one.

    `torch.zeros` writes them all at once, in small pages.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    align = HUGE if num_bytes >= HUGE else 64
    room = np.zeros(num_bytes + align, dtype=np.uint8)
    first = -room.ctypes.data % align
    return on_huge_pages(torch.from_numpy(room[first : first + num_bytes]).view(dtype).view(list(shape)))


def described() -> str:
    """One line for a report: the level in use and those there are, or why there is none."""
    reason = missing()
    if reason is not None:
        return reason
    level = loaded().__name__.rpartition("_cpu_")[2]
    return f"{level}, of {', '.join(levels())} (OPENM3_LEVEL chooses another)"


def threads() -> int:
    """How many threads a kernel may use: as many as PyTorch."""
    return torch.get_num_threads()


def release_threads() -> None:
    """End the threads that helped this one compute; the next computation here starts others.

    A thread that has computed and will not soon again should say so where another one computes: while OpenMP keeps more
    threads than there are processors, all of them fall asleep between loops, which takes half of the speed of small
    steps.
    """
    if missing() is None:
        loaded().release_threads()


@functools.cache
def _module(level: str) -> ModuleType | None:
    name = f"{__name__}._cpu_{level}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
