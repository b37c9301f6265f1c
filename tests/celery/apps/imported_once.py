"""An app that can be imported once: by the worker, not by its forkserver."""

import os
from concurrent.futures import ThreadPoolExecutor

from celery import Task
from celery._state import get_current_app

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

#: Fails where it exists: this module was imported before.
MARKER = os.environ["MARKER"]
with open(MARKER, "x"):
    pass


def helper(number: int) -> int:
    return number + 1


@app.task(base=IsolatedTask)
def add_one(number: int) -> list[int]:
    return [number + 1, os.getpid(), os.getppid()]


@app.task(base=IsolatedTask)
def add_one_by_a_helper(number: int) -> int:
    return helper(number)


@app.task(base=IsolatedTask, bind=True)
def pass_on(self: Task, number: int) -> str:
    """Send another task; the broker has to be the worker's."""
    sent: str = self.app.send_task("imported_once.add_one", (number,)).id
    return sent


@app.task(base=IsolatedTask)
def queue_of_a_thread() -> str:
    """Where a thread of the body would send a task that it knows by a proxy, as shared ones are."""
    with ThreadPoolExecutor(1) as executor:
        queue: str = executor.submit(get_current_app).result().conf.task_default_queue
    return queue
