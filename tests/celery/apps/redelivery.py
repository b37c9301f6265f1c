"""Tasks that say how often, and as which delivery, their bodies have begun."""

import os
from typing import Any

from celery import Task

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


def begin(task: Task, path: str) -> bool:
    """Note that a body begins; whether its message has been delivered before."""
    again = bool(task.request.delivery_info["redelivered"])
    bodies.append(path, again)
    return again


def wait(task: Task, path: str, mailbox: str, fifo: str) -> str:
    """Wait for the word, or, when the message comes again, not."""
    if begin(task, path):
        return "the second time"
    bodies.report(mailbox, os.getpid())
    return bodies.wait_for_word(fifo)


@app.task(base=IsolatedTask, bind=True)
def acknowledged_early(self: Task, *args: Any) -> str:
    return wait(self, *args)


@app.task(base=IsolatedTask, bind=True, acks_late=True)
def acknowledged_late(self: Task, *args: Any) -> str:
    return wait(self, *args)


@app.task(base=IsolatedTask, bind=True, acks_late=True, reject_on_worker_lost=True)
def given_back(self: Task, *args: Any) -> str:
    return wait(self, *args)


@app.task
def slot_pid() -> int:
    return os.getpid()
