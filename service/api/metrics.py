"""What Prometheus may know: requests by route, jobs by status, parts by queue, workers' caches, and the database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from service.contract.job import Status
from service.contract.workers import InputCache, Worker
from service.stores.jobs import JobStore
from service.stores.parts import PartStore
from service.stores.workers import WorkerStore


class Counted(Collector):
    """Counts jobs and parts, and what workers say of their caches, when they are asked for."""

    def __init__(self, jobs: JobStore, parts: PartStore, workers: WorkerStore) -> None:
        self._jobs = jobs
        self._parts = parts
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        up, jobs, parts, *caches = self.describe()
        try:
            by_status, by_queue = self._jobs.counts(), self._parts.counts()
            present = self._workers.present()
        except SQLAlchemyError:  # the other metrics are wanted most when the database is away
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        for status in Status:
            jobs.add_metric([status.value], by_status.get(status.value, 0))
        for (queue, state), count in by_queue.items():
            parts.add_metric([queue.value.removeprefix("catmerge."), state], count)
        for living in present:
            if living.input_cache is not None:
                _add(caches, living.worker, living.input_cache)
        yield from (up, jobs, parts, *caches)

    def describe(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Named without asking the database: registering must not depend on it."""
        yield GaugeMetricFamily("catmerge_database_up", "Whether the database answers")
        yield GaugeMetricFamily("catmerge_jobs", "Merges by status", labels=["status"])
        yield GaugeMetricFamily("catmerge_parts", "Parts that a worker may take, or has", labels=["queue", "state"])
        each = ["host", "worker"]
        yield GaugeMetricFamily("catmerge_input_cache_bytes", "Kept of inputs; workers of a host share it", labels=each)
        yield GaugeMetricFamily("catmerge_input_cache_limit_bytes", "What may be kept", labels=each)
        yield CounterMetricFamily("catmerge_input_cache_found_bytes", "Read by a worker and kept already", labels=each)
        yield CounterMetricFamily("catmerge_input_cache_missed_bytes", "Read from the object store", labels=each)


def _add(families: Sequence[GaugeMetricFamily | CounterMetricFamily], worker: Worker, keeps: InputCache) -> None:
    values = (keeps.used_bytes, keeps.limit_bytes, keeps.found_bytes, keeps.missed_bytes)
    for family, value in zip(families, values, strict=True):
        family.add_metric([worker.host, worker.id], value)


class Metrics:
    """One application's metrics, apart from those of any other in the process."""

    def __init__(self, jobs: JobStore, parts: PartStore, workers: WorkerStore) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Counted(jobs, parts, workers))
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
