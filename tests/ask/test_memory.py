"""The memory estimate: equal to what a session really takes, and an error that says how much is missing."""

from pathlib import Path

import pytest

from openm3.ask.memory import check_memory, forecast
from openm3.errors import PromptError
from openm3.model import memory
from openm3.model.model import Model


def test_the_cache_is_counted(model: Model) -> None:
    pools = model.session(1280).pools
    cache = sum(part.nbytes for pool in pools for part in pool.tensors())
    assert memory.context_bytes(model.config, 1280, 4) == cache + cache // model.config.num_layers


def test_free_memory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:    2048 kB\nBuffers:  3 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.free_bytes() == 2048 * 1024
    meminfo.write_text("nothing known\n")
    assert memory.free_bytes() is None


def test_too_little_memory_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm3.ask.memory.free_bytes", lambda: 3 << 29)
    check_memory(model.config, 1000, 4)
    with pytest.raises(
        PromptError, match=r"^a context of 1,000,000 tokens needs \d+\.\d GiB of memory, but only 1.5 GiB"
    ):
        check_memory(model.config, 1_000_000, 4)


def test_unknown_memory_is_no_reason_to_refuse(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "missing")
    check_memory(model.config, 1 << 40, 4)


def test_large_contexts_are_told_of(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm3.ask.memory.free_bytes", lambda: 3 << 29)
    assert forecast(model.config, 1000, 4) is None
    monkeypatch.setattr("openm3.ask.memory.context_bytes", lambda *_: 5 << 30)
    assert forecast(model.config, 1_000_000, 4) == "1,000,000 tokens need 5.0 GiB of memory, 1.5 GiB is free"
