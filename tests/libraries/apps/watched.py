"""Sentry's SDK with its integration for Celery, over HTTP; $SENTRY_DSN is where it sends to.

$SET_UP says where: "import" of this module, or "signals" as Sentry's documentation has it.
"""

import logging
import os
from typing import Any

import sentry_sdk
from celery.signals import celeryd_init, task_prerun
from sentry_sdk.integrations.celery import CeleryIntegration

from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.signals import isolated_process_init

app = make_app(__name__)

logger = logging.getLogger(__name__)


def set_up(**_: Any) -> None:
    sentry_sdk.init(
        dsn=os.environ["SENTRY_DSN"], integrations=[CeleryIntegration()], traces_sample_rate=1.0
    )


if os.environ["SET_UP"] == "import":
    set_up()
else:
    # For the worker, whose pool processes inherit it, and for children, which are not its own.
    celeryd_init.connect(set_up, weak=False)
    isolated_process_init.connect(set_up, weak=False)


@task_prerun.connect
def describe(kwargs: dict[str, Any], **_: Any) -> None:
    if "user" in kwargs:
        sentry_sdk.set_user({"id": kwargs["user"]})
        sentry_sdk.set_tag("tenant", f"tenant of {kwargs['user']}")
        # One that cannot change process, beside those that can.
        sentry_sdk.set_context("order", {"number": 7, "of": kwargs["user"]})
        sentry_sdk.set_extra("unpicklable", lambda: None)
        sentry_sdk.set_extra("attempt", 3)
        sentry_sdk.add_breadcrumb(category="slot", message="before the call")


@app.task(base=IsolatedTask)
def fail(user: str) -> None:
    raise KeyError(f"of the body for {user}")


@app.task(base=IsolatedTask)
def report(user: str) -> int:
    sentry_sdk.add_breadcrumb(category="body", message="in the body")
    sentry_sdk.capture_message(f"message for {user}")
    return os.getpid()


@app.task(base=IsolatedTask)
def handle(user: str) -> None:
    try:
        raise ValueError(f"handled for {user}")
    except ValueError:
        logger.exception("logged in the body")


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def report_in_batch(text: str, **kwargs: Any) -> int:
    sentry_sdk.capture_message(text)
    sentry_sdk.set_tag("of_body", text)
    return os.getpid()


@app.task(base=IsolatedTask)
def send_from_body(user: str) -> str:
    task_id: str = report.delay(user=user).id
    return task_id


@app.task(base=IsolatedTask)
def end_of_the_last_child() -> None:
    """A slot starts its next process when the last one has exited."""


@app.task
def flush() -> None:
    """Send what this slot has buffered."""
    sentry_sdk.flush()
