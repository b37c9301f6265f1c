"""An app that asks a module in the worker's folder, which may change while the worker runs."""

import os

import rules  # type: ignore[import-not-found]

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask, batch_size=100, batch_idle_timeout=1000)
def ask() -> list[object]:
    return [rules.ANSWER, os.getpid(), os.getppid()]
