"""A body that takes more memory than there is, and has no limit of its own."""

import os

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask)
def hold(size: int) -> int:
    return bodies.hold(size)


@app.task
def slot() -> int:
    return os.getpid()
