"""Dispatch: the first that supports a call runs, refusals carry every reason, and `use` stays in its own context."""

import asyncio
import threading
from typing import Any

import pytest
import torch

import openm3
from openm3.errors import UnsupportedError
from openm3.ops import dispatch
from openm3.ops.dispatch import NAMES, Implementation, Operator, always, use
from openm3.ops.doctor import OPERATORS, typical_calls
from openm3.ops.index import SELECT_BLOCKS


def operator(*implementations: tuple[str, str | None, bool]) -> Operator:
    """Implementations that return their own names, each with the reason why it refuses."""

    def make(name: str, reason: str | None, opt_in: bool) -> Implementation:
        return Implementation(name, lambda *_: reason, lambda *_: name, opt_in)

    return Operator("toy", tuple(make(*each) for each in implementations))


def test_the_first_that_supports_the_call_runs() -> None:
    assert operator(("blocked", None, False), ("reference", None, False))(1) == "blocked"
    assert operator(("blocked", "too long", False), ("reference", None, False))(1) == "reference"


def test_a_refusal_lists_every_reason() -> None:
    toy = operator(("blocked", "needs a CPU", False), ("reference", "has no float8", False), ("compiled", None, True))
    with pytest.raises(UnsupportedError) as error:
        toy(1)
    assert str(error.value) == (
        "no implementation of toy supports this call (blocked: needs a CPU; reference: has no float8)"
    )


def test_use_forces_one_and_never_falls_back() -> None:
    toy = operator(("blocked", None, False), ("reference", None, False), ("compiled", "needs a compiler", True))
    with use("reference"):
        assert toy(1) == "reference"
        with use("blocked"):
            assert toy(1) == "blocked"
        assert toy(1) == "reference"
    assert toy(1) == "blocked"
    with use("compiled"), pytest.raises(UnsupportedError, match=r"\(compiled: needs a compiler\)"):
        toy(1)


def test_use_leaves_operators_without_that_implementation_alone() -> None:
    with use("compiled"):
        assert operator(("blocked", None, False), ("reference", None, False))(1) == "blocked"


def test_use_ends_with_an_error_too() -> None:
    toy = operator(("blocked", None, False), ("reference", None, False))
    with pytest.raises(RuntimeError, match="inside"), use("reference"):
        raise RuntimeError("inside")
    assert toy(1) == "blocked"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown implementation 'fast'; choose one of reference, blocked, native, triton, compiled"
    ):
        use("fast").__enter__()
    with pytest.raises(ValueError, match="unknown implementation"), openm3.use("Reference"):
        pass


def test_an_implementation_that_fails_is_an_error() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of registers")

    toy = Operator("toy", (Implementation("blocked", always, fail), Implementation("reference", always, lambda: 1)))
    with pytest.raises(RuntimeError, match="out of registers"):
        toy()


def test_use_stays_in_its_thread() -> None:
    toy = operator(("blocked", None, False), ("reference", None, False))
    seen = []
    with use("reference"):
        thread = threading.Thread(target=lambda: seen.append(toy(1)))
        thread.start()
        thread.join()
    assert seen == ["blocked"]


def test_use_stays_in_its_task() -> None:
    toy = operator(("blocked", None, False), ("reference", None, False))

    async def ask(name: str | None, barrier: asyncio.Barrier) -> str:
        if name is None:
            await barrier.wait()
            return str(toy(1))
        with use(name):
            await barrier.wait()
            return str(toy(1))

    async def ask_all() -> list[str]:
        barrier = asyncio.Barrier(3)
        return await asyncio.gather(*(ask(name, barrier) for name in (None, "reference", "blocked")))

    assert asyncio.run(ask_all()) == ["blocked", "reference", "blocked"]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opt_in_is_never_the_default(op: Operator, dtype: torch.dtype) -> None:
    call = typical_calls(torch.device("cpu"), dtype)[op.name]
    assert not op.choose(*call).opt_in
    with use("reference"):
        assert op.choose(*call).name == "reference"


def test_every_operator_has_one_reference_and_known_names() -> None:
    assert len({op.name for op in OPERATORS}) == len(OPERATORS)
    for op in OPERATORS:
        names = [i.name for i in op.implementations]
        assert len(set(names)) == len(names) and set(names) <= set(NAMES)
        assert next(i for i in reversed(op.implementations) if not i.opt_in).name == "reference"


def test_blocked_refuses_float64_and_other_devices() -> None:
    calls = typical_calls(torch.device("cpu"), torch.float64)
    blocked = next(i for i in SELECT_BLOCKS.implementations if i.name == "blocked")
    assert blocked.supports(*calls["select_blocks"]) == "computes in float32, not float64"
    for op in OPERATORS:
        elsewhere = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in calls[op.name])
        for implementation in op.implementations:
            if implementation.name == "blocked" and op.name != "linear":
                assert implementation.supports(*elsewhere) == "needs CPU tensors, not meta"


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.shutil, "which", lambda _name: None)
    reason = dispatch.missing_compiler.__wrapped__()
    assert reason is not None and reason.startswith("torch.compile needs the C++ compiler")
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: name)
    monkeypatch.setattr(dispatch.sysconfig, "get_path", lambda _name: "nowhere")
    assert dispatch.missing_compiler.__wrapped__() == "torch.compile needs Python's C headers (Python.h)"
