"""A batch process with something to do at its end."""

import atexit
import os

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask, batch_size=100, batch_idle_timeout=60.0)
def report_at_exit(mailbox: str) -> int:
    atexit.register(bodies.report, mailbox, os.getpid(), "exits")
    return os.getpid()
