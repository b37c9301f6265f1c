"""What a call fails with: retried, given back to the broker, or raised; and as which error."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NoReturn

from celery.app.autoretry import add_autoretry_behaviour
from celery.exceptions import Reject, TimeLimitExceeded

from isolated_tasks import losses, settings
from isolated_tasks.errors import (
    ChildLostError,
    IsolationError,
    OpenFilesLimitExceeded,
    OutOfMemoryError,
    RemoteError,
    SoftMemoryLimitExceeded,
)

if TYPE_CHECKING:
    from isolated_tasks.calls import Message
    from isolated_tasks.process.options import ProcessOptions
    from isolated_tasks.task import IsolatedMixin

__all__ = ["raisable", "raise_or_retry", "refuse_poison"]

#: What stands for an exception of the body.
_STAND_INS = (OutOfMemoryError, SoftMemoryLimitExceeded, OpenFilesLimitExceeded, RemoteError)


def raise_or_retry(
    task: IsolatedMixin, error: Exception, message: Message | None, *, is_body_s: bool = False
) -> NoReturn:
    """Raise what the call failed with, or retry or give back the call where the task says so.

    Args:
        task: Whose call it was.
        error: What it failed with.
        message: What it was made for.
        is_body_s: The body has raised it: a child lost is not this call's, but one that it asked.
    """
    # A direct call has no message to give back, nor has one outside a worker (`isolated_eager`).
    if message is not None and message.request.is_eager:
        message = None
    if isinstance(error, ChildLostError) and message is not None and not is_body_s:
        if getattr(task, "retry_on_worker_lost", None):
            # Celery 5.7's option; its `retry` raises the error itself after the last try.
            raise task.retry(exc=error)
        if task.acks_late and task.reject_on_worker_lost and error.history is None:
            error = _give_back(task, error, message)
    if isinstance(error, IsolationError | TimeLimitExceeded) and _may_autoretry(task, error):
        _Failing(task, error).run()
    raise error


def refuse_poison(task: IsolatedMixin, message: Message) -> None:
    """Do not try again what has cost enough children.

    Raises:
        ChildLostError: It has; nothing is run.
    """
    if message.request.is_eager or not (task.acks_late and task.reject_on_worker_lost):
        return
    history = losses.history(task, message.request, message.losses)
    limit = settings.worker_settings(task.app).max_redeliveries
    if history and len(history) >= limit:
        raise ChildLostError(
            f"task {task.name!r}[{message.request.id}] is not tried again: it has lost "
            f"{len(history)} children (isolated_max_redeliveries={limit}):\n" + _listed(history),
            {
                "task": task.name,
                "task_id": message.request.id,
                "started": False,
                "history": history,
                "redeliveries": len(history),
                "crash_traceback": "",
                "stderr": "",
            },
        )


def _give_back(task: IsolatedMixin, error: ChildLostError, message: Message) -> ChildLostError:
    """Do what Celery does for a lost pool process: have the broker deliver the message again.

    Nothing is stored, and nobody is called.

    Returns:
        The error to fail with, once that has been done often enough.
    """
    history = losses.history(task, message.request, message.losses)
    limit = settings.worker_settings(task.app).max_redeliveries
    count = max(len(history), losses.deliveries(message.request))
    if count < limit:
        losses.add(task, message.request, history, losses.describe(error))
        # It says all that there is to say; its chain would be our own frames.
        raise Reject(error, requeue=True) from None
    text, data = error.args
    times = f"{count} time{'' if count == 1 else 's'}"
    return ChildLostError(
        f"{text}\nIts message was given back to the broker {times} before "
        f"(isolated_max_redeliveries={limit})" + (f":\n{_listed(history)}" if history else ""),
        {**data, "history": history, "redeliveries": count},
    )


def _listed(history: list[str]) -> str:
    return "\n".join(f"{number}. {loss}" for number, loss in enumerate(history, 1))


def _may_autoretry(task: IsolatedMixin, error: Exception) -> bool:
    """Whether ``autoretry_for`` is still to be asked.

    It wraps the body, in the child, and has not seen what failed outside. What stands for an
    exception of the body it has seen, so then only a class of ours is meant. And a hard time limit
    is one of which Celery does not ask it, so it has to be named.
    """
    if type(error) not in _STAND_INS and not isinstance(error, TimeLimitExceeded):
        return True
    named = (IsolationError, TimeLimitExceeded)
    return any(issubclass(cls, named) for cls in getattr(task, "autoretry_for", ()))


class _Failing:
    """A task whose body fails: Celery's own code for ``autoretry_for`` wraps its ``run``."""

    def __init__(self, task: IsolatedMixin, error: Exception) -> None:
        self._task = task
        self._error = error
        add_autoretry_behaviour(self)

    def run(self) -> NoReturn:
        raise self._error

    def __getattr__(self, name: str) -> Any:
        if name == "_orig_run":  # what tells that it is wrapped already
            raise AttributeError(name)
        return getattr(self._task, name)


def raisable(exc: BaseException, options: ProcessOptions) -> Exception:
    """The body's exception, or an error of ours where Celery would take it for something else.

    Or where one of our limits is behind it.
    """
    error: Exception | None = None
    if isinstance(exc, MemoryError):
        error = _out_of_memory(exc, options)
    elif isinstance(exc, OSError) and exc.errno == errno.EMFILE and options.max_open_files:
        limit = options.max_open_files
        error = OpenFilesLimitExceeded(
            f"task {options.name!r}: the body had as many files open as max_open_files={limit} "
            f"lets it: {exc!r}. Raise the limit, or close what it opens.",
            {"task": options.name, "limit": limit},
        )
    if error is not None:
        error.__cause__ = exc
        return error.with_traceback(exc.__traceback__)
    if not isinstance(exc, Exception):
        name = f"{type(exc).__module__}.{type(exc).__qualname__}"
        error = RemoteError(f"the body raised {exc!r}", {"type_name": name, "text": str(exc)})
        return error.with_traceback(exc.__traceback__)
    return exc


def _out_of_memory(exc: MemoryError, options: ProcessOptions) -> OutOfMemoryError:
    limit = options.soft_memory_limit_bytes
    if limit is None:
        return OutOfMemoryError(
            f"task {options.name!r}: the body ran out of memory: {exc!r}. It asked for more than "
            "the system gives; the traceback says where."
        )
    return SoftMemoryLimitExceeded(
        f"task {options.name!r}: the body ran out of memory: {exc!r}; "
        f"soft_memory_limit={limit} bytes. Raise the limit, or have the body need less where the "
        "traceback ends.",
        {"task": options.name, "limit": limit},
    )
