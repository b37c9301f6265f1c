"""One call, from its slot: what travels, what comes back, and up the memory ladder."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import cloudpickle
from celery import _state
from celery.canvas import signature
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded
from celery.result import result_from_tuple

from isolated_tasks import (
    body,
    byvalue,
    context,
    encoded,
    profiles,
    requester,
    settings,
    usage,
)
from isolated_tasks.errors import (
    ChildLostError,
    IsolationError,
    MemoryLimitExceeded,
    OutOfMemoryError,
)
from isolated_tasks.failures import raisable, raise_or_retry, refuse_poison
from isolated_tasks.losses import DELIVERY_COUNT
from isolated_tasks.process import pickling
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.outcome import Outcome
from isolated_tasks.process.supervisor import StoppedError, TimeIsUpError
from isolated_tasks.process.usage import Usage

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context

    from isolated_tasks.task import IsolatedMixin

__all__ = ["MAPPERS", "MEMORY_STEP", "Message", "isolate"]

logger = logging.getLogger(__name__)

#: The header of a message whose next attempt is to have more memory: the step of ``memory_limit``.
MEMORY_STEP = "isolated_memory_step"

#: Celery's tasks that call another task as a function, once for each item that they were sent.
#: ``Task.chunks`` becomes a group of the second.
MAPPERS = frozenset({"celery.map", "celery.starmap"})


def isolate(
    task: IsolatedMixin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stack: list[tuple[Any, Context]],
    directly: bool,
) -> Any:
    """Run a call in a child.

    Args:
        task: Whose body runs.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        stack: The tasks that are being executed, outermost first, with their requests. The last is
            the call's own, unless it is a direct one.
        directly: Somebody else's task has called this one as a function.

    Returns:
        What the body returns.

    Raises:
        Exception: What the body raises, and whatever else makes a call fail.
    """
    owner, caller = stack[-1] if stack else (None, None)
    task_id = caller.id if caller is not None else None
    message = None if directly or caller is None else Message(task, caller)
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
        result_serializer=settings.result_serializer(task),
        logs=body.current_logs(caller.hostname if caller is not None else None),
        carried=context.capture(task, task_id),
    )
    error: Exception
    try:
        if message is not None:
            refuse_poison(task, message)
        options, outcome = _run_up_the_ladder(task, call, message)
    except StoppedError as exc:
        # The main process has said what is to be said of the task, and to the broker. All other
        # ways of ending would overwrite that.
        raise Ignore(str(exc)) from None
    except MemoryError as exc:
        error = OutOfMemoryError(f"task {task.name!r}: its result does not fit here")
        error.__cause__ = exc
    except TimeIsUpError as exc:
        # Celery's own error, by which it acknowledges and reports as for its own limits.
        error = TimeLimitExceeded(*exc.args)
    except IsolationError as exc:
        error = exc
    else:
        return _result_of(task, caller, outcome, options, message, known=known)
    # Not where it is handled: it would come with a chain of what is ours alone to know.
    raise_or_retry(task, error, message)


def _result_of(
    task: IsolatedMixin,
    caller: Context | None,
    outcome: Outcome,
    options: ProcessOptions,
    message: Message | None,
    *,
    known: int,
) -> Any:
    """What the body returned; and note for Celery what it has changed in its request.

    Raises:
        Exception: What it raised.
    """
    if caller is not None:
        _take_over(task.app, caller, outcome.notes, known)
    if outcome.failure is not None:
        error = outcome.failure.exception()
        if "retry" in outcome.notes and isinstance(error, Retry):
            pickled, error.is_eager = outcome.notes["retry"]
            error.sig = signature(pickling.from_bytes(pickled), app=task.app) if pickled else None
        raise_or_retry(task, raisable(error, options), message, is_body_s=True)
    return outcome.value


def _is_ignored(owner: Any, request: Context | None, *, directly: bool) -> bool:
    """Whether nobody stores the result: the request's word, where it has one, then the task's."""
    if request is None or (directly and owner.name not in MAPPERS):
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


class Message:
    """The message that a call is made for, where it is not a direct call."""

    def __init__(self, task: IsolatedMixin, request: Context) -> None:
        self.request = request
        #: What the main process has sent along; nothing outside a worker, with ``isolated_eager``.
        self.sent: dict[str, Any] = (request.properties or {}).pop(requester.PROPERTY, {})
        headers = request.headers or {}
        step = headers.get(MEMORY_STEP, 0)
        #: How its children were lost so far, as far as the main process knows.
        self.losses: list[str] = self.sent.get("losses", [])
        #: Of the task's ``memory_limit``.
        self.step: int = step if isinstance(step, int) and step >= 0 else 0
        #: A profiler, if whoever has sent it asks for one.
        self.profile: object = headers.get(profiles.HEADER)

    def call_options(self, task: IsolatedMixin) -> CallOptions:
        """The limits of the call.

        Raises:
            OptionError: Whoever has sent the message has chosen ones that cannot be used.
        """
        soft, hard = self.sent.get("soft_time_limit"), self.sent.get("time_limit")
        if isinstance(soft, int | float) and isinstance(hard, int | float) and soft > hard:
            # Each may come from somewhere else: one from the task, the other from the caller or
            # the worker. As with Celery, the lower one ends the body.
            soft = None
        return CallOptions(
            task.name,
            title=self.request.id,
            call_id=self.sent.get("call_id"),
            soft_time_limit=soft,
            time_limit=hard,
        )


def _run_up_the_ladder(
    task: IsolatedMixin, call: body.BodyCall, message: Message | None
) -> tuple[ProcessOptions, Outcome]:
    """Run a call with its ``memory_limit``; if it is killed for that, with the next step of it.

    A message goes back to the broker for that, as for a retry: the next step may need another
    machine. A direct call, which has none, is made again here.
    """
    ladder = settings.memory_ladder(task)
    step = min(message.step, max(0, len(ladder) - 1)) if message is not None else 0
    while True:
        options = settings.process_options(task, step=step)
        try:
            return options, _run(task, call, options, message)
        except (MemoryLimitExceeded, ChildLostError) as exc:
            step += 1
            if step >= len(ladder) or not _is_for_memory(exc):
                raise
            if message is not None and not message.request.is_eager:
                _send_up(task, message.request, step, ladder[step].queue, exc)
            logger.warning("%s; again with the next limit", exc)


def _is_for_memory(error: MemoryLimitExceeded | ChildLostError) -> bool:
    return isinstance(error, MemoryLimitExceeded) or bool(error.oom_killed)


def _send_up(
    task: IsolatedMixin, request: Context, step: int, queue: str | None, error: Exception
) -> NoReturn:
    """Retry as ``Task.retry`` does, but without counting it: ``max_retries`` is the user's."""
    again = task.signature_from_request(
        request,
        queue=queue,
        retries=request.retries,
        headers={
            **{k: v for k, v in (request.headers or {}).items() if k != DELIVERY_COUNT},
            MEMORY_STEP: step,
        },
    )
    try:
        again.apply_async()
    except Exception as exc:
        raise Reject(exc, requeue=False) from exc
    raise Retry(exc=error, when=0, sig=again)


