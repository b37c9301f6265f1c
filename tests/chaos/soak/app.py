"""The Celery app of the workers: a task for each kind and promise, and notes in the ledger.

Imported by main processes, pool processes, forkservers and children.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from celery import Task, signals
from kombu.message import Message

from harness.app import make_app
from isolated_tasks import IsolatedTask
from soak.kinds import KINDS, PLAIN_VARIABLE, PROMISES, Kind
from soak.ledger import note

IS_PLAIN = PLAIN_VARIABLE in os.environ

app = make_app(__name__)

#: The name of this process's worker, in the main process and in pool processes.
worker: str | None = None
#: Bodies that this process has begun.
begun = 0


def register(kind: Kind, promise: str) -> None:
    def body(self: Any, *args: Any) -> Any:
        global begun
        begun += 1
        request = self.request
        note("begin", id=request.id, worker=request.hostname, pid=os.getpid(), nth=begun)
        value = kind.body(self, *args)
        note("end", id=request.id, worker=request.hostname, pid=os.getpid())
        return value

    options = {**kind.options, **PROMISES[promise]}
    base = Task if IS_PLAIN else IsolatedTask
    app.task(base=base, bind=True, name=f"{kind.name}.{promise}", **options)(body)


for one in KINDS.values():
    for promise in PROMISES:
        register(one, promise)


# ── what Celery says ────────────────────────────────────────────────────────────────────────────


@signals.celeryd_init.connect
def begin_worker(sender: str, **_: Any) -> None:
    """In the main process, before anything is forked."""
    global worker
    worker = sender
    noted(Message, "ack", "ack")
    noted(Message, "reject", "reject")
    noted(Message, "requeue", "reject")


def noted(cls: type, method: str, event: str) -> None:
    """Have a method of messages note its beginning and its end.

    Between the two the broker may or may not have heard of it.
    """
    original: Callable[..., Any] = getattr(cls, method)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        values: dict[str, Any] = {
            "id": (self.headers or {}).get("id"),
            "worker": worker,
            "requeue": method == "requeue" or bool(kwargs.get("requeue", False)),
        }
        if values["id"] is None:  # remote control
            return original(self, *args, **kwargs)
        note(f"{event}ing", **values)
        result = original(self, *args, **kwargs)
        note(f"{event}ed", **values)
        return result

    setattr(cls, method, wrapper)


@signals.worker_ready.connect
def ready(**_: Any) -> None:
    path = os.environ.get("ISOLATED_TASKS_ADDRESS", "").partition(":")[2]
    note("ready", worker=worker, pid=os.getpid(), folder=os.path.dirname(path))


@signals.task_received.connect
def received(request: Any, **_: Any) -> None:
    note("received", id=request.id, worker=worker)


@signals.task_prerun.connect
def prerun(task_id: str, **_: Any) -> None:
    note("slot", id=task_id, worker=worker, pid=os.getpid())


@signals.task_success.connect
def success(sender: Any, **_: Any) -> None:
    verdict(sender.request.id, "SUCCESS")


@signals.task_failure.connect
def failure(task_id: str, exception: BaseException, **_: Any) -> None:
    verdict(task_id, "FAILURE", error=type(exception).__name__, text=str(exception)[:300])


@signals.task_revoked.connect
def revoked(request: Any, **_: Any) -> None:
    verdict(request.id, "REVOKED")


def verdict(task_id: str, state: str, **values: Any) -> None:
    note("verdict", id=task_id, worker=worker, pid=os.getpid(), state=state, **values)


@signals.after_task_publish.connect
def published(sender: str, headers: dict[str, Any] | None = None, **_: Any) -> None:
    """By a slot or by a body; a client does not import this module."""
    assert headers is not None
    note("published", id=headers["id"], name=sender, parent=headers["parent_id"])
