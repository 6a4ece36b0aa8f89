"""The Celery app: one thin shell per stage around the runner."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import billiard.pool
from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown, worker_ready
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from service.contract.broker import BROKER_SETTINGS
from service.contract.settings import Connections
from service.contract.stages import STAGES, PartMessage, Queue, Stage
from service.contract.workers import Worker
from service.stores.database import Database
from service.stores.parts import PartStore
from service.stores.workers import WorkerStore
from workers import memory
from workers.deaths import Deaths
from workers.presence import Presence
from workers.runner import Runner
from workers.settings import WorkerSettings
from workers.version import ENGINE

logger = logging.getLogger(__name__)

STARTUP_SECONDS = 300.0  # a child imports torch and transformers before it is ready


class WorkerApp(Celery):  # type: ignore[misc]  # celery ships no types
    """A Celery app that knows its runner. The runner is made in the child: the parent never imports torch."""

    @cached_property
    def runner(self) -> Runner:
        from workers import stages  # torch comes in here

        settings, worker = WorkerSettings.from_environment(os.environ), self.worker
        return Runner(
            self.connections,
            stages.RUN,
            self.ring,
            lambda: is_leaving(settings.stop_file),
            worker.device,
            min(settings.calibration_bytes or worker.usable_bytes, worker.usable_bytes),
            worker.queues,
            worker.usable_bytes,
            worker.id,
        )

    @cached_property
    def connections(self) -> Connections:
        return Connections.from_environment(os.environ)

    @cached_property
    def worker(self) -> Worker:
        """What this process says of itself."""
        from workers import machine

        settings = WorkerSettings.from_environment(os.environ)
        device = machine.prepare(settings)
        on_device = machine.device_bytes(device)
        has = memory.host_bytes() if on_device is None else on_device
        usable = memory.usable_bytes(memory.host_bytes(), on_device, settings.processes)
        return Worker(
            id=settings.owner(os.getpid()),
            host=socket.gethostname(),
            pid=os.getpid(),
            device=device,
            memory_bytes=has,
            usable_bytes=settings.memory_bytes or usable,
            processes=settings.processes,
            queues=settings.queues,
            version=version("catmerge"),
            engine=ENGINE,
        )

    @cached_property
    def presence(self) -> Presence:
        store = WorkerStore(Database(self.connections.database_url), lease_seconds=self.connections.lease_seconds)
        return Presence(store, self.worker, every_seconds=self.connections.heartbeat_seconds, keeps=self.runner.keeps)

    def ring(self, messages: Sequence[PartMessage]) -> None:
        """Send what comes next; what the broker does not take is left to the sweeper."""
        for position, message in enumerate(messages):
            row = STAGES[message.stage]
            try:
                self.send_task(row.message, args=[message.job_id, message.part], queue=row.queue.value)
            except (KombuError, RedisError, OSError) as error:
                logger.warning("The broker takes no messages (%s); the sweeper will ring", error)
                self.runner.mark_unsent(messages[position:])
                return


PARENT = os.getppid()


def is_leaving(stop_file: str | None) -> bool:
    """Whether this process was asked to stop, or its parent died."""
    return (stop_file is not None and Path(stop_file).exists()) or os.getppid() != PARENT


def failed_file(stop_file: Path) -> Path:
    """Where a child says that it could not start."""
    return stop_file.with_suffix(".failed")


def make_app(connections: Connections, settings: WorkerSettings) -> WorkerApp:
    """The app that a worker's parent and each of its children run."""
    app = WorkerApp("catmerge", broker=connections.broker_url)
    app.conf.update(BROKER_SETTINGS)
    app.conf.update(
        worker_concurrency=settings.processes,
        worker_pool_start_method="spawn",  # a forked child can't use CUDA
        worker_proc_alive_timeout=STARTUP_SECONDS,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides, not the connection
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    app.conf.task_queues = {queue.value: {"exchange": queue.value, "routing_key": queue.value} for queue in Queue}
    for stage in STAGES:
        _add_shell(app, stage)
    return app


def _add_shell(app: WorkerApp, stage: Stage) -> None:
    @app.task(name=STAGES[stage].message)  # type: ignore[untyped-decorator]
    def shell(job_id: str, part: int) -> None:
        app.runner.run(PartMessage(stage, job_id, part))


app = make_app(Connections.from_environment(os.environ), WorkerSettings.from_environment(os.environ))


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _warm_up(**_: Any) -> None:
    """Import torch and open the stores before the first part arrives, and not while it waits."""
    # A parent that is asked to stop as a task begins may never read that the task ended, and the child would wait half
    # a minute for it to. Nothing hangs on that message here: what was done is in the database.
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 10  # a second
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        logger.info("Ready: %s", app.runner)
        app.presence.enter()
        worker_process_shutdown.connect(_say_goodbye)
    except Exception:  # celery would go on and drop every message: better no worker than one that can't work
        logger.exception("This worker can't start")
        stop_file = os.environ.get("CATMERGE_STOP_FILE")
        if stop_file:
            failed_file(Path(stop_file)).touch()
        os.kill(os.getppid(), signal.SIGTERM)
        raise


def _say_goodbye(**_: Any) -> None:
    app.presence.leave()


@worker_ready.connect  # type: ignore[untyped-decorator]
def _watch_children(sender: Any, **_: Any) -> None:
    """In the parent, once its pool is there."""
    connections, settings = app.connections, WorkerSettings.from_environment(os.environ)
    database = Database(connections.database_url)
    leases = {"lease_seconds": connections.lease_seconds}
    parts = PartStore(database, **leases, part_attempts=connections.part_attempts)
    Deaths(parts, WorkerStore(database, **leases), settings.owner).watch(sender.pool._pool)
