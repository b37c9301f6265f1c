"""Writes down what Celery tells a task and its worker: one line of JSON for each event.

Every process of a worker appends to the same file, each line in one write. So the order of the
lines is the order in which things happened.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from billiard.einfo import RemoteTraceback
from celery import current_task, signals
from celery._state import get_current_worker_task
from celery.utils.dispatch import Signal
from kombu.utils.encoding import safe_repr

#: The signals that are recorded.
SIGNALS = (
    "before_task_publish",
    "after_task_publish",
    "task_received",
    "task_prerun",
    "task_postrun",
    "task_success",
    "task_failure",
    "task_retry",
    "task_revoked",
    "task_rejected",
    "task_unknown",
    "task_internal_error",
)

_path: str | None = None
_row: str | None = None


def start(path: str) -> None:
    """Record everything that happens in this process from now on, and in those it forks."""
    global _path
    _path = path
    for name in SIGNALS:
        signal: Signal = getattr(signals, name)
        signal.connect(_receivers[name], weak=False, dispatch_uid="contract")


def read(path: str, *texts: str) -> list[dict[str, Any]]:
    """What has been recorded so far: all lines, or those that hold one of these texts."""
    with open(path) as file:
        text = file.read()
    # A line that is being written may be seen in part.
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in lines if not texts or any(text in line for text in texts)]


@contextmanager
def recording(path: str, row: str) -> Iterator[None]:
    """Record what happens in this process meanwhile, as part of a row."""
    global _path, _row
    _row = row
    start(path)
    try:
        yield
    finally:
        _path = _row = None
        for name in SIGNALS:
            getattr(signals, name).disconnect(_receivers[name], dispatch_uid="contract")


def note(*values: Any) -> None:
    """Have a body say something that both sides must say alike."""
    task = current_task._get_current_object()
    if task is not None and task.request.id is None:
        # Called as a function: by another body, by `celery.map`, or as an errback.
        task = get_current_worker_task()
    _write("note", "note", _request_of(task), values=[describe(value) for value in values])


def describe(value: Any) -> str:
    """A value as text; types are visible, and all that an exception carries."""
    return _describe_exception(value, 0) if isinstance(value, BaseException) else repr(value)


def _describe_exception(exc: BaseException, depth: int) -> str:
    cls = type(exc)
    if cls.__name__ == "RemoteTraceback":  # how billiard sends a traceback; its frames as lines
        return f"<{cls.__module__}.{cls.__qualname__}>\n{exc!s}\n"
    # Celery's, for exceptions whose own fail.
    shown = f"{safe_repr(exc)} str={_text(exc)}"
    parts = [f"<{cls.__module__}.{cls.__qualname__}> {shown} args={exc.args!r}"]
    if vars(exc):
        parts.append(f"vars={ {name: repr(value) for name, value in sorted(vars(exc).items())}!r}")
    related = {"cause": exc.__cause__, "context": exc.__context__}
    if isinstance(exc.__cause__, RemoteTraceback):
        # Billiard's, in the main process: the text of the traceback, with frames of Celery.
        del related["cause"]
    related.update({f"part {n}": one for n, one in enumerate(getattr(exc, "exceptions", ()))})
    for name, other in related.items():
        if other is not None and depth < 4:
            parts.append(f"{name}=({_describe_exception(other, depth + 1)})")
    if exc.__suppress_context__:
        parts.append("context suppressed")
    return " ".join(parts)


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as error:
        return f"(raised {error!r})"


def _write(kind: str, name: str, call: dict[str, Any], **data: Any) -> None:
    if _path is None:
        return
    line = {"kind": kind, "name": name, "pid": os.getpid(), "row": _row, **call, "data": data}
    descriptor = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def _call(id: str | None, root: str | None, task: str | None, retries: int) -> dict[str, Any]:
    return {"id": id, "root": root, "task": task, "retries": retries}


def _request_of(task: Any) -> dict[str, Any]:
    if task is None:
        return _call(None, None, None, 0)
    request = task.request
    return _call(request.id, request.root_id, task.name, request.retries or 0)


# ── signals ─────────────────────────────────────────────────────────────────────────────────────


def _on_publish(name: str, sender: Any, **kwargs: Any) -> None:
    headers = dict(kwargs.get("headers") or {})
    call = _call(headers.get("id"), headers.get("root_id"), sender, headers.get("retries") or 0)
    data: dict[str, Any] = {"headers": {key: repr(value) for key, value in headers.items()}}
    if "properties" in kwargs:  # before it is published
        properties = dict(kwargs["properties"])
        if "expiration" in properties:  # in seconds from now
            properties["expiration"] = type(properties["expiration"])
        data["properties"] = {key: repr(value) for key, value in properties.items()}
        data["body"] = repr(kwargs["body"])
    data["to"] = repr((kwargs.get("exchange"), kwargs.get("routing_key")))
    _write("signal", name, call, **data)


def _on_received(name: str, request: Any, **_: Any) -> None:
    retries = request.request_dict.get("retries") or 0
    _write("signal", name, _call(request.id, request.root_id, request.name, retries))


def _on_revoked(name: str, request: Any, **kwargs: Any) -> None:
    call = _call(
        request.id, request.root_id, getattr(request, "name", None), request.get("retries")
    )
    _write("signal", name, call, **_described(kwargs, "terminated", "signum", "expired"))


def _on_message(name: str, message: Any, **_: Any) -> None:
    headers = message.headers or {}
    call = _call(headers.get("id"), headers.get("root_id"), headers.get("task"), 0)
    _write("signal", name, call)


def _on_task(name: str, sender: Any, **kwargs: Any) -> None:
    data = _described(kwargs, "args", "kwargs", "state", "retval", "result", "reason", "exception")
    if "einfo" in kwargs:
        data["einfo"] = _einfo(kwargs["einfo"])
    if "traceback" in kwargs:
        trace = kwargs["traceback"]
        # A traceback, or its text: Celery gives both.
        data["traceback"] = trace if isinstance(trace, str) else _frames(trace)
    call = _request_of(sender)
    if "task_id" in kwargs:
        call["id"] = kwargs["task_id"]
    if name == "task_prerun":
        _wait_for_last_attempt(call["id"], call["retries"])
    _write("signal", name, call, **data)


def _wait_for_last_attempt(id: str, retries: int) -> None:
    """Wait until the attempt that has sent this one has ended.

    A retry is sent in the middle of an attempt. Where another slot is free, the two overlap, and
    it is a matter of speed which of them writes the state of the task last.
    """
    assert _path is not None
    deadline = time.monotonic() + 2.0
    while retries and time.monotonic() < deadline:
        last = [line for line in read(_path, id) if line["retries"] == retries - 1]
        last = [line for line in last if line["id"] == id]
        begun = sum(line["name"] == "task_prerun" for line in last)
        if sum(line["name"] == "task_postrun" for line in last) >= begun:
            return
        time.sleep(0.01)  # a file gives no event that all pools could wait for


def _described(kwargs: dict[str, Any], *names: str) -> dict[str, str]:
    return {name: describe(kwargs[name]) for name in names if name in kwargs}


def _frames(trace: Any) -> str:
    return "".join(traceback.format_tb(trace))


def _einfo(einfo: Any) -> Any:
    if einfo is None:
        return None
    exception = getattr(einfo.exception, "exc", einfo.exception)
    return {
        "type": einfo.type.__qualname__,
        "exception": describe(exception),
        "traceback": einfo.traceback,
        "frames": _frames(exception.__traceback__),
    }


_HANDLERS: dict[str, Callable[..., None]] = {
    "before_task_publish": _on_publish,
    "after_task_publish": _on_publish,
    "task_received": _on_received,
    "task_revoked": _on_revoked,
    "task_rejected": _on_message,
    "task_unknown": _on_message,
}


def _receiver(name: str) -> Callable[..., None]:
    handler: Callable[..., None] = _HANDLERS.get(name, _on_task)

    def receive(sender: Any = None, **kwargs: Any) -> None:
        for taken in ("signal", "name"):
            kwargs.pop(taken, None)
        handler(name, sender=sender, **kwargs)

    return receive


_receivers = {name: _receiver(name) for name in SIGNALS}


# ── hooks ───────────────────────────────────────────────────────────────────────────────────────


class Hooks:
    """Records the calls of a task's hooks."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self._record("before_start", task_id, args, kwargs)
        super().before_start(task_id, args, kwargs)  # type: ignore[misc]

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self._record("on_success", task_id, args, kwargs, value=retval)
        super().on_success(retval, task_id, args, kwargs)  # type: ignore[misc]

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self._record("on_failure", task_id, args, kwargs, value=exc, einfo=einfo)
        super().on_failure(exc, task_id, args, kwargs, einfo)  # type: ignore[misc]

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self._record("on_retry", task_id, args, kwargs, value=exc, einfo=einfo)
        super().on_retry(exc, task_id, args, kwargs, einfo)  # type: ignore[misc]

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        self._record("after_return", task_id, args, kwargs, status, value=retval, einfo=einfo)
        super().after_return(status, retval, task_id, args, kwargs, einfo)  # type: ignore[misc]

    def _record(
        self, name: str, task_id: str, *args: Any, value: Any = None, einfo: Any = None
    ) -> None:
        call = {**_request_of(self), "id": task_id}
        data = {"args": repr(args), "value": describe(value), "einfo": _einfo(einfo)}
        _write("hook", name, call, **data)
