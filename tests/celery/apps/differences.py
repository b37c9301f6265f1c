"""Tasks whose isolated and plain versions differ, as the documentation says."""

import json
import os
import threading
from typing import Any, NoReturn

from celery import Task, signals

from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.signals import isolated_process_init

app = make_app(__name__)

counter = 0


class Counting(Task):
    """Keeps things on itself, for its hooks and its body."""

    abstract = True
    told_by_hook: str | None = None
    told_by_body: str | None = None

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.told_by_hook = task_id
        self.request.told_by_hook = task_id
        super().before_start(task_id, args, kwargs)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        told = {
            "by_self": self.told_by_body == task_id,
            "by_request": getattr(self.request, "told_by_body", None) == task_id,
            "by_argument": args[1] == ["changed"],
        }
        with open(args[0], "a") as file:
            file.write(json.dumps(told) + "\n")
        super().on_success(retval, task_id, args, kwargs)


def _tell(task: Any, items: list[str]) -> dict[str, bool]:
    task_id = task.request.id
    task.told_by_body = task_id
    task.request.told_by_body = task_id
    items.append("changed")
    return {
        "by_self": task.told_by_hook == task_id,
        "by_request": getattr(task.request, "told_by_hook", None) == task_id,
    }


@app.task(base=Counting, bind=True)
def plain_tell(self: Task, path: str, items: list[str]) -> dict[str, bool]:
    return _tell(self, items)


class IsolatedCounting(Counting, IsolatedTask):
    abstract = True


@app.task(base=IsolatedCounting, bind=True)
def tell(self: Task, path: str, items: list[str]) -> dict[str, bool]:
    return _tell(self, items)


def _count() -> int:
    global counter
    counter += 1
    return counter


@app.task
def plain_count() -> int:
    return _count()


@app.task(base=IsolatedTask)
def count() -> int:
    return _count()


def _fail() -> NoReturn:
    local = "a local variable"
    raise LookupError(local[:1])


@app.task
def plain_fail() -> NoReturn:
    _fail()


@app.task(base=IsolatedTask)
def fail() -> NoReturn:
    _fail()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@app.task
def plain_is_main_thread() -> bool:
    return _is_main_thread()


@app.task(base=IsolatedTask)
def is_main_thread() -> bool:
    return _is_main_thread()


@isolated_process_init.connect
def _start_thread(**_: Any) -> None:
    # For ever: it is a daemon, as those are that have a process of their own to look after.
    threading.Thread(target=threading.Event().wait, name="the service", daemon=True).start()


@app.task(base=IsolatedTask, batch_size=3)
def threads_in_batch(start: str | None = None) -> tuple[int, list[str]]:
    if start is not None:
        threading.Thread(target=threading.Event().wait, name=start, daemon=True).start()
    return os.getpid(), sorted(thread.name for thread in threading.enumerate())


@signals.task_failure.connect
def _note_locals(sender: Task, traceback: Any, **_: Any) -> None:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    if isinstance(traceback.tb_frame.f_code.co_name, str):
        path = os.environ["TEST_LOCALS"]
        with open(path, "a") as file:
            names = sorted(traceback.tb_frame.f_locals)
            file.write(json.dumps([sender.name, traceback.tb_frame.f_code.co_name, names]) + "\n")
