"""IsolatedTask: decides who runs a call, and where."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from celery import _state
from celery.app.task import Context, Task
from celery.backends.base import Backend
from celery.utils.imports import symbol_by_name

from isolated_tasks import django, requester, settings
from isolated_tasks.calls import MAPPERS, isolate
from isolated_tasks.errors import OptionError
from isolated_tasks.process import child
from isolated_tasks.process.options import StartMethod
from isolated_tasks.process.outcome import Failure

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["IsolatedMixin", "IsolatedTask"]

#: Between Celery's code for errbacks and our decision: ``Signature.__call__``, and wrappers.
_ERRBACK_DEPTH = 8


class IsolatedMixin:
    """What makes a Celery task run its body in a short-lived process.

    For combining with another base class: ``class MyTask(IsolatedMixin, app.Task)``. A
    ``__call__`` of a base or of a subclass (an app context of Flask, a session) is called in the
    child, around the body.

    A call runs in a child if a worker makes it: for a message, for one item of ``map``,
    ``starmap`` and ``chunks``, or as an errback. It runs in place, as `celery.Task` would run it,
    if the task is called as a plain function, by a task inside a child, or through ``apply()`` and
    ``task_always_eager`` (unless ``isolated_eager`` is set).

    Options are attributes, so that Celery's own ways of setting them work:
    ``@app.task(base=IsolatedTask, batch_size=20)``, a subclass, ``task_annotations``. One that is
    None takes its default from ``app.conf``, under ``isolated_<option>``.
    """

    #: False runs the body in the worker, as `celery.Task` does. Default: ``isolated_enabled``,
    #: else True.
    isolated: bool | None = None
    #: Calls that one process serves before it exits. Default: 1.
    batch_size: int | None = None
    #: A batch process waits this long for its next call, in seconds. Default: 5.
    batch_idle_timeout: float | None = None
    #: A batch process that holds more resident memory after a call is not used again: bytes, or a
    #: string such as ``"512MiB"``. Default: no limit.
    batch_memory_limit: int | str | None = None
    #: The process and its descendants may hold this much memory: bytes, or a string such as
    #: ``"2GiB"``. Beyond it they are killed, and the call fails with `MemoryLimitExceeded`. A
    #: sequence of rising limits is a ladder: a call that was killed is retried by itself with the
    #: next. A step may be a pair of a limit and the name of a queue, where that attempt is sent.
    #: Default: no limit.
    memory_limit: int | str | Sequence[Any] | None = None
    #: Beyond this the body gets a ``MemoryError``: bytes, or a string. Default: no limit.
    soft_memory_limit: int | str | None = None
    #: CPU time of the process for one call, in whole seconds. Default: no limit.
    cpu_time_limit: int | None = None
    #: Added to the niceness of the process, 0 to 19. Default: 0.
    nice: int | None = None
    #: Descriptors that the process may have open during a call. Default: as many as the worker.
    max_open_files: int | None = None
    #: Processes that a body leaves, daemons say, live on when its own has exited. Default: False.
    keep_children: bool | None = None
    #: A result may have this many bytes, pickled; a larger one fails the call: bytes, or a string.
    #: Default: 2 GiB.
    max_result_bytes: int | str | None = None
    #: The name of one of Celery's serializers, ``"json"`` say: then nothing that a body sends is
    #: unpickled in the worker, and exceptions come as `RemoteError`. Default: results are pickled.
    result_serializer: str | None = None
    #: ``"forkserver"``, a fork of the preloaded process, or ``"spawn"``, a fresh interpreter for
    #: every process. Default: ``"forkserver"``.
    start_method: StartMethod | None = None
    #: Variables to set in the environment of the process. Default: none.
    env: Mapping[str, str] | None = None
    #: Have a file written that shows which lines of a body took how much memory: ``"memray"``,
    #: which has to be installed (the extra ``profile``), or ``"tracemalloc"``. One call alone is
    #: profiled by a header of its message, ``apply_async(headers={"isolated_profile": "memray"})``.
    #: A profile that cannot be made is a warning, and the call runs without it. Default: none.
    profile: Literal["memray", "tracemalloc"] | None = None
    #: One call in so many is profiled, at random: lots are drawn for each. Default: 1, each call.
    profile_every: int | None = None
    #: Where profiles go: the absolute path of a directory, which has to be there. Default:
    #: ``isolated_tasks-profiles-<uid>`` in the system's temporary directory, made if need be for
    #: this user alone (0700).
    profile_directory: str | os.PathLike[str] | None = None

    #: What the main process makes of a message.
    Request: Any = "isolated_tasks.request:IsolatedRequest"

    if TYPE_CHECKING:
        name: str
        app: Celery
        backend: Any
        request_stack: Any
        run: Callable[..., Any]
        retry: Callable[..., Exception]
        signature_from_request: Callable[..., Any]
        acks_late: bool
        reject_on_worker_lost: bool

    #: The ``__call__`` of a subclass or of a base before this class, with the decision in front.
    _around_body: Callable[..., Any] | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Have a ``__call__`` that would come before ours run in the child, around the body.

        Raises:
            TypeError: Celery's own class comes first among the bases, so nothing would be isolated.
        """
        super().__init_subclass__(**keywords)
        if Task in cls.__mro__ and cls.__mro__.index(Task) < cls.__mro__.index(IsolatedMixin):
            raise TypeError(f"{cls.__name__}: IsolatedMixin must come before other base classes")
        own = next(vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base))
        if own is not IsolatedMixin.__call__ and not hasattr(own, "_isolated_tasks_decides"):
            cls._around_body = cls.__call__ = _decided(own)  # type: ignore[method-assign]

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Add the worker's bootstep to the app, and check the options of the task."""
        super().on_bound(app)  # type: ignore[misc]
        # By its name, and as often as one likes: it is a set.
        app.steps["worker"].add("isolated_tasks.worker:IsolationStep")
        app.steps["worker"].add("isolated_tasks.audit:MemoryAuditStep")
        _refuse_batches(cls)
        django.add_on_commit(cls, app)
        if cls.Request != IsolatedMixin.Request:
            cls.Request = _our_request(cls.Request)
        if cls.name:
            settings.check_names(cls)
            settings.check_task(cls)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task; see the class for where.

        Raises:
            Exception: What the body raised.
            IsolationError: The call could not be made, or has lost its child.
        """
        in_place = functools.partial(self._run_in_place, self.request_stack.top)
        return _decide(self, in_place, args, kwargs)

    def callable_in_child(self) -> Callable[..., Any]:
        """What Celery's tracer would call, in the worker, if the task were not isolated.

        A ``__call__`` of somebody's own goes around the body, so it is called where the body is.
        """
        # Not type(self).__call__: a wrapper that is put there later (task_annotations, Sentry's
        # integration) has been called in the slot already.
        around: Any = super().__call__  # type: ignore[misc]
        own = type(self)._around_body
        if own is not None:
            around = functools.partial(own, self)
        elif around.__func__ is Task.__call__:
            return self.run
        # It ends in Celery's own, which runs the body on the stacks that are there, once.
        self.request_stack.top._protected = 0
        return around  # type: ignore[no-any-return]

    def _run_in_place(self, request: Context | None, *args: Any, **kwargs: Any) -> Any:
        around = super().__call__  # type: ignore[misc]
        if around.__func__ is Task.__call__ and _is_traced(self, request):
            # Celery's tracer calls the body itself, not __call__, where nobody has overridden
            # that. __call__ would push a second request, and subtasks would be its children.
            request._protected = 1  # type: ignore[union-attr]
            return self.run(*args, **kwargs)
        return around(*args, **kwargs)


class IsolatedTask(IsolatedMixin, Task):
    """A Celery task whose body runs in a short-lived process: ``@app.task(base=IsolatedTask)``.

    See `IsolatedMixin` for when it does, and for the options.
    """

    abstract = True


# ── where a call runs ───────────────────────────────────────────────────────────────────────────


def _decided(own: Callable[..., Any]) -> Callable[..., Any]:
    """A ``__call__`` of somebody's own, with our decision in front of it."""

    @functools.wraps(own)
    def __call__(self: IsolatedMixin, *args: Any, **kwargs: Any) -> Any:
        return _decide(self, functools.partial(own, self), args, kwargs)

    __call__._isolated_tasks_decides = True  # type: ignore[attr-defined]
    return __call__


