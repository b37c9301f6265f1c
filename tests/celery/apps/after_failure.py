"""Tasks that fail outside their bodies, and what is called then."""

import os
import signal
import time
from typing import Any, NoReturn

from celery import Task

from harness import bodies
from harness.app import make_app
from isolated_tasks import ChildLostError, IsolatedTask, OutOfMemoryError

app = make_app(__name__)


def kill_myself() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


@app.task
def slot_pid() -> int:
    return os.getpid()


@app.task(base=IsolatedTask, bind=True, autoretry_for=(Exception,), retry_kwargs={"countdown": 0})
def die_twice(self: Task, path: str) -> int:
    bodies.append(path, self.request.retries)
    if self.request.retries < 2:
        kill_myself()
    return int(self.request.retries)


@app.task(base=IsolatedTask, autoretry_for=(Exception,), max_retries=1, retry_backoff=False)
def die_always(path: str) -> NoReturn:
    bodies.append(path, "begun")
    kill_myself()


@app.task(
    base=IsolatedTask,
    autoretry_for=(Exception,),
    dont_autoretry_for=(MemoryError,),
    default_retry_delay=0,
)
def run_out_of_memory(path: str) -> NoReturn:
    bodies.append(path, "begun")
    raise MemoryError("all gone")


@app.task(
    base=IsolatedTask,
    bind=True,
    autoretry_for=(OutOfMemoryError,),
    retry_kwargs={"countdown": 0},
)
def run_out_of_memory_once(self: Task) -> int:
    if not self.request.retries:
        raise MemoryError("all gone")
    return int(self.request.retries)


@app.task(base=IsolatedTask, bind=True, autoretry_for=(Exception,), retry_kwargs={"countdown": 0})
def return_a_lock_once(self: Task) -> Any:
    return self.request.retries or bodies.lock_inside()


@app.task(base=IsolatedTask, bind=True, acks_late=True, reject_on_worker_lost=True)
def die_unless_redelivered(self: Task, path: str) -> str:
    redelivered = bool(self.request.delivery_info["redelivered"])
    bodies.append(path, redelivered)
    if not redelivered:
        kill_myself()
    return "done"


@app.task(base=IsolatedTask, acks_late=True, reject_on_worker_lost=True)
def ask_who_dies(path: str) -> NoReturn:
    """Fail as by the result of another call."""
    bodies.append(path, "asked")
    raise ChildLostError("another call's child is lost", {"task": "another"})


@app.task(base=IsolatedTask, bind=True, retry_on_worker_lost=True, default_retry_delay=0)
def die_once(self: Task) -> int:
    if not self.request.retries:
        kill_myself()
    return int(self.request.retries)


@app.task(base=IsolatedTask, acks_late=True)
def die_and_stay_dead(path: str) -> NoReturn:
    bodies.append(path, "begun")
    kill_myself()


@app.task
def hang() -> None:
    time.sleep(1000)


@app.task
def fail() -> NoReturn:
    raise LookupError("in vain")


@app.task(base=IsolatedTask)
def errback(request: Any, exc: BaseException, traceback: str, path: str) -> object:
    # Its result is nobody's, so it need not be one that can change process.
    bodies.append(path, f"{os.getpid()} {type(exc).__name__} {request.id}")
    return bodies.lock_inside()
