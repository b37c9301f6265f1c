"""A Django project's tasks; results are stored by django-celery-results."""

import os
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_settings")

import django
from celery.signals import task_prerun
from django.db import connection
from django.utils import timezone, translation

from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.signals import isolated_process_init

django.setup()

app = make_app(__name__)
app.config_from_object("django.conf:settings", namespace="CELERY")

from django_celery_results.models import TaskResult  # noqa: E402 - needs the settings

# What code does that asks the database at import: this process has a connection from here on.
TaskResult.objects.exists()
CONNECTED_IN = os.getpid() if connection.connection is not None else None

#: Whether a child is born with a connection; before a body Celery closes those that there are.
inherited: list[bool] = []


@isolated_process_init.connect
def look_for_connection(**_: Any) -> None:
    inherited.append(connection.connection is not None)


@task_prerun.connect
def prefer(kwargs: dict[str, Any], **_: Any) -> None:
    if "user" in kwargs:
        translation.activate("de")
        timezone.activate("Europe/Vienna")


@app.task(base=IsolatedTask)
def add(x: int, y: int) -> int:
    return x + y


@app.task(base=IsolatedTask)
def fail() -> None:
    raise KeyError("of the body")


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def ask() -> dict[str, Any]:
    TaskResult.objects.count()
    return {"inherited": inherited, "pid": os.getpid(), "connected at import in": CONNECTED_IN}


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def preferences(user: str | None = None) -> list[Any]:
    return [translation.get_language(), timezone.get_current_timezone_name(), os.getpid()]


@app.task
def plain_preferences(user: str | None = None) -> list[Any]:
    seen = [translation.get_language(), timezone.get_current_timezone_name()]
    translation.deactivate()
    timezone.deactivate()
    return seen


@app.task
def forget() -> None:
    """What is activated in a slot stays so there, as with any task."""
    translation.deactivate()
    timezone.deactivate()
