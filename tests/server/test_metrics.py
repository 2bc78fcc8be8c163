"""What is counted, under which names; and the dashboard that shows it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from openm3.engine.request import Completion, Delta, SamplingParams, Timings, Usage
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.calls import Call
from openm3.server.metrics import COUNTERS, GAUGES, Metrics
from tests.server.serving import serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def samples(text: str) -> dict[str, float]:
    """Values by name and labels."""
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_replies_are_counted_as_they_come() -> None:
    metrics = Metrics()
    metrics.started(100)
    with metrics.written() as written:
        written.add(Delta([1, 2], "ab"))
        assert samples(metrics.render(None).decode())["openm3_generation_tokens_total"] == 2
        timings = Timings(queue=0.02, prefill=0.02, total=7.0, between=(0.004, 0.004, 20_000.0))
        written.add(Delta([3], "c", "length", Completion([1, 2, 3], "abc", "length", Usage(100, 0, 4), timings)))
        assert written.num_tokens == 4
    with metrics.written() as written:
        written.add(Delta([1], "a"))
    found = samples(metrics.render(None).decode())
    expected = {
        "openm3_prompt_tokens_total": 100,
        "openm3_generation_tokens_total": 5,
        "openm3_request_success_total{finished_reason=length}": 1,
        "openm3_request_success_total{finished_reason=abort}": 1,
        "openm3_time_to_first_token_seconds_count": 1,
        "openm3_time_to_first_token_seconds_sum": 0.04,
        "openm3_time_to_first_token_seconds_bucket{le=0.025}": 0,
        "openm3_time_to_first_token_seconds_bucket{le=0.05}": 1,
        "openm3_inter_token_latency_seconds_count": 3,
        "openm3_inter_token_latency_seconds_bucket{le=0.005}": 2,
        "openm3_inter_token_latency_seconds_bucket{le=1800.0}": 2,
        "openm3_inter_token_latency_seconds_bucket{le=+Inf}": 3,
        "openm3_e2e_request_latency_seconds_sum": 7.0,
    }
    assert {name: found[name] for name in expected} == expected


def test_the_engines_numbers_are_kept_until_there_are_newer_ones() -> None:
    metrics = Metrics()
    stats = {"requests_running": 2, "pages": 10, "pages_held": 4, "steps": 7, "overlap_steps": 0.9, "time_index": 0.25}
    metrics.render(stats)
    found = samples(metrics.render(None).decode())
    assert found["openm3_num_requests_running"] == 2 and found["openm3_steps_total"] == 7
    assert found["openm3_kv_cache_usage_perc"] == 0.4
    assert found["openm3_block_overlap_share{with=steps}"] == 0.9
    assert found["openm3_step_time_share{part=index}"] == 0.25


def test_every_name_is_there_after_a_reply_and_the_dashboard_shows_no_other(model: Model) -> None:
    async def scrape() -> str:
        async with serving(model) as service:
            call = Call(prompt="def main():\n" * 100, params=SamplingParams(max_tokens=80, ignore_eos=True))
            async for _ in service.stream(call):
                pass
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                answer = await client.get("/metrics")
                assert (await client.head("/metrics")).status_code == 200
            assert answer.headers["content-type"].startswith("text/plain; version=")
            return answer.text

    text = asyncio.run(scrape())
    found = {name.partition("{")[0] for name in samples(text)}
    wanted = {f"openm3_{name}_total" for name, _ in COUNTERS.values()}
    wanted |= {f"openm3_{name}" for name, _ in GAUGES.values()}
    wanted |= {"openm3_block_overlap_share", "openm3_step_time_share", "openm3_kv_cache_usage_perc"}
    assert wanted - found <= {"openm3_blocks_rescored_share"}  # Only where there is a native scan.
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"openm3_\w+", query)}
    assert shown - found <= {"openm3_blocks_rescored_share"} and len(shown) > 12


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 6
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        assert panel["title"] and panel["datasource"]["uid"] == "${source}"
        assert all(query.count("(") == query.count(")") for query in (target["expr"] for target in panel["targets"]))
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["source"]
