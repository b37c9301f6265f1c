"""Tasks that tell where they run."""

import os
from typing import Any

from celery import Task
from celery.canvas import xmap

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


def ids() -> dict[str, int]:
    return {"pid": os.getpid(), "parent": os.getppid()}


@app.task(base=IsolatedTask)
def unsaid() -> dict[str, int]:
    return ids()


@app.task(base=IsolatedTask, isolated=False)
def never() -> dict[str, int]:
    return ids()


@app.task(base=IsolatedTask, isolated=True)
def always() -> dict[str, int]:
    return ids()


@app.task
def plain() -> dict[str, int]:
    return ids()


@app.task(base=IsolatedTask, bind=True, max_retries=3)
def retry_until(self: Task, retries: int) -> list[int]:
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return [self.request.retries, os.getpid()]


@app.task(base=IsolatedTask)
def fail() -> None:
    raise LookupError("in vain")


@app.task(base=IsolatedTask)
def take(*args: Any) -> int:
    return len(args)


@app.task(base=IsolatedTask)
def pid_for(_: object) -> int:
    return os.getpid()


@app.task(base=IsolatedTask)
def apply_another() -> list[int]:
    return [os.getpid(), unsaid.apply().result["pid"], *xmap(pid_for.s(), [1]).apply().result]
