"""What the service tells Prometheus. Each app counts for itself, in a registry of its own."""

import time
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Figures(Protocol):
    """What is looked up at the time of asking."""

    def sweeps_by_state(self) -> dict[str, int]: ...
    def gangs_held(self) -> int: ...
    def listeners(self) -> int: ...
    def pending_notices(self) -> int: ...
    def is_dispatcher_in_trouble(self) -> bool: ...
    def last_tick_at(self) -> float | None: ...


class Metrics:
    """Counts requests; `text` adds the figures of the moment."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fairway_http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "fairway_http_request_seconds",
            "Time to the start of the answer.",
            ["method", "route"],
            buckets=BUCKETS,
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note a request that has been answered; `route` is its template, never its path."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self, figures: Figures) -> str:
        """Everything as Prometheus reads it."""
        asked = CollectorRegistry()
        asked.register(_Asked(figures))
        return (generate_latest(self._registry) + generate_latest(asked)).decode()


class _Asked(Collector):
    """The figures of one moment."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        figures = self._figures
        sweeps = GaugeMetricFamily("fairway_sweeps", "Sweeps by state.", labels=["state"])
        for state, num in figures.sweeps_by_state().items():
            sweeps.add_metric([state], num)
        yield sweeps
        yield _gauge("fairway_gangs_held", "Gangs that sweeps hold.", figures.gangs_held())
        yield _gauge("fairway_sse_clients", "Event streams that are open.", figures.listeners())
        yield _gauge(
            "fairway_notices_pending", "Webhook calls yet to be made.", figures.pending_notices()
        )
        yield _gauge(
            "fairway_dispatcher_trouble",
            "1 while the dispatcher cannot reach what it needs.",
            figures.is_dispatcher_in_trouble(),
        )
        ticked_at = figures.last_tick_at()
        if ticked_at is not None:
            age_s = max(0.0, time.time() - ticked_at)
            yield _gauge("fairway_dispatcher_tick_age_seconds", "Since its last look.", age_s)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, value=float(value))
