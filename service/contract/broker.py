"""How both sides speak to the broker: the settings that make a message a hint and never the truth."""

from __future__ import annotations

from typing import Any

# Early acknowledgement, no results, JSON only: a message lost or doubled is repaired from the database. The timeouts
# bound how long a submit or a worker can hang on a broker that is away.
BROKER_SETTINGS: dict[str, Any] = {
    "task_ignore_result": True,
    "task_acks_late": False,
    "task_create_missing_queues": True,
    "task_serializer": "json",
    "accept_content": ["json"],
    "result_backend": None,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_transport_options": {
        "socket_timeout": 10.0,
        "socket_connect_timeout": 2.0,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "visibility_timeout": 3600,
        "retry_policy": {"timeout": 3.0},
    },
    "task_publish_retry": False,
    "enable_utc": True,
}
