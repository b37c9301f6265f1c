"""Isolated tasks, and beside some of them the same as a plain task."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from celery import Task, current_task
from celery._state import task_join_will_block
from celery.utils.log import get_task_logger

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

task_logger = get_task_logger(__name__)
other_logger = logging.getLogger("somewhere.else")

#: Set by a call, and to be gone at the next.
leftovers: list[object] = []


def both(**options: Any) -> Callable[[Callable[..., Any]], None]:
    """Register a bound function twice: isolated, and plain with ``plain_`` before its name."""

    def register(function: Callable[..., Any]) -> None:
        name = function.__name__
        app.task(base=IsolatedTask, bind=True, name=f"{__name__}.{name}", **options)(function)
        app.task(bind=True, name=f"{__name__}.plain_{name}", **options)(function)

    return register


def _body(name: str) -> Callable[..., Any]:
    body: Callable[..., Any] = getattr(bodies, name)
    return body


@app.task(base=IsolatedTask)
def run(body: str, *args: Any, **kwargs: Any) -> Any:
    """Run one of the harness's bodies."""
    return _body(body)(*args, **kwargs)


@app.task(base=IsolatedTask, batch_size=3, batch_idle_timeout=60.0)
def run_in_batch(body: str, *args: Any, **kwargs: Any) -> Any:
    return _body(body)(*args, **kwargs)


@app.task
def plain_run(body: str, *args: Any, **kwargs: Any) -> Any:
    return _body(body)(*args, **kwargs)


@app.task(base=IsolatedTask, ignore_result=True)
def run_without_result(body: str, *args: Any, **kwargs: Any) -> Any:
    return _body(body)(*args, **kwargs)


@app.task(base=IsolatedTask)
def leave_something() -> int:
    leftovers.append(object())
    return len(leftovers)


# ── exceptions ──────────────────────────────────────────────────────────────────────────────────


class Trouble(Exception):
    """An exception that pickles and does not unpickle."""

    def __init__(self, where: str, how: str) -> None:
        super().__init__(f"{where}: {how}")
        self.how = how


def helper_that_fails(key: str) -> NoReturn:
    raise LookupError(key, 3)


@app.task(base=IsolatedTask)
def fail(key: str) -> NoReturn:
    helper_that_fails(key)


@app.task(base=IsolatedTask)
def fail_because_of_another() -> NoReturn:
    try:
        helper_that_fails("the cause")
    except LookupError as exc:
        raise ValueError("the effect") from exc


@both(throws=(Trouble,))
def be_in_trouble(self: Task) -> NoReturn:
    raise Trouble("here", "badly")


ENDS: dict[str, BaseException] = {
    "MemoryError": MemoryError("all gone"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt("enough"),
}


@app.task(base=IsolatedTask)
def end_with(name: str) -> NoReturn:
    raise ENDS[name]


@app.task(base=IsolatedTask)
def die_here(mailbox: str, how: str) -> None:
    bodies.report(mailbox, os.getpid())
    if how == "SIGSEGV":
        bodies.crash_in_c()
    elif how == "SIGKILL":
        bodies.kill_myself(9)
    else:
        os._exit(0)


@app.task
def errback(request: Any, exc: BaseException, traceback: object, *, path: str) -> None:
    """Called by Celery as a function, when the task fails that it is linked to."""
    bodies.append(path, type(exc).__name__)


# ── self ────────────────────────────────────────────────────────────────────────────────────────


@both()
def describe(self: Task) -> dict[str, Any]:
    """What a body sees of its call."""
    request = self.request
    ours = {"id", "root_id", "task", "replaced_task_nesting", "correlation_id", "properties"}
    return {
        "fields": sorted(vars(request)),
        "values": {
            name: value
            for name, value in vars(request).items()
            if name not in ours and isinstance(value, (str, int, float, bool, list, dict, tuple))
        },
        "id": request.id,
        "root_id": request.root_id,
        "trace": request.get("trace"),
        "hostname": request.hostname,
        "routing_key": request.delivery_info["routing_key"],
        "called_directly": request.called_directly,
        "is_eager": request.is_eager,
        "name": self.name.replace("plain_", ""),
        "current_task": current_task.name.replace("plain_", ""),
        "current_worker_task": self.app.current_worker_task.name.replace("plain_", ""),
        "app": self.app.main,
        "queue": self.app.conf.task_default_queue,
        "join_will_block": task_join_will_block(),
        "threads": threading.current_thread() is threading.main_thread() or "other",
    }


@app.task(base=IsolatedTask, bind=True, max_retries=5)
def retry_until(self: Task, retries: int) -> dict[str, Any]:
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return {
        "retries": self.request.retries,
        "trace": self.request.get("trace"),
        "headers": self.request.headers,
    }


@app.task(base=IsolatedTask, autoretry_for=(ZeroDivisionError,), default_retry_delay=0)
def retried_by_itself(path: str) -> int:
    bodies.append(path, "begun")
    with open(path) as file:
        begun = len(file.readlines())
    return begun if begun == 3 else 1 // 0


@app.task(base=IsolatedTask, bind=True)
def launched(self: Task, mailbox: str) -> str:
    bodies.report(mailbox, self.request.id, self.request.parent_id, self.request.root_id)
    return "the other's result"


@app.task(base=IsolatedTask)
def launch(mailbox: str, *, and_fail: bool = False) -> str:
    child: str = launched.delay(mailbox).id
    if and_fail:
        raise LookupError(child)
    return child


@app.task(base=IsolatedTask)
def get_within(mailbox: str) -> str:
    result: str = launched.delay(mailbox).get(timeout=30)
    return result


@app.task(base=IsolatedTask, bind=True)
def recurse(self: Task, depth: int) -> list[int]:
    return [os.getpid(), *(self(depth - 1) if depth else ())]


@app.task(base=IsolatedTask)
def call_another() -> list[int]:
    return [os.getpid(), run("ids")["pid"], run.apply(("ids",)).result["pid"]]


# ── logging ─────────────────────────────────────────────────────────────────────────────────────


@both()
def talk(self: Task, word: str) -> None:
    task_logger.warning("%s: by a task logger", word)
    task_logger.debug("%s: too quiet", word)
    other_logger.error("%s: by another logger", word)
    print(f"{word}: printed")
    with contextlib.suppress(ZeroDivisionError):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            task_logger.exception("%s: with a traceback", word)
            raise


# ── many at once ────────────────────────────────────────────────────────────────────────────────


def _where(self: Task, item: int) -> dict[str, Any]:
    return {
        "item": item,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "current_task": current_task.name.replace("plain_", ""),
        "current_worker_task": self.app.current_worker_task.name,
        "called_directly": self.request.called_directly,
    }


@app.task(base=IsolatedTask, bind=True, batch_size=2)
def where(self: Task, item: int) -> dict[str, Any]:
    return _where(self, item)


@app.task(bind=True)
def plain_where(self: Task, item: int) -> dict[str, Any]:
    return _where(self, item)
