"""Serves the API until it is asked to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.contract.settings import Connections
from service.settings import Settings

LAST_WORDS_SECONDS = 5


class Server(uvicorn.Server):
    """A server that tells open streams to end as soon as it is asked to stop, and not when it has waited for them."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        super().handle_exit(signal.Signals(sig), frame)


def server(connections: Connections, settings: Settings) -> Server:
    """A server of the API, not yet running."""
    app = create_app(connections, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # our own lines say more: they carry the request's id
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    return Server(config, app.state.house.closing)


def serve(connections: Connections, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    server(connections, settings).run()
