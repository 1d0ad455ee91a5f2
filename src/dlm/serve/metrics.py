"""Metrics for Prometheus: counters and gauges of the engine, taken when asked, and histograms of times."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dlm.serve.engine.scheduler import Engine

BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PATHS = ("/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/dlm/generate", "/v1/dlm/export", "/healthz", "/metrics")
COUNTERS = {
    "calls": "Forward passes, each for all rows of a run.",
    "rows": "Rows in these forward passes.",
    "tokens": "Tokens of finished texts.",
    "finished": "Texts that were finished.",
    "failed": "Texts that failed.",
    "cancelled": "Texts whose client had left.",
}


class Metrics(Collector):
    """Of one engine. requests: answers by path and status."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self.requests = Counter("dlm_requests", "Answers.", ["path", "status"], registry=self.registry)
        self.first = Histogram(
            "dlm_first_token_seconds", "Until the first token is settled.", buckets=BUCKET_SECONDS, registry=self.registry
        )
        self.whole = Histogram("dlm_text_seconds", "Until a text is finished.", buckets=BUCKET_SECONDS, registry=self.registry)
        self.registry.register(self)
        engine.observe = self._observe

    def collect(self) -> Iterator[Metric]:
        counts = self.engine.counts
        for name, about in COUNTERS.items():
            yield CounterMetricFamily(f"dlm_engine_{name}", about, value=getattr(counts, name))
        yield GaugeMetricFamily("dlm_engine_running", "Rows in a batch.", value=self.engine.running)
        yield GaugeMetricFamily("dlm_engine_waiting", "Rows that wait for a place.", value=self.engine.waiting)
        per = counts.rows / counts.tokens if counts.tokens else 0.0
        yield GaugeMetricFamily("dlm_engine_forwards_per_token", "Forward passes of a row for each token.", value=per)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, path: str, status: int) -> None:
        """Count an answer; all unknown paths are counted as one."""
        self.requests.labels(path if path in PATHS else "other", str(status)).inc()

    def _observe(self, first: float | None, whole: float) -> None:
        self.whole.observe(whole)
        if first is not None:
            self.first.observe(first)
