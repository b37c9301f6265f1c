"""IsolatedTask: decides who runs a call, and where."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
from celery import _state
from celery.app.task import Task
from celery.canvas import signature
from celery.exceptions import Retry
from celery.result import result_from_tuple

from isolated_tasks import body, byvalue, requester, settings
from isolated_tasks.errors import OutOfMemoryError, RemoteError
from isolated_tasks.process import child, pickling
from isolated_tasks.process.options import StartMethod
from isolated_tasks.process.outcome import Outcome

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

__all__ = ["IsolatedMixin", "IsolatedTask"]

#: Celery's tasks that call another task as a function, once for each item that they were sent.
#: ``Task.chunks`` becomes a group of the second.
_MAPPERS = frozenset({"celery.map", "celery.starmap"})


class IsolatedMixin:
    """What makes a Celery task run its body in a short-lived process.

    For combining with another base class: ``class MyTask(IsolatedMixin, app.Task)``. A base with a
    ``__call__`` of its own is called in the child, around the body.

    A call runs in a child if a worker makes it, also one item of ``map``, ``starmap`` and
    ``chunks``. It runs in place, as `celery.Task` would run it, if the task is called as a plain
    function, by a task inside a child, or through ``apply()`` and ``task_always_eager`` (unless
    ``isolated_eager`` is set).

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

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Add the worker's bootstep to the app, and check the options of the task."""
        super().on_bound(app)  # type: ignore[misc]
        # By its name, and as often as one likes: it is a set.
        app.steps["worker"].add("isolated_tasks.worker:IsolationStep")
        if cls.name:
            settings.process_options(cls)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task; see the class for where.

        Raises:
            Exception: What the body raised.
            IsolationError: The call could not be made, or has lost its child.
        """
        request = self.request_stack.top
        if child.is_child() or not settings.is_isolated(self):
            return self._run_in_place(request, args, kwargs)
        if _is_traced(self, request):
            if request.is_eager and not settings.worker_settings(self.app).eager:
                return self._run_in_place(request, args, kwargs)
            # As Celery marks a request whose body has begun: what the body of another `self(...)`
            # sees is then a direct call.
            request._protected = 1
            return _isolate(self, args, kwargs, stack=[(self, request)], directly=False)
        mapper = _state.get_current_task()
        if request is None and mapper is not None and mapper.name in _MAPPERS:
            if mapper.request.is_eager and not settings.worker_settings(self.app).eager:
                return self._run_in_place(request, args, kwargs)
            stack = [(mapper, mapper.request)]
            return _isolate(self, args, kwargs, stack=stack, directly=True)
        return self._run_in_place(request, args, kwargs)

    def callable_in_child(self) -> Callable[..., Any]:
        """What Celery's tracer would call, in the worker, if the task were not isolated.

        A base class with a ``__call__`` of its own (an app context of Flask, a session) goes around
        the body, so it is called where the body is.
        """
        around: Any = super().__call__  # type: ignore[misc]
        if around.__func__ is Task.__call__:
            return self.run
        # It ends in Celery's own, which runs the body on the stacks that are there, once.
        self.request_stack.top._protected = 0
        return around  # type: ignore[no-any-return]

    def _run_in_place(
        self, request: Context | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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


def _is_traced(task: IsolatedMixin, request: Context | None) -> bool:
    """Whether Celery's tracer, and nobody else, has called the task: its own condition."""
    return (
        request is not None
        and len(task.request_stack) == 1
        and not request.called_directly
        and not request._protected
    )


def _isolate(
    task: IsolatedMixin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stack: list[tuple[Any, Context]],
    directly: bool,
) -> Any:
    call = body.BodyCall(
        task=task.name,
        args=args,
        kwargs=kwargs,
        stack=[body.StackEntry(one.name, _plain(request)) for one, request in stack],
        directly=directly,
        join_will_block=_state._task_join_will_block,
        logs=body.current_logs(stack[-1][1].hostname),
    )
    try:
        outcome = _run(task, call)
    except MemoryError as exc:
        raise OutOfMemoryError(f"task {task.name!r}: its result does not fit here") from exc
    _take_over_children(task.app, stack[-1][1], outcome.notes.get("children", ()))
    if outcome.failure is not None:
        error = outcome.failure.exception()
        if "retry" in outcome.notes and isinstance(error, Retry):
            error.sig, error.is_eager = signature(outcome.notes["retry"], app=task.app), True
        raise _raisable(error)
    return outcome.value


def _plain(request: Context) -> dict[str, Any]:
    """A request as it is sent; results that it has launched so far stay here."""
    values = dict(vars(request))
    values.pop("_children", None)
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
        parts = {"args": call.args, "kwargs": call.kwargs}
        for entry in call.stack:
            parts["request"] = entry.request
        raise pickling.refusal(
            parts, exc, task=task.name, what="argument", pickler=pickler
        ) from exc


def _take_over_children(app: Celery, request: Context, children: Sequence[Any]) -> None:
    """Note the tasks that the body has launched where Celery looks for ``result.children``."""
    if children:
        request.children.extend(result_from_tuple(child, app) for child in children)


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
