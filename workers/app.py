"""The Celery app: one thin shell per stage around the runner."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import billiard.pool
from celery import Celery
from celery.signals import worker_process_init
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from service.contract.broker import BROKER_SETTINGS
from service.contract.settings import Connections
from service.contract.stages import STAGES, PartMessage, Queue, Stage
from workers.runner import Runner
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

STARTUP_SECONDS = 300.0  # a child imports torch and transformers before it is ready


class WorkerApp(Celery):  # type: ignore[misc]  # celery ships no types
    """A Celery app that knows its runner. The runner is made in the child: the parent never imports torch."""

    @cached_property
    def runner(self) -> Runner:
        from workers import machine, stages  # torch comes in here

        settings = WorkerSettings.from_environment(os.environ)
        device = machine.prepare(settings)
        connections = Connections.from_environment(os.environ)
        return Runner(
            connections,
            stages.RUN,
            self.ring,
            lambda: is_leaving(settings.stop_file),
            device,
            settings.calibration_bytes,
            settings.queues,
        )

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
    except Exception:  # celery would go on and drop every message: better no worker than one that can't work
        logger.exception("This worker can't start")
        stop_file = os.environ.get("CATMERGE_STOP_FILE")
        if stop_file:
            failed_file(Path(stop_file)).touch()
        os.kill(os.getppid(), signal.SIGTERM)
        raise
