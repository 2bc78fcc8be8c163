"""What a server counts, for Prometheus: names in the style of vLLM's, and how sparse the attention is."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from openm3.engine.request import Delta

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Upper ends of the histograms' buckets."""

GAUGES = {
    "requests_running": ("num_requests_running", "Requests that have a part in steps."),
    "requests_waiting": ("num_requests_waiting", "Requests that wait to be taken in."),
    "blocks_selected": ("blocks_selected", "Blocks that a token attends to, of one layer and group, on average."),
    "blocks_rescored": ("blocks_rescored_share", "Part of the scanned blocks that had to be scored exactly."),
}
COUNTERS = {
    "steps": ("steps", "Steps of the engine."),
    "tokens_computed": ("computed_tokens", "Tokens that steps computed, of prompts and replies."),
    "tokens_cached": ("prefix_cache_hits", "Tokens of prompts that were found in the cache."),
    "tokens_drafted": ("spec_decode_num_draft_tokens", "Tokens proposed ahead."),
    "tokens_accepted": ("spec_decode_num_accepted_tokens", "Proposed tokens that were the model's own."),
    "preemptions": ("num_preemptions", "Requests sent back to wait for want of pages."),
    "pages_evicted": ("evicted_pages", "Cached pages given up for new ones."),
}
"""The engine's own numbers, and what they are called here."""


class Histogram:
    """Values by bucket, all of a long reply's at once."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        """Count some values."""
        for value in values:
            self._counts[bisect_left(SECONDS, value)] += 1
            self._sum += value

    def family(self) -> HistogramMetricFamily:
        """As Prometheus has it."""
        ends = [*map(str, SECONDS), "+Inf"]
        buckets = list(zip(ends, map(float, accumulate(self._counts)), strict=True))
        return HistogramMetricFamily(self._name, self._what, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """One server's numbers, in a registry of their own. Only for the loop's thread."""

    def __init__(self) -> None:
        self._prompt_tokens = self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self._first = Histogram("openm3_time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._between = Histogram("openm3_inter_token_latency_seconds", "Between two tokens of a reply.")
        self._whole = Histogram("openm3_e2e_request_latency_seconds", "From a request's arrival to its end.")
        self._stats: Mapping[str, float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def started(self, num_prompt: int) -> None:
        """Count a request that was let in."""
        self._prompt_tokens += num_prompt

    @contextmanager
    def written(self) -> Iterator[Written]:
        """Around one reply: counts its tokens as they come, and why it ended; "abort" if nobody waited for that."""
        written = Written(self)
        try:
            yield written
        finally:
            self._finished[written.reason] += 1

    def add_tokens(self, count: int) -> None:
        """Count tokens of replies."""
        self._generation_tokens += count

    def time(self, first: float, between: Iterable[float], whole: float) -> None:
        """Count a whole reply's times, in seconds."""
        self._first.add([first])
        self._between.add(between)
        self._whole.add([whole])

    def render(self, stats: Mapping[str, float] | None) -> bytes:
        """All of it in Prometheus' text format. Without `stats` of the engine, its last ones are repeated."""
        self._stats = self._stats if stats is None else stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """What the registry asks for."""
        yield CounterMetricFamily("openm3_prompt_tokens", "Tokens of prompts let in.", value=self._prompt_tokens)
        yield CounterMetricFamily("openm3_generation_tokens", "Tokens of replies.", value=self._generation_tokens)
        finished = CounterMetricFamily(
            "openm3_request_success", "Replies by why they ended.", labels=["finished_reason"]
        )
        for reason, count in sorted(self._finished.items()):
            finished.add_metric([reason], count)
        yield finished
        yield from (histogram.family() for histogram in (self._first, self._between, self._whole))
        for key, (name, what) in COUNTERS.items():
            yield CounterMetricFamily(f"openm3_{name}", what, value=self._stats.get(key, 0))
        for key, (name, what) in GAUGES.items():
            if key in self._stats:
                yield GaugeMetricFamily(f"openm3_{name}", what, value=self._stats[key])
        yield from self._shares()

    def _shares(self) -> Iterator[GaugeMetricFamily]:
        stats = self._stats
        held = stats.get("pages_held", 0) / max(stats.get("pages", 0), 1)
        yield GaugeMetricFamily(
            "openm3_kv_cache_usage_perc", "Part of the pages that requests hold, 0 to 1.", value=held
        )
        families = (
            ("block_overlap_share", "with", "overlap_", "Part of a token's blocks that another token selected too."),
            ("step_time_share", "part", "time_", "Part of a step's time."),
        )
        for name, label, prefix, what in families:
            family = GaugeMetricFamily(f"openm3_{name}", what, labels=[label])
            for key in sorted(stats):
                if key.startswith(prefix):
                    family.add_metric([key.removeprefix(prefix)], stats[key])
            yield family


class Written:
    """How far one reply is."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.reason = "abort"
        self.num_tokens = 0

    def add(self, delta: Delta) -> int:
        """Count a delta's tokens, and say how many; of the last one also the end token, and the reply's times."""
        whole = delta.completion
        count = len(delta.ids) if whole is None else whole.usage.completion_tokens - self.num_tokens
        self._metrics.add_tokens(count)
        self.num_tokens += count
        if whole is not None:
            self.reason = whole.finish_reason
            if self.num_tokens:
                self._metrics.time(whole.timings.first_token, whole.timings.between, whole.timings.total)
        return count
