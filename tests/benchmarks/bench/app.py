"""The app of the workers that are measured; $BENCH_URL is its Redis."""

from __future__ import annotations

import os

from celery import Celery

from bench import bodies
from isolated_tasks import IsolatedTask

BATCH_SIZES = (2, 5, 20, 100)

app = Celery(
    "bench",
    broker=os.environ["BENCH_URL"],
    backend=os.environ["BENCH_URL"],
    set_as_current=False,
)
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    result_expires=600,
)


@app.task
def plain(value: object = None) -> object:
    """In the slot."""
    return bodies.nothing(value)


@app.task(base=IsolatedTask)
def isolated(value: object = None) -> object:
    """In a process of its own."""
    return bodies.nothing(value)


for size in BATCH_SIZES:

    @app.task(base=IsolatedTask, name=f"batch_{size}", batch_size=size)
    def batch(value: object = None) -> object:
        """In a process that serves some calls."""
        return bodies.nothing(value)


@app.task
def plain_wait(folder: str) -> None:
    """Wait in the slot."""
    bodies.wait_for(folder)


@app.task(base=IsolatedTask)
def isolated_wait(folder: str) -> None:
    """Wait in a process."""
    bodies.wait_for(folder)
