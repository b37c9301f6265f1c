"""Tasks around which code keeps context: in the slot by handlers, in the child by the hook."""

import decimal
import threading
from contextvars import ContextVar
from typing import Any

from celery.signals import task_prerun

from harness.app import make_app
from isolated_tasks import IsolatedTask
from isolated_tasks.signals import before_isolated_call, isolated_postrun, isolated_prerun

app = make_app(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="none")
details: ContextVar[dict[str, Any]] = ContextVar("details")
unpicklable: ContextVar[Any] = ContextVar("unpicklable")


class Tenant:
    """A library's way of hiding its variable."""

    current: ContextVar[str] = ContextVar("tenant")

    def __init__(self, name: str) -> None:
        self.name = name


tenant: ContextVar[Tenant] = ContextVar("tenant")
#: Set by bodies alone.
set_by_body: ContextVar[str] = ContextVar("set_by_body", default="nobody")

#: What the hook brings, and what of it was there when the body was over.
brought: dict[str, Any] = {}
afterwards: list[dict[str, Any]] = []


@task_prerun.connect
def put_in_place(kwargs: dict[str, Any], **_: Any) -> None:
    if "user" not in kwargs:
        return
    name = kwargs["user"]
    request_id.set(f"request {name}")
    details.set({"user": name, "roles": ["reader"]})
    Tenant.current.set(f"tenant {name}")
    tenant.set(Tenant(name))
    unpicklable.set(threading.Lock())
    decimal.getcontext().prec = 5


@before_isolated_call.connect
def hand_over(sender: Any, task_id: str, carried: dict[str, Any], **_: Any) -> None:
    if sender.name.endswith("hooked"):
        carried["token"] = {"of": task_id, "task": sender.name}
        carried["lock"] = threading.Lock()


@isolated_prerun.connect
def take_over(task_id: str, args: Any, carried: dict[str, Any], **_: Any) -> None:
    brought.clear()
    brought.update(carried, prerun=[task_id, list(args)])


@isolated_postrun.connect
def look_back(sender: Any, carried: dict[str, Any], **_: Any) -> None:
    afterwards.append({"task": sender.name, "token": carried.get("token")})


def seen() -> dict[str, Any]:
    return {
        "request_id": request_id.get(),
        "details": details.get({}),
        "class attribute": Tenant.current.get(None),
        "object": getattr(tenant.get(None), "name", None),
        "decimal": str(decimal.Decimal(1) / 3),
        "set by a body": set_by_body.get(),
    }


@app.task(base=IsolatedTask)
def look(user: str | None = None) -> dict[str, Any]:
    return seen()


@app.task(base=IsolatedTask, start_method="spawn")
def look_in_fresh_interpreter(user: str | None = None) -> dict[str, Any]:
    return seen()


@app.task
def plain_look(user: str | None = None) -> dict[str, Any]:
    return seen()


@app.task(base=IsolatedTask)
def has_unpicklable(user: str) -> bool:
    return unpicklable.get(None) is not None


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def set_and_look(value: str, **kwargs: Any) -> dict[str, Any]:
    before = seen()
    set_by_body.set(value)
    request_id.set(value)
    return before


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def hooked(number: int) -> dict[str, Any]:
    return {**brought, "earlier": list(afterwards)}
