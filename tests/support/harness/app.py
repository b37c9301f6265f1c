"""The Celery app of a test: the same settings in the worker and in pytest.

The settings travel to the worker in its environment, so that a test app is an ordinary module:

    from harness.app import make_app

    app = make_app(__name__)

    @app.task
    def add(x, y): ...
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery import Celery


@dataclass(frozen=True)
class Settings:
    """What the app of one test is configured with.

    Args:
        broker_url: Celery's `broker_url`.
        result_backend: Celery's `result_backend`.
        name: unique; names the queue and every exchange, so that tests never see one another's
            messages, remote control and events included.
        conf: further Celery settings, in JSON's types.
    """

    broker_url: str
    result_backend: str
    name: str
    conf: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environ(cls) -> "Settings":
        """Read what `environ` wrote, in the worker."""
        return cls(
            broker_url=os.environ["BROKER_URL"],
            result_backend=os.environ["RESULT_BACKEND"],
            name=os.environ["TEST_QUEUE"],
            conf=json.loads(os.environ.get("TEST_CONF", "{}")),
        )

    def environ(self) -> dict[str, str]:
        """The environment variables that carry these settings to a worker."""
        return {
            "BROKER_URL": self.broker_url,
            "RESULT_BACKEND": self.result_backend,
            "TEST_QUEUE": self.name,
            "TEST_CONF": json.dumps(dict(self.conf)),
        }

    @property
    def exchanges(self) -> list[str]:
        """Every exchange that Celery declares under these settings."""
        control, events = f"{self.name}-control", f"{self.name}-events"
        return [self.name, events, f"{control}.pidbox", f"reply.{control}.pidbox"]

    def celery_conf(self) -> dict[str, Any]:
        """All settings as Celery wants them."""
        return {
            "broker_url": self.broker_url,
            "result_backend": self.result_backend,
            "task_default_queue": self.name,
            "task_default_exchange": self.name,
            "task_default_routing_key": self.name,
            "control_exchange": f"{self.name}-control",
            "event_exchange": f"{self.name}-events",
            "result_expires": 600,
            # Unset it is the same, with a warning.
            "broker_connection_retry_on_startup": True,
            # Some Celery versions print this one's change of default at each start.
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            **self.conf,
        }


def make_app(main: str, settings: Settings | None = None) -> Celery:
    """Make the app called `main`; without settings, from the environment, as a worker does."""
    app = Celery(main, set_as_current=settings is None)
    app.conf.update((settings or Settings.from_environ()).celery_conf())
    return app


def close_app(app: Celery) -> None:
    """Close every connection of a client app, so that none is left to the garbage collector."""
    backend = app.backend
    consumer = getattr(backend, "result_consumer", None)
    # That of rpc fails if it has not begun, as where nobody has waited for a result.
    if consumer is not None and getattr(consumer, "_consumer", consumer) is not None:
        consumer.stop()
    client = backend.__dict__.get("client")  # a cached property: there only if it was used
    if hasattr(client, "close"):  # that of Celery's cache in memory has nothing to close
        client.close()
    app.close()
