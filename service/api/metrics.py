"""What Prometheus may know: requests by route, jobs by status, and whether the database answers."""

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


class JobsByStatus(Collector):
    """Counts the jobs when they are asked for."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("catmerge_database_up", "Whether the database answers")
        try:
            counts = self._jobs.counts()
        except SQLAlchemyError:  # the other metrics are wanted most when the database is away
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        jobs = GaugeMetricFamily("catmerge_jobs", "Merges by status", labels=["status"])
        for status in Status:
            jobs.add_metric([status.value], counts.get(status.value, 0))
        yield jobs

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Named without asking the database: registering must not depend on it."""
        yield GaugeMetricFamily("catmerge_database_up", "Whether the database answers")
        yield GaugeMetricFamily("catmerge_jobs", "Merges by status", labels=["status"])


class Metrics:
    """One application's metrics, apart from those of any other in the process."""

    def __init__(self, jobs: JobStore) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(JobsByStatus(jobs))
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
