"""The engine's benchmark serves what it says, and counts it right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from openm3 import cli
from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.errors import ConfigError
from openm3.eval.bench_engine import WORKLOADS, Arrival, Load, choose, play
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def test_replies_are_counted_and_bring_more(model: Model) -> None:
    prompt = [i % 300 for i in range(400)]

    def again(reply: object, now: float) -> list[Arrival]:
        return [Arrival(now, prompt, 4)]

    engine = Engine(model, EngineConfig(cache_tokens=4000))
    served = play(engine, "two", [Arrival(0.0, prompt, 5, again), Arrival(0.05, prompt[:130], 3)])
    values = served.values()
    assert (values["requests"], served.written_tokens, served.prompt_tokens) == (3, 12, 930)
    assert served.cached_tokens == 128 + 384 and values["cache_hit_rate"] == pytest.approx(512 / 930)
    assert len(served.between) == 4 + 3 + 2 and min(served.between) > 0
    assert values["first_p50"] <= values["first_p95"] <= values["first_p99"]  # type: ignore[operator]
    assert 0 < served.host_share < 1


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_workloads_are_what_they_say(workload: object) -> None:
    assert workload in WORKLOADS
    chosen = next(w for w in WORKLOADS if w is workload)
    arrivals = list(chosen.arrivals(Load(200, 10.0, 300, random.Random(1))))
    assert len(arrivals) == 200 and all(0 <= i < 300 for arrival in arrivals for i in arrival.prompt)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times) and 15 < times[-1] < 26
    if chosen.name.startswith("shared"):
        length = 8192 if chosen.name == "shared-8k" else 32768
        assert len({tuple(arrival.prompt[:length]) for arrival in arrivals}) == 1


def test_unknown_workloads_are_refused() -> None:
    assert [workload.name for workload in choose(["agents", "chat"])] == ["agents", "chat"]
    with pytest.raises(ConfigError, match="no workload is named 'x'; give one of chat, shared-8k"):
        choose(["x"])


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm3.eval.bench.EngineConfig", lambda **values: EngineConfig(cache_tokens=9000, **values))
    command = [
        "bench",
        "engine",
        "--workload",
        "chat",
        "--requests",
        "2",
        "--rate",
        "50",
        "--model",
        str(GOLDEN / "model"),
    ]
    assert cli.main(command) == 0
    assert "| chat " in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["workloads"]
    assert (run["workload"], run["requests"]) == ("chat", 2)
    with pytest.raises(SystemExit):
        cli.main([*command, "--rate", "0"])
