"""What Prometheus may know: requests by route, jobs by status, parts by queue, and whether the database answers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from service.contract.job import Status
from service.stores.jobs import JobStore
from service.stores.parts import PartStore


class Counted(Collector):
    """Counts jobs and parts when they are asked for."""

    def __init__(self, jobs: JobStore, parts: PartStore) -> None:
        self._jobs = jobs
        self._parts = parts

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up, jobs, parts = self.describe()
        try:
            by_status, by_queue = self._jobs.counts(), self._parts.counts()
        except SQLAlchemyError:  # the other metrics are wanted most when the database is away
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        for status in Status:
            jobs.add_metric([status.value], by_status.get(status.value, 0))
        for (queue, state), count in by_queue.items():
            parts.add_metric([queue.value.removeprefix("catmerge."), state], count)
        yield from (up, jobs, parts)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Named without asking the database: registering must not depend on it."""
        yield GaugeMetricFamily("catmerge_database_up", "Whether the database answers")
        yield GaugeMetricFamily("catmerge_jobs", "Merges by status", labels=["status"])
        yield GaugeMetricFamily("catmerge_parts", "Parts that a worker may take, or has", labels=["queue", "state"])


class Metrics:
    """One application's metrics, apart from those of any other in the process."""

    def __init__(self, jobs: JobStore, parts: PartStore) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Counted(jobs, parts))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._requests = Counter(
            "catmerge_http_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "catmerge_http_request_seconds",
            "From a request's first line to its answer's last byte",
            ["method", "route"],
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note a request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