def _decide(
    task: IsolatedMixin,
    in_place: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if child.is_child() or not settings.is_isolated(task):
        return in_place(*args, **kwargs)
    request = task.request_stack.top
    if _is_traced(task, request):
        if request.is_eager and not settings.worker_settings(task.app).eager:
            return in_place(*args, **kwargs)
        # As Celery marks a request whose body has begun: what the body of another `self(...)`
        # sees is then a direct call.
        request._protected = 1
        return isolate(task, args, kwargs, stack=[(task, request)], directly=False)
    caller = _state.get_current_task()
    stack = [(caller, caller.request)] if caller is not None else []
    if request is None and caller is not None and caller.name in MAPPERS:
        if caller.request.is_eager and not settings.worker_settings(task.app).eager:
            return in_place(*args, **kwargs)
        return isolate(task, args, kwargs, stack=stack, directly=True)
    if requester.is_worker(task.app) and _is_errback(args):
        # With its cause and its traceback, which a pickled exception is without.
        request, exc, *others = args
        args = (request, Failure.of(exc), *others)
        return isolate(task, args, kwargs, stack=stack, directly=True)
    return in_place(*args, **kwargs)


def _is_traced(task: IsolatedMixin, request: Context | None) -> bool:
    """Whether Celery's tracer, and nobody else, has called the task: its own condition."""
    return (
        request is not None
        and len(task.request_stack) == 1
        and not request.called_directly
        and not request._protected
    )


def _is_errback(args: tuple[Any, ...]) -> bool:
    """Whether Celery has called the task, as a function, to tell it of another one's failure.

    It does so in the slot; for a lost slot and a hard time limit, in the main process.
    """
    if len(args) < 2 or not isinstance(args[0], Context):
        return False
    frame = sys._getframe(1)
    for _ in range(_ERRBACK_DEPTH):
        if frame.f_code is Backend._call_task_errbacks.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _our_request(own: Any) -> type:
    """Somebody's own request class, with ours in front of it."""
    # Here: a client has no use for a worker's modules.
    from isolated_tasks.request import RequestMixin

    cls: type = symbol_by_name(own)
    return cls if issubclass(cls, RequestMixin) else type(cls.__name__, (RequestMixin, cls), {})


def _refuse_batches(cls: type[IsolatedMixin]) -> None:
    if any(base.__module__.partition(".")[0] == "celery_batches" for base in cls.__mro__):
        raise OptionError(
            f"task {cls.name!r}: base={cls.__bases__[0].__name__}: celery-batches collects "
            "messages in the main process and calls the task without a request, so its body "
            "cannot be isolated; leave one of the two out",
            {"task": cls.name, "option": "base", "value": repr(cls.__bases__)},
        )
