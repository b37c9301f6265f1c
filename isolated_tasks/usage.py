"""Where one finds what a call used: in the log, in a signal, on the request, in an event.

It becomes known in the slot, when the call is over. There the task's own hooks and Celery's signals
see it as ``request.usage``, and the line that Celery logs about the task shows it. With the result
it goes on to the main process, which sends our signal and the event: there is one of it, so what is
counted there is counted once, in every pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery.app import trace
from celery.exceptions import Ignore, Reject, Retry

from isolated_tasks import signals
from isolated_tasks.process.usage import ExitReason, Usage

if TYPE_CHECKING:
    from isolated_tasks.request import RequestMixin
    from isolated_tasks.task import IsolatedMixin

__all__ = ["ExitReason", "Usage", "fields", "finished", "handed_on", "summary", "traced"]

#: The event that tells what a call used, and what `fields` gives for it.
EVENT = "task-isolated"

#: Where the message that this context works on has its usage put: the task's id first.
_usages: ContextVar[tuple[str, list[Usage]] | None] = ContextVar("isolated_usages", default=None)


# ── in the slot ─────────────────────────────────────────────────────────────────────────────────


def traced(function: Callable[..., tuple[Any, ...]], name: str, task_id: str, *args: Any) -> Any:
    """Trace a message as Celery does, and hand on what its call used.

    Returns:
        What ``function`` returns, and a `Usage` or None behind it.
    """
    usages: list[Usage] = []
    token = _usages.set((task_id, usages))
    try:
        result = function(name, task_id, *args)
    finally:
        _usages.reset(token)
    return (*result, usages[-1] if usages else None)


def finished(task: IsolatedMixin, task_id: str | None, request: Any, usage: Usage) -> None:
    """A call is over.

    Args:
        task: Whose it was.
        task_id: The message's; None for an errback in the main process.
        request: Of the message, where the call was made for one; None for a direct call.
        usage: What the call used.
    """
    if request is not None:
        request.usage = usage
        here = _usages.get()
        if here is not None and here[0] == task_id:
            here[1].append(usage)
            return
    # Nobody waits for it elsewhere: an item of a map, an errback, `apply()` outside a worker.
    _send(task, task_id, usage)


def _send(task: Any, task_id: str | None, usage: Usage) -> None:
    signals.isolated_call_finished.send(sender=task, task_id=task_id, usage=usage)


# ── in the main process ─────────────────────────────────────────────────────────────────────────


def handed_on(request: RequestMixin, callback: Callable[..., Any]) -> Callable[..., Any]:
    """What a pool is to call with what `traced` returns, for what it would call without that.

    It sends the signal and the event, around what Celery does about the result. Who follows the
    events takes what follows ``task-`` for a state of the task, unless one that is final is known
    (celery/events/state.py, ``Task.event``). So the event comes after success and failure, before a
    retry, and not at all where Celery itself says nothing of the end.
    """

    def on_result(result: Any, *arguments: Any, **keywords: Any) -> Any:
        *celery_s, usage = result
        failed, value, *_ = celery_s
        error = getattr(value, "exception", None) if failed else None
        is_retry = isinstance(error, Retry)
        is_silent = request._is_stopped or isinstance(error, Ignore | Reject)
        if usage is not None:
            _send(request.task, request.id, usage)
            if is_retry:
                request.send_event(EVENT, **fields(usage))
        answer = callback(tuple(celery_s), *arguments, **keywords)
        if usage is not None and not is_retry and not is_silent:
            request.send_event(EVENT, **fields(usage))
        return answer

    return on_result


def fields(usage: Usage) -> dict[str, Any]:
    """A `Usage` as plain data, for an event; ``pid`` is ``child_pid``: events have one already."""
    # Not dataclasses.asdict, which copies the values too, and takes its time.
    values = dict(vars(usage))
    values["exit_reason"] = str(usage.exit_reason)
    values["child_pid"] = values.pop("pid")
    return values


# ── in the log ──────────────────────────────────────────────────────────────────────────────────

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(size: int) -> str:
    """A number of bytes for people: ``"1.4 GiB"``."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.{1 if value < 10 and unit else 0}f} {_UNITS[unit]}"


def summary(usage: Usage) -> str:
    """What a call used, for a line of the log: ``"peak 1.4 GiB, cpu 2.9s, pid 4711"``."""
    parts = []
    if usage.tree_peak_bytes is not None:
        parts.append(f"peak {size_text(usage.tree_peak_bytes)}")
    if usage.cpu_seconds is not None:
        parts.append(f"cpu {usage.cpu_seconds:.2g}s")
    if usage.pid is not None:
        parts.append(f"pid {usage.pid}")
    if usage.profile_path is not None:
        parts.append(f"profile {usage.profile_path}")
    return ", ".join(parts)


def _show(record: logging.LogRecord) -> bool:
    """Say in the line that Celery logs about the end of a task what its call used."""
    here = _usages.get()
    if here is None or not here[1] or not isinstance(record.args, dict):
        return True
    if record.args.get("id") != here[0] or hasattr(record, "usage"):
        return True
    usage = here[1][-1]
    vars(record)["usage"] = usage
    shown = summary(usage).replace("%", "%%")
    if record.msg == trace.LOG_SUCCESS:
        record.msg = record.msg.replace("%(runtime)ss", f"%(runtime)ss, {shown}")
    else:
        # "… raised unexpected: …", "… retry: …": at the end, for who searches logs for these.
        record.msg = f"{record.msg} ({shown})"
    return True


trace.logger.addFilter(_show)
