"""Has processes that load Django anew use the test databases, as the process of the tests does.

Django's test runner, and pytest-django, put the names of the test databases into the settings of
their own process. A forkserver loads these settings anew, and a body would write to the real
database. So the names travel in the environment, and this module, imported in the forkserver after
the app (`isolated_preload`), puts them in.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["VARIABLE", "adopt", "carried", "names"]

#: A JSON object: names of databases by their aliases.
VARIABLE = "ISOLATED_TASKS_TEST_DATABASES"


def names() -> dict[str, str]:
    """The databases that Django uses in this process, by alias; empty where there is no Django."""
    if "django.db" not in sys.modules:
        return {}
    from django.conf import settings
    from django.db import connections

    if not settings.configured:
        return {}
    return {alias: str(connections.settings[alias]["NAME"]) for alias in connections}


@contextlib.contextmanager
def carried(app: Celery) -> Iterator[None]:
    """Have forkservers of this app, if they are started meanwhile, use the same databases."""
    from isolated_tasks import settings
    from isolated_tasks.testing.embedded import changed

    here = names()
    if not here:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(here)
    preload = (*settings.worker_settings(app).preload, __name__)
    try:
        with changed(app, isolated_preload=preload):
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def adopt() -> None:
    """Use the databases that the environment names, if it names any. Nothing is connected to."""
    told = os.environ.get(VARIABLE)
    if not told:
        return
    from django.db import connections

    for alias, name in json.loads(told).items():
        if alias in connections.settings:
            connections.settings[alias]["NAME"] = name


adopt()
