"""Plain tasks, and a batch of celery-batches."""

import os
import time
from typing import Any

from celery_batches import Batches

from harness import compared
from harness.app import make_app

app = make_app(__name__)

pid = app.task(name="pid")(compared.pid)
pid_of_a_child = app.task(name="pid_of_a_child")(compared.pid_of_a_child)
crash = app.task(name="crash")(compared.crash)


@app.task(name="hold")
def hold(megabytes: int) -> tuple[int, int]:
    return compared.hold(megabytes), os.getpid()


@app.task(base=Batches, name="batch", flush_every=2, flush_interval=1, time_limit=1)
def batch(requests: list[Any]) -> None:
    how = requests[0].args[0]
    if how == "crash":
        compared.crash()
    if how == "sleep":
        time.sleep(2.5)  # longer than its time limit, by more than the pool looks for it
    for request in requests:
        app.backend.mark_as_done(request.id, os.getpid(), request=request)
