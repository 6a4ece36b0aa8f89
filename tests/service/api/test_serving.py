from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.servers import free_port
from tests.service.front import checkpoint, connections_to, recipe


def start(folder: Path, port: int, **changes: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        **connections_to(folder).to_environment(),
        "CATMERGE_PORT": str(port),
        "CATMERGE_UNKNOWN": "is ignored",
        **changes,
    }
    command = [sys.executable, "-W", "error", "-m", "service.api"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def await_health(port: int, process: subprocess.Popen[str]) -> None:
    transport = httpx.HTTPTransport(retries=10)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport) as http:
        assert process.poll() is None
        http.get("/healthz").raise_for_status()


def test_a_service_asked_to_stop_ends_its_streams_and_stops(tmp_path: Path) -> None:
    port = free_port()
    for name in ("base", "cars"):
        path = tmp_path / "objects" / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(checkpoint(weight=(2, 3)))
    with start(tmp_path, port) as process:
        try:
            await_health(port, process)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                job = http.post("/v1/merges", json=recipe()).json()
                headers = {"Accept": "text/event-stream"}
                with http.stream("GET", job["links"]["events"], headers=headers) as response:
                    lines = response.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    assert "event: job.queued" in list(lines), "the stream ends whole, not broken"
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "POST /v1/merges 202" in log
    assert "Traceback" not in log
    assert "Cancel" not in log, "nothing had to be cut off"


def test_a_setting_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    for name, value in (("CATMERGE_PORT", "many"), ("CATMERGE_LEASE_SECONDS", "0")):
        with start(tmp_path, free_port(), **{name: value}) as process:
            _, log = process.communicate(timeout=60)
        assert process.returncode == 2
        assert name in log
        assert "Traceback" not in log
