"""The front of the house stands without the workshop: the API starts where torch and its kin can't be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.service.front import connections_to

WALLED_OFF = ("torch", "safetensors", "transformers", "numpy", "workers")
PROGRAM = """
import os, socket, sys, threading, time, urllib.request

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in WALLED_OFF:
            raise ImportError(f"the front of the house imports {name}")

sys.meta_path.insert(0, Wall())

from service.api.serving import server
from service.contract.settings import Connections
from service.settings import Settings

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
running = server(Connections.from_environment(os.environ), Settings())
thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
thread.start()
while not running.started and thread.is_alive():
    time.sleep(0.01)
for path in ("/healthz", "/openapi.json"):
    with urllib.request.urlopen(f"http://127.0.0.1:{listener.getsockname()[1]}{path}") as response:
        print(path, response.status)
running.handle_exit(15, None)
thread.join()
print("imported:", sorted(WALLED_OFF & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_api_starts_without_torch(tmp_path: Path) -> None:
    environment = {**os.environ, **connections_to(tmp_path).to_environment()}
    program = f"WALLED_OFF = {set(WALLED_OFF)!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["/healthz 200", "/openapi.json 200", "imported: []"]
