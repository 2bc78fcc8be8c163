"""What the operators' tests share: running one implementation or one native level, or saying why it cannot run."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from openm3.ops import native, triton
from openm3.ops.dispatch import Implementation, use

if not torch.cuda.is_available():
    # Triton decides when it is imported, and torch.compile may be the first to import it.
    os.environ["TRITON_INTERPRET"] = "1"


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


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Forces Triton's kernels; yields the GPU or, without one, the CPU, where Triton's interpreter runs them."""
    if reason := triton.missing():
        pytest.skip(reason)
    if torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
        mend_interpreter(monkeypatch)
    with use("triton"), warnings.catch_warnings():
        # NumPy, in which the interpreter computes, warns of NaN and infinities.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield device


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of Triton 3.6's interpreter.

    It bounds loops with arrays of one element, which NumPy 2.4 does not take for numbers any more, multiplies matrices
    of bfloat16 as if the integers that hold them were the numbers, does the reverse when it makes bfloat16 of integers,
    takes long for matrices of integers, cuts float32 to bfloat16 or eight bits instead of rounding, and takes the NaN
    of eight bits for 480.
    """
    from triton.runtime import interpreter

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(builder: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        if a.dtype.scalar == interpreter.tl.int8:
            product = (a.data.astype("float64") @ b.data.astype("float64")).astype("int32")
            return interpreter.TensorHandle(product + c.data, c.dtype.scalar)
        return create_dot(builder, widened(a), widened(b), c, *rest)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), interpreter.tl.float32)

    def cast(builder: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar.is_int() and dtype.scalar == interpreter.tl.bfloat16:
            x = cast_impl(builder, x, interpreter.tl.float32)
        if (x.dtype.scalar, dtype.scalar) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return cast_impl(builder, x, dtype)
        rounded = torch.from_numpy(x.data).bfloat16().view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(rounded, dtype.scalar)

    def fp_to_fp(builder: Any, x: Any, dtype: Any, rounding: Any) -> Any:
        eight, wide = interpreter.tl.float8e4nv, interpreter.tl.float32
        if (x.dtype.scalar, dtype.scalar) == (wide, eight):
            rounded = torch.from_numpy(x.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            return interpreter.TensorHandle(rounded, eight)
        if x.dtype.scalar == eight:
            x = interpreter.TensorHandle(torch.from_numpy(x.data).view(torch.float8_e4m3fn).float().numpy(), wide)
            return x if dtype.scalar == wide else cast(builder, x, dtype)
        return create_fp_to_fp(builder, x, dtype, rounding)

    cast_impl = interpreter.InterpreterBuilder.cast_impl
    create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp
    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", fp_to_fp)
