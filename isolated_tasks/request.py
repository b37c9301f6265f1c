"""What the worker's main process does about an isolated call: limits, revocation, acknowledgement.

Celery makes a `Request` for each message. Its limits are the pool's to keep, and a revoked call is
the pool's to end: prefork kills the pool process, gevent and eventlet throw into a greenlet, which
no C code notices, threads and solo do nothing. Here both are taken from the pool and given to the
supervisor of the call's child, in every pool alike.

What the slot has to know goes along in a copy of the message's properties, which Celery hands on
and never sends again: ``request.headers`` and whatever else it does send again stay free of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import Reject
from celery.worker.request import Request
from celery.worker.state import task_ready

from isolated_tasks import losses, requester, settings, usage
from isolated_tasks.errors import ChildLostError

__all__ = ["IsolatedRequest", "RequestMixin"]


class RequestMixin:
    """For a task's own request class: ``class MyRequest(RequestMixin, Request)``."""

    if TYPE_CHECKING:
        id: str
        task: Any
        request_dict: Any
        time_limits: tuple[float | None, float | None]
        _apply_result: Any
        _already_cancelled: bool
        _already_revoked: bool
        send_event: Callable[..., None]

    _call_id: str | None = None
    #: The call is being stopped; what Celery marks such a request with comes after that.
    _is_stopped = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Take back what Celery overrides.

        ``celery.worker.request.create_request_cls`` derives a class from the task's for each task,
        with an ``execute_using_pool`` of its own that is a copy of the original, bound to a pool.
        """
        super().__init_subclass__(**keywords)
        if cls.__module__ == "celery.worker.request" and "execute_using_pool" in vars(cls):
            cls._celery_execute_using_pool = vars(cls)["execute_using_pool"]  # type: ignore[method-assign]
            del cls.execute_using_pool

    def _celery_execute_using_pool(self, pool: Any, **keywords: Any) -> Any:
        return super().execute_using_pool(pool, **keywords)  # type: ignore[misc]

    def execute_using_pool(self, pool: Any, **keywords: Any) -> Any:
        """Have the pool run the task, without the limits that are kept for it elsewhere."""
        if not settings.is_isolated(self.task):
            return self._celery_execute_using_pool(pool, **keywords)
        self._call_id = f"{self.id}/{os.urandom(4).hex()}"
        hard, soft = self.time_limits
        properties = {
            "call_id": self._call_id,
            "time_limit": hard or self.task.time_limit or _default(pool, "timeout"),
            "soft_time_limit": soft or self.task.soft_time_limit or _default(pool, "soft_timeout"),
            "losses": losses.kept(self.id, self._retries),
        }
        result = super().execute_using_pool(_Pool(pool, self, properties), **keywords)  # type: ignore[misc]
        # What a termination would be told to: the pool process is to live.
        self._apply_result = None
        return result

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Stop the call's child, and nothing else: ``revoke(terminate=True)``."""
        super().terminate(self._stopping(pool, "revoked"), signal)  # type: ignore[misc]

    def cancel(self, pool: Any, signal: Any = None, **keywords: Any) -> None:
        """Stop the call's child, and nothing else: a cold shutdown."""
        super().cancel(self._stopping(pool, "cancelled", keeps_outcome=True), signal, **keywords)  # type: ignore[misc]

    def acknowledge(self) -> None:
        """Acknowledge the message, if nobody has and nobody is about to; see `_settle`."""
        self._settle(super().acknowledge)  # type: ignore[misc]

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, if nobody has and nobody is about to; see `_settle`."""
        self._settle(lambda: super(RequestMixin, self).reject(requeue))  # type: ignore[misc]

    def on_failure(self, exc_info: Any, *arguments: Any, **keywords: Any) -> Any:
        """Take note of how the call has failed.

        One that was stopped ends as `Ignore`, which would acknowledge a cancelled one's message.
        """
        if self._call_id is not None:
            if self._is_stopped or self._already_cancelled or self._already_revoked:
                task_ready(self)
                return None
            self._keep_loss(exc_info.exception)
        return super().on_failure(exc_info, *arguments, **keywords)  # type: ignore[misc]

    def _settle(self, settle: Callable[[], None]) -> None:
        """Tell the broker about the message once.

        A call may end as it is revoked, and where its slot is a thread or a greenlet that is said
        by one while the other says that it was revoked. Celery looks and marks in two steps; a
        message that is acknowledged twice is an error in the event loop, of which the worker ends.
        """
        # Both are one step, which no thread and no greenlet can come between.
        turn = self.__dict__.setdefault("_turn", [None])
        try:
            turn.pop()
        except IndexError:
            return
        try:
            settle()
        except BaseException:
            turn.append(None)
            raise

    @property
    def _retries(self) -> int:
        return int(self.request_dict.get("retries") or 0)

    def _stopping(self, pool: Any, reason: str, *, keeps_outcome: bool = False) -> Any:
        return pool if self._call_id is None else _Stopping(self, reason, keeps_outcome)

    def _keep_loss(self, exc: BaseException) -> None:
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if isinstance(exc, Reject) and exc.requeue and isinstance(exc.reason, ChildLostError):
            losses.note_kept(self.id, self._retries, losses.describe(exc.reason))


class IsolatedRequest(RequestMixin, Request):
    """The request of an isolated task, in the worker's main process."""


class _Pool:
    """A pool as `Request.execute_using_pool` sees it."""

    def __init__(self, pool: Any, request: RequestMixin, properties: dict[str, Any]) -> None:
        self._pool = pool
        self._request = request
        self._properties = properties

    def apply_async(self, target: Any, args: Any, **options: Any) -> Any:
        name, task_id, request, *others = args
        properties = {
            **(request.get("properties") or {}),
            requester.PROPERTY: self._properties,
        }
        # 0 and not None, for which gevent's would take its own.
        options["timeout"] = options["soft_timeout"] = 0
        args = (target, name, task_id, {**request, "properties": properties}, *others)
        options["callback"] = usage.handed_on(self._request, options["callback"])
        with _without_limits(getattr(self._pool, "_pool", None)):
            return self._pool.apply_async(usage.traced, args=args, **options)


class _Stopping:
    """A pool as `Request.terminate` and `Request.cancel` see it."""

    def __init__(self, request: RequestMixin, reason: str, keeps_outcome: bool) -> None:
        self._request = request
        self._reason = reason
        self._keeps_outcome = keeps_outcome

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        request = self._request
        assert request._call_id is not None
        assert signal is not None
        # Before: where the slot is a thread, the call may have ended when this returns.
        request._is_stopped = True
        requester.stop_call(
            request.task.app,
            request._call_id,
            signal,
            self._reason,
            keeps_outcome=self._keeps_outcome,
        )


@contextlib.contextmanager
def _without_limits(pool: Any) -> Iterator[None]:
    """Have billiard's pool put none of its own limits in place of none."""
    hidden = {
        name: value
        for name in ("timeout", "soft_timeout")
        if (value := getattr(pool, "__dict__", {}).get(name))
    }
    for name in hidden:
        setattr(pool, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(pool, name, value)


def _default(pool: Any, option: str) -> float | None:
    """What the pool was told for every task: ``--time-limit``, ``task_time_limit``."""
    value: float | None = getattr(pool, "options", {}).get(option)
    return value or None
