"""celery-singleton: a call whose like is waiting or running is not sent again."""

import os
import signal
from typing import Any

from celery_singleton import Singleton

from harness.app import make_app
from isolated_tasks import IsolatedMixin, IsolatedTask

app = make_app(__name__)


class IsolatedSingleton(IsolatedMixin, Singleton):
    abstract = True


@app.task(base=IsolatedSingleton)
def wait(fifo: str) -> int:
    """Wait until somebody opens the other end."""
    with open(fifo) as file:
        file.read()
    return os.getpid()


@app.task(base=IsolatedSingleton)
def end(how: str) -> str:
    if how == "failure":
        raise KeyError(how)
    if how == "lost child":
        os.kill(os.getpid(), signal.SIGKILL)
    return how


@app.task
def send_twice(fifo: str) -> list[str]:
    return [wait.delay(fifo).id for _ in range(2)]


@app.task(base=IsolatedTask)
def send_from_body(fifo: str) -> list[str]:
    ids: list[str] = [wait.delay(fifo).id for _ in range(2)]
    return ids


@app.task
def send_end(how: str) -> str:
    task_id: str = end.delay(how).id
    return task_id


@app.task
def locks() -> list[Any]:
    """The keys of all locks that are held."""
    client = wait.singleton_backend.redis
    return sorted(client.scan_iter(f"{wait.singleton_config.key_prefix}*"))
