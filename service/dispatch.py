"""Rings the workers' bell: sends (stage, job, part) over the broker, and never anything that could be lost with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from service.contract.broker import BROKER_SETTINGS
from service.contract.stages import STAGES, PartMessage

logger = logging.getLogger(__name__)

# A submit does not wait for a broker that is away: kombu alone would try for 6 s.
BRIEFLY = {"max_retries": 0, "socket_timeout": 2.0}


# A broker that hangs costs whoever rings the whole timeout: after that, nobody tries for a while. The sweeper will.
PAUSE_SECONDS = 5.0


class Dispatcher:
    """A send-only client of the broker."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("catmerge", broker=broker_url, set_as_current=False)
        options = {**BROKER_SETTINGS["broker_transport_options"], **BRIEFLY}
        self._app.conf.update({**BROKER_SETTINGS, "broker_transport_options": options})
        self._silent_until = 0.0

    def ring(self, messages: Sequence[PartMessage]) -> list[PartMessage]:
        """Send messages in order; returns those that the broker did not take. A broker that is down is no error."""
        if time.monotonic() < self._silent_until:
            return list(messages)
        for position, message in enumerate(messages):
            try:
                self._send(message)
            except (KombuError, RedisError, OSError) as error:
                logger.warning("The broker takes no messages (%s); the sweeper will ring again", error)
                self._silent_until = time.monotonic() + PAUSE_SECONDS
                return list(messages[position:])
        return []

    def _send(self, message: PartMessage) -> None:
        row = STAGES[message.stage]
        self._app.send_task(row.message, args=[message.job_id, message.part], queue=row.queue.value)

    def is_reachable(self) -> bool:
        """Whether the broker answers, within the timeouts of ``BROKER_SETTINGS``."""
        with self._app.connection_for_write() as connection:
            try:
                connection.connect()
            except (KombuError, RedisError, OSError):
                return False
        return True

    def close(self) -> None:
        self._app.close()
