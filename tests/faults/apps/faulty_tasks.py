"""Tasks that run the bodies of the harness, isolated and, beside it, not."""

import time
from typing import Any

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded

from harness import bodies, faulty
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask)
def run(body: str, *args: Any) -> Any:
    """Run one of the harness's bodies."""
    return getattr(bodies, body)(*args)


@app.task
def plain_run(body: str, *args: Any) -> Any:
    return getattr(bodies, body)(*args)


@app.task(base=IsolatedTask)
def run_faulty(body: str, *args: Any) -> Any:
    return getattr(faulty, body)(*args)


@app.task(base=IsolatedTask, acks_late=True, reject_on_worker_lost=True)
def hang_late(mailbox: str) -> None:
    bodies.hang(mailbox, "asleep")


@app.task(base=IsolatedTask, bind=True)
def tell_progress(self: Task, count: int) -> int:
    for number in range(count):
        self.update_state(state="PROGRESS", meta={"number": number})
    return count


@app.task(base=IsolatedTask, soft_time_limit=0.2)
def count_soft_limits() -> int:
    """How often it is told, in a time that is several times as long as its limit."""
    told = 0
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            time.sleep(0.01)
        except SoftTimeLimitExceeded:
            told += 1
    return told
