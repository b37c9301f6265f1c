"""Tasks that use as much as they are told to, and note where they see what they have used."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from celery import Task, signals

from harness.app import make_app
from isolated_tasks import IsolatedTask, Usage
from isolated_tasks.signals import isolated_call_finished

app = make_app(__name__)

MIB = 1 << 20
PAGE = 4096

TOUCH = f"""
import sys
held = bytearray(int(sys.argv[1]) * {MIB})
held[::{PAGE}] = b"x" * len(held[::{PAGE}])
"""


def note(where: str, task: Task, usage: Usage | None, **values: object) -> None:
    """Keep it for the test."""
    line = json.dumps(
        {
            "where": where,
            "task": task.name,
            "pid": os.getpid(),
            "usage": None if usage is None else dataclasses.asdict(usage),
            **values,
        }
    )
    with Path(os.environ["TEST_NOTES"]).open("a") as file:
        file.write(line + "\n")


def _usage_of(task: Task) -> Usage | None:
    return getattr(task.request, "usage", None)


class Noting(IsolatedTask):
    """Notes what its hooks see."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("before_start", self, _usage_of(self), headers=sorted(self.request.headers or {}))

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note("on_success", self, _usage_of(self))

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("on_failure", self, _usage_of(self))

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("on_retry", self, _usage_of(self))

    def after_return(self, *_: Any) -> None:
        note("after_return", self, _usage_of(self))


@signals.task_success.connect
def _on_success(sender: Task, **_: Any) -> None:
    note("task_success", sender, _usage_of(sender))


@signals.task_failure.connect
def _on_failure(sender: Task, **_: Any) -> None:
    note("task_failure", sender, _usage_of(sender))


@signals.task_postrun.connect
def _on_postrun(sender: Task, **_: Any) -> None:
    note("task_postrun", sender, _usage_of(sender))


@isolated_call_finished.connect
def _on_finished(sender: Task, task_id: str | None, usage: Usage, **_: Any) -> None:
    note("isolated_call_finished", sender, usage, id=task_id)


def _touch(megabytes: int) -> None:
    held = bytearray(megabytes * MIB)
    held[::PAGE] = b"x" * len(held[::PAGE])


@app.task(base=Noting)
def touch(megabytes: int) -> int:
    """Hold this much, and give it back."""
    _touch(megabytes)
    return os.getpid()


@app.task(base=Noting, batch_size=10, batch_idle_timeout=600.0)
def touch_in_batch(megabytes: int) -> int:
    _touch(megabytes)
    return os.getpid()


@app.task(base=Noting, start_method="spawn")
def touch_in_fresh_interpreter(megabytes: int) -> int:
    _touch(megabytes)
    return os.getpid()


@app.task(base=Noting)
def have_touched(megabytes: int) -> None:
    """Have a process hold this much."""
    subprocess.run([sys.executable, "-c", TOUCH, str(megabytes)], check=True)


@app.task(base=Noting)
def fail() -> NoReturn:
    raise ValueError("no")


@app.task(base=Noting, bind=True, max_retries=1)
def again(self: Task) -> str:
    if self.request.retries:
        return "done"
    raise self.retry(countdown=0)


@app.task(base=Noting)
def leave() -> NoReturn:
    os._exit(3)


@app.task(base=Noting, memory_limit="150MiB")
def exceed() -> None:
    _touch(1000)


@app.task(base=Noting)
def spin() -> NoReturn:
    while True:
        pass


@app.task(base=Noting)
def return_long(size: int) -> bytes:
    return b"x" * size
