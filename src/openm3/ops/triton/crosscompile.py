"""What a GPU's compiler makes of the kernels, without that GPU: registers, spills, shared memory, tensor-core products.

Calls are made with meta tensors, which have shapes and no values, so a call that gets through has also shown that
nothing in it waits for the device. PTX becomes machine code in the assembler that Triton brings along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from openm3.ops.triton import HOPPER, Machine, elsewhere

HOPPER_TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch asked for it, and what it takes of a multiprocessor.

    `stack_bytes` a thread hold what did not fit in registers. `products` counts tensor-core instructions by name, each
    where it stands in the code, not how often it runs; `copies` the asynchronous copies into shared memory.
    """

    name: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    products: dict[str, int]
    copies: int

    @property
    def programs(self) -> int:
        """How many programs the launch starts."""
        count = 1
        for size in self.grid:
            count *= size
        return count

    @property
    def at_once(self) -> int:
        """Programs that registers and shared memory let a Hopper multiprocessor run at once."""
        threads = 32 * self.num_warps
        by_registers = (64 << 10) // (-(-self.registers // 8) * 8 * threads)
        by_shared = (228 << 10) // (self.shared_bytes + 1024)
        return max(0, min(by_registers, by_shared, 2048 // threads, 32))


@contextmanager
def compiling(machine: Machine = HOPPER, target: GPUTarget = HOPPER_TARGET) -> Iterator[list[Compiled]]:
    """Compiles what calls with meta tensors launch, and collects it: each kernel once for each way it is launched.

    Raises RuntimeError where Triton interprets its kernels, in a process that began with `TRITON_INTERPRET=1`.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels that are interpreted cannot be compiled: start without TRITON_INTERPRET=1")
    kernels: list[Compiled] = []
    seen = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        programs = tuple(grid(bound) if callable(grid) else grid)
        if (kernel.hash, programs) not in seen:
            seen.add((kernel.hash, programs))
            kernels.append(_measured(kernel, programs))
        return kernel

    absent = mock.patch.object(driver, "_active", _Absent(target))
    with absent, elsewhere(machine), mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def _measured(kernel: Any, grid: tuple[int, ...]) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    products = {name: len(re.findall(rf"\b{name}\.", ptx)) for name in ("wgmma.mma_async.sync", "mma.sync")}
    return Compiled(
        name=metadata.name,
        grid=grid,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=metadata.shared,
        products={name.split(".")[0]: count for name, count in products.items() if count},
        copies=len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk)\b", ptx)),
    )


class _Absent:
    """Stands for the driver of a GPU that is not here: says which one it is, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Kernels are kept by device: these must not be taken for those of a GPU that is here.
        return -1

    def get_current_stream(self, device: int) -> int:
        return device
