from __future__ import annotations

import pytest

from service import dispatch
from service.contract.stages import PartMessage, Stage
from service.dispatch import Dispatcher
from tests.servers import free_port, redis_server

MESSAGE = PartMessage(Stage.PLAN, "mrg_0", 0)


def test_a_broker_that_failed_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    patient = Dispatcher(url)
    assert patient.ring([MESSAGE]) == [MESSAGE]
    monkeypatch.setattr(dispatch, "PAUSE_SECONDS", -1.0)
    at_once = Dispatcher(url)
    assert at_once.ring([MESSAGE]) == [MESSAGE]
    monkeypatch.setattr(patient, "_silent_until", float("inf"))  # however slow this machine is
    with redis_server(port=port):
        assert patient.ring([MESSAGE]) == [MESSAGE], "nobody tried"
        assert at_once.ring([MESSAGE]) == []
        monkeypatch.undo()
    patient.close()
    at_once.close()
