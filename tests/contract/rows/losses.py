"""What a caller sees when the process of a body is lost.

Not run where tasks are plain: the body would kill a slot of the pool, or the whole worker. A task
that is lost in a slot of the prefork pool is the model: one failure, one call of each errback.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from celery import Task

from contract.recorder import note
from contract.table import Differs, Row, Seen, task


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@task()
def die_always() -> None:
    die()


@task(acks_late=True)
def die_always_and_late() -> None:
    die()


@task(bind=True)
def launch_and_die(self: Task) -> None:
    errback.on(self.app).delay(None, "launched", None)
    die()


@task(bind=True, autoretry_for=(Exception,), max_retries=2, default_retry_delay=0)
def die_at_first(self: Task) -> int:
    if self.request.retries == 0:
        die()
    return int(self.request.retries)


@task(autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def die_each_time() -> None:
    die()


@task(autoretry_for=(ZeroDivisionError,), max_retries=1, default_retry_delay=0)
def die_though_others_are_retried() -> None:
    die()


@task()
def errback(request: Any, exc: Any, traceback: Any) -> None:
    note("errback of", type(exc).__name__)


def counted(**numbers: int) -> Callable[[Seen], bool]:
    """Whether each signal and hook was recorded so often, over all tasks of the row."""

    def check(seen: Seen) -> bool:
        names = [
            name
            for task in seen["tasks"].values()
            for lines in task["signals"].values()
            for name, _ in lines
        ]
        return {name: names.count(name) for name in numbers} == numbers

    return check


def lost(name: str, send: Callable[[Any], Any], *, trap: int | None = None, **isolated: Any) -> Row:
    return Row(
        f"a lost process: {name}",
        send,
        expects={"state": "a plain one ends its slot, or the worker"},
        plain=False,
        trap=trap,
        differs=Differs("A lost process is a failure of its call alone.", isolated),
    )


LOST: dict[str, Any] = {"state": "FAILURE", "error": "ChildLostError", "left": 0}

ROWS = [
    lost(
        "one failure",
        lambda app: die_always.on(app).delay(),
        trap=2,
        **LOST,
        runs=1,
        check=counted(task_failure=1, on_failure=1, after_return=1, task_postrun=1),
    ),
    lost(
        "each errback is called once",
        lambda app: die_always.on(app).apply_async(link_error=errback.on(app).s()),
        trap=2,
        **LOST,
        notes=["'ChildLostError'", "'errback of'"],
    ),
    lost(
        "acknowledged late",
        lambda app: die_always_and_late.on(app).delay(),
        **LOST,
        runs=1,
    ),
    lost(
        "after it launched a task",
        lambda app: launch_and_die.on(app).delay(),
        **LOST,
        tasks=2,
    ),
    lost(
        "the task is retried by itself",
        lambda app: die_at_first.on(app).delay(),
        trap=12,
        state="SUCCESS",
        result=1,
        runs=2,
        check=counted(task_retry=1, on_retry=1, task_failure=0, task_success=1),
    ),
    lost(
        "the task is retried by itself, too often",
        lambda app: die_each_time.on(app).delay(),
        trap=12,
        **LOST,
        runs=2,
        check=counted(task_retry=1, on_retry=1, task_failure=1),
    ),
    lost(
        "the task is retried by itself, for other exceptions",
        lambda app: die_though_others_are_retried.on(app).delay(),
        trap=12,
        **LOST,
        runs=1,
    ),
]