def _run(
    task: IsolatedMixin,
    call: body.BodyCall,
    options: ProcessOptions,
    message: Message | None,
) -> Outcome:
    children = requester.children()
    call_options = None if message is None else message.call_options(task)
    address = functools.partial(requester.address, task.app)
    known_by_value = byvalue.is_by_value(task)
    chosen = settings.for_slot(task)
    asked = message and message.profile
    profile = profiles.chosen(task, call.task_id, chosen.profiling, asked)
    if profile is not None:
        call = dataclasses.replace(call, profile=profile)
    pickled = _pickle(task, call, by_value=known_by_value)
    used: list[Usage] = []
    outcome: Outcome | None = None
    run = functools.partial(children.call, spares=chosen.spares, on_end=used.append)
    try:
        outcome = run(pickled, options, address, call_options)
        if "unknown_task" in outcome.notes and not known_by_value:
            # The forkserver's app has no such task: it was made after the import, by a function or
            # under a condition. Nothing has run.
            pickled = _pickle(task, call, by_value=True)
            outcome = run(pickled, options, address, call_options)
    finally:
        if used:
            known = used[-1]
            if profile is not None:
                problem = None if outcome is None else outcome.notes.get("profile")
                known = profiles.told(task, call.task_id, profile, known, problem)
            usage.finished(task, call.task_id, message and message.request, known)
    if "unknown_task" in outcome.notes:
        raise task.app.tasks.NotRegistered(outcome.notes["unknown_task"])
    codec = settings.result_codec(task)
    return outcome if codec is None else encoded.unpack(outcome, codec, task=task)


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
        if pickling.error_of(request[name], pickler=pickler) is not None:
            del request[name]


def _take_over(app: Celery, request: Context, notes: Mapping[str, Any], known: int) -> None:
    """Note what the body has changed in its request where Celery, after the body, looks for it.

    Celery stores ``request.children`` with the result, and it reads ``callbacks`` and ``chain``
    after the body: one that empties them ends its chain.
    """
    for name, pickled in notes.get("request", {}).items():
        setattr(request, name, pickling.from_bytes(pickled))
    children: Sequence[Any] = notes.get("children", ())
    if len(children) > known:
        request.children.extend(result_from_tuple(one, app) for one in children[known:])
