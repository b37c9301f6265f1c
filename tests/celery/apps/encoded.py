"""Tasks whose results are encoded by Celery's JSON, and not pickled."""

import datetime
import os
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore, Reject, Retry

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)
app.conf.isolated_result_serializer = "json"
app.conf.isolated_soft_memory_limit = None


class LocalError(Exception):
    """Of a class that pickles."""


@app.task(base=IsolatedTask)
def give_back(value: Any) -> dict[str, Any]:
    return {"value": value, "pid": os.getpid(), "at": datetime.date(2020, 1, 2)}


@app.task(base=IsolatedTask)
def give_what_json_has_not() -> object:
    return object()


@app.task(base=IsolatedTask, ignore_result=True)
def ignore_what_json_has_not() -> object:
    return object()


@app.task(base=IsolatedTask)
def fail(text: str) -> NoReturn:
    raise LocalError(text)


@app.task(base=IsolatedTask, bind=True, max_retries=3, default_retry_delay=0)
def retry(self: Task) -> int:
    if self.request.retries < 2:
        raise self.retry(exc=LocalError("not yet"))
    return int(self.request.retries)


@app.task(base=IsolatedTask, autoretry_for=(LocalError,), max_retries=1, default_retry_delay=0)
def retry_by_itself() -> NoReturn:
    raise LocalError("never")


@app.task(base=IsolatedTask, bind=True)
def control(self: Task, how: str) -> NoReturn:
    self.update_state(state="CUSTOM", meta={"how": how})
    if how == "ignore":
        raise Ignore("as you like")
    if how == "reject":
        raise Reject("no", requeue=False)
    raise Retry("by hand", when=3)


@app.task(base=IsolatedTask, bind=True)
def launch(self: Task) -> list[str]:
    return [give_back.delay(number).id for number in range(2)]


@app.task(base=IsolatedTask, soft_time_limit=0.3)
def take_too_long() -> NoReturn:
    bodies.wait_for_signals()


@app.task(base=IsolatedTask)
def run_out_of_memory() -> NoReturn:
    raise MemoryError("all gone")


@app.task(base=IsolatedTask)
def send_pickle(path: str) -> NoReturn:
    import pickle

    bodies.send_outcome(pickle.dumps(bodies.Toucher(path)))
