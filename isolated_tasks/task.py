"""IsolatedTask: decides who runs a call, and where."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import cloudpickle
from celery import _state
from celery.app.autoretry import add_autoretry_behaviour
from celery.app.task import Context, Task
from celery.backends.base import Backend
from celery.canvas import signature
from celery.exceptions import Reject, Retry
from celery.result import result_from_tuple

from isolated_tasks import body, byvalue, context, requester, settings
from isolated_tasks.errors import (
    ChildLostError,
    IsolationError,
    OptionError,
    OutOfMemoryError,
    RemoteError,
)
from isolated_tasks.process import child, pickling
from isolated_tasks.process.options import StartMethod
from isolated_tasks.process.outcome import Failure, Outcome

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["IsolatedMixin", "IsolatedTask"]

#: Celery's tasks that call another task as a function, once for each item that they were sent.
#: ``Task.chunks`` becomes a group of the second.
_MAPPERS = frozenset({"celery.map", "celery.starmap"})

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
    #: ``"forkserver"``, a fork of the preloaded process, or ``"spawn"``, a fresh interpreter for
    #: every process. Default: ``"forkserver"``.
    start_method: StartMethod | None = None
    #: Variables to set in the environment of the process. Default: none.
    env: Mapping[str, str] | None = None

    if TYPE_CHECKING:
        name: str
        app: Celery
        request_stack: Any
        run: Callable[..., Any]
        retry: Callable[..., Exception]
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
        _refuse_batches(cls)
        if cls.name:
            settings.check_names(cls)
            settings.process_options(cls)  # type: ignore[arg-type]

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
        return _isolate(task, args, kwargs, stack=[(task, request)], directly=False)
    caller = _state.get_current_task()
    stack = [(caller, caller.request)] if caller is not None else []
    if request is None and caller is not None and caller.name in _MAPPERS:
        if caller.request.is_eager and not settings.worker_settings(task.app).eager:
            return in_place(*args, **kwargs)
        return _isolate(task, args, kwargs, stack=stack, directly=True)
    if requester.is_worker(task.app) and _is_errback(args):
        # With its cause and its traceback, which a pickled exception is without.
        request, exc, *others = args
        args = (request, Failure.of(exc), *others)
        return _isolate(task, args, kwargs, stack=stack, directly=True)
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


def _refuse_batches(cls: type[IsolatedMixin]) -> None:
    if any(base.__module__.partition(".")[0] == "celery_batches" for base in cls.__mro__):
        raise OptionError(
            f"task {cls.name!r}: base={cls.__bases__[0].__name__}: celery-batches collects "
            "messages in the main process and calls the task without a request, so its body "
            "cannot be isolated; leave one of the two out",
            {"task": cls.name, "option": "base", "value": repr(cls.__bases__)},
        )


# ── a call ──────────────────────────────────────────────────────────────────────────────────────


def _isolate(
    task: IsolatedMixin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stack: list[tuple[Any, Context]],
    directly: bool,
) -> Any:
    owner, caller = stack[-1] if stack else (None, None)
    task_id = caller.id if caller is not None else None
    known = len(caller._children or ()) if caller is not None else 0
    call = body.BodyCall(
        task=task.name,
        task_id=task_id,
        args=args,
        kwargs=kwargs,
        stack=[body.StackEntry(one.name, _plain(request)) for one, request in stack],
        directly=directly,
        join_will_block=_state._task_join_will_block,
        result_is_ignored=_is_ignored(owner, caller, directly=directly),
        logs=body.current_logs(caller.hostname if caller is not None else None),
        carried=context.capture(task, task_id),
    )
    try:
        outcome = _run(task, call)
    except MemoryError as exc:
        no_room = OutOfMemoryError(f"task {task.name!r}: its result does not fit here")
        no_room.__cause__ = exc
        _fail(task, no_room, directly=directly)
    except IsolationError as exc:
        _fail(task, exc, directly=directly)
    if caller is not None:
        _take_over(task.app, caller, outcome.notes, known)
    if outcome.failure is not None:
        error = outcome.failure.exception()
        if "retry" in outcome.notes and isinstance(error, Retry):
            pickled, error.is_eager = outcome.notes["retry"]
            error.sig = signature(pickle.loads(pickled), app=task.app) if pickled else None
        _fail(task, _raisable(error), directly=directly)
    return outcome.value


def _is_ignored(owner: Any, request: Context | None, *, directly: bool) -> bool:
    """Whether nobody stores the result: the request's word, where it has one, then the task's."""
    if request is None or (directly and owner.name not in _MAPPERS):
        # An errback's.
        return True
    said = vars(request).get("ignore_result")
    return bool(owner.ignore_result if said is None else said)


def _plain(request: Context) -> dict[str, Any]:
    """A request as it is sent; results that it has launched so far as tuples."""
    values = dict(vars(request))
    if values.get("_children"):
        values["_children"] = [result.as_tuple() for result in values["_children"]]
    return values


def _run(task: IsolatedMixin, call: body.BodyCall) -> Outcome:
    options = settings.process_options(task)
    children = requester.children()
    address = functools.partial(requester.address, task.app)
    known_by_value = byvalue.is_by_value(task)
    pickled = _pickle(task, call, by_value=known_by_value)
    outcome = children.call(pickled, options, address)
    if isinstance(outcome.value, body.UnknownTask) and not known_by_value:
        # The forkserver's app has no such task: it was made after the import, by a function or
        # under a condition. Nothing has run.
        pickled = _pickle(task, call, by_value=True)
        outcome = children.call(pickled, options, address)
    if isinstance(outcome.value, body.UnknownTask):
        raise task.app.tasks.NotRegistered(outcome.value.name)
    return outcome


def _pickle(task: IsolatedMixin, call: body.BodyCall, *, by_value: bool) -> pickling.Pickled:
    pickler: pickling.PicklerFactory = cloudpickle.Pickler
    if by_value:
        call = dataclasses.replace(call, definitions=byvalue.definitions([task]))
        pickler = byvalue.Pickler
    try:
        return pickling.dumps((body.run, (call,), {}), pickler=pickler)
    except Exception as exc:
        error = exc
    for entry in call.stack:
        _leave_out_unpicklable(entry.request, pickler)
    try:
        return pickling.dumps((body.run, (call,), {}), pickler=pickler)
    except Exception:
        raise pickling.refusal(
            {"args": call.args, "kwargs": call.kwargs},
            error,
            task=task.name,
            what="argument",
            pickler=pickler,
        ) from error


def _leave_out_unpicklable(request: dict[str, Any], pickler: pickling.PicklerFactory) -> None:
    """Drop what a hook or a library has put on the request for use in this process.

    What came with the message is plain data. ``args`` and ``kwargs`` are the call's own, and what
    is wrong with them is for the caller to hear.
    """
    for name in request.keys() - {"args", "kwargs"}:
        try:
            pickling.dumps(request[name], pickler=pickler)
        except Exception:
            del request[name]


def _take_over(app: Celery, request: Context, notes: Mapping[str, Any], known: int) -> None:
    """Note what the body has changed in its request where Celery, after the body, looks for it.

    Celery stores ``request.children`` with the result, and it reads ``callbacks`` and ``chain``
    after the body: one that empties them ends its chain.
    """
    for name, pickled in notes.get("request", {}).items():
        setattr(request, name, pickle.loads(pickled))
    children: Sequence[Any] = notes.get("children", ())
    if len(children) > known:
        request.children.extend(result_from_tuple(one, app) for one in children[known:])


# ── failures ────────────────────────────────────────────────────────────────────────────────────


def _fail(task: IsolatedMixin, error: Exception, *, directly: bool) -> NoReturn:
    """Raise what the call failed with, or retry or give back the call where the task says so."""
    # A direct call has no message of its own to give back; `retry` raises the error there.
    if isinstance(error, ChildLostError) and not directly:
        if getattr(task, "retry_on_worker_lost", None):
            # Celery 5.7's option; its `retry` raises the error itself after the last try.
            raise task.retry(exc=error)
        if task.acks_late and task.reject_on_worker_lost:
            # What Celery does for a lost pool process: nothing is stored and nobody is called,
            # and the broker delivers the message again.
            raise Reject(error, requeue=True) from error
    if isinstance(error, IsolationError) and _may_autoretry(task, error):
        _Failing(task, error).run()
    raise error


def _may_autoretry(task: IsolatedMixin, error: IsolationError) -> bool:
    """Whether ``autoretry_for`` is still to be asked.

    It wraps the body, in the child, and has not seen what failed outside. What stands for an
    exception of the body it has seen, so then only a class of ours is meant.
    """
    if not isinstance(error, OutOfMemoryError | RemoteError):
        return True
    return any(issubclass(cls, IsolationError) for cls in getattr(task, "autoretry_for", ()))


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


def _raisable(exc: BaseException) -> Exception:
    """The body's exception, or an error of ours where Celery would take it for something else."""
    if isinstance(exc, MemoryError):
        error: Exception = OutOfMemoryError(f"the body ran out of memory: {exc!r}")
        error.__cause__ = exc
        return error.with_traceback(exc.__traceback__)
    if not isinstance(exc, Exception):
        name = f"{type(exc).__module__}.{type(exc).__qualname__}"
        error = RemoteError(f"the body raised {exc!r}", {"type_name": name, "text": str(exc)})
        return error.with_traceback(exc.__traceback__)
    return exc
