"""Inside the forkserver and the child: load the app, rebuild ``task.request``, run the body.

`load_app` runs once, in the forkserver (or in a spawned child); `run` runs in the child, for each
call. What is sent to them is described by `describe_app` and `BodyCall`, in the worker.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import functools
import importlib
import locale
import logging
import multiprocessing
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import billiard
import kombu.serialization
from celery import _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.exceptions import Retry, SoftTimeLimitExceeded
from celery.result import result_from_tuple
from celery.utils.saferepr import saferepr

from isolated_tasks import byvalue, context, django, encoded, profiles, settings
from isolated_tasks import signals as own_signals
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process import board, limits, pickling
from isolated_tasks.process.outcome import Failure, Outcome

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["BodyCall", "Logs", "StackEntry", "describe_app", "load_app", "run"]

logger = logging.getLogger(__name__)

#: Where not to look for the app: `__main__` is another module in the forkserver, and Celery's own
#: modules hold whichever app is current.
_NOT_SEARCHED = frozenset({"__main__", "__mp_main__", "celery", "isolated_tasks"})

#: Libraries may take this long, in seconds, to send what they have buffered, when a child exits.
FLUSH_SECONDS = 3.0

#: The signature of a retry, pickled, up to which it goes back to the slot, in bytes.
MAX_RETRIED = 64 * 1024

limits.soft_time_limit_exceeded = SoftTimeLimitExceeded

#: The app that this forkserver or child has loaded.
_app: Celery | None = None

#: ``isolated_worker_process_init``, as that app has it.
_sends_signals = True


# ── the app ─────────────────────────────────────────────────────────────────────────────────────


def describe_app(app: Celery, hostname: str) -> tuple[str, bytes]:
    """Say, in the worker, how a forkserver gets this app.

    Returns:
        A title for reports, and the argument of `load_app`.
    """
    location = _location(app)
    description = {
        "location": location,
        "hostname": hostname,
        "changes": _picklable_settings(app),
        "parts": _parts(app),
        "queues": _consumed(app),
        "logs": current_logs(hostname),
        # The rest of what a process has is inherited by the forkserver that the worker starts.
        "locale": locale.setlocale(locale.LC_ALL),
    }
    title = f"app {location}" if location else f"app {app.main or 'default'} (rebuilt)"
    return title, pickling.to_bytes(description, pickler=byvalue.Pickler)


def load_app(argument: bytes) -> Callable[[], None]:
    """Load the app as a worker would, without opening any connection.

    An app that lives in a script, a notebook or a function is built anew from its parts, as
    Celery does for pool processes that are not forked. So is one whose import fails, so that its
    tasks, which then come by value, do not meet Celery's default app and its broker.

    Returns:
        What is to be called once modules are preloaded: they may have set up logging.

    Raises:
        BaseException: What the import raised.
    """
    description = pickling.from_bytes(argument)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, description["locale"])
    try:
        _adopt(_import(description["location"]) or _rebuild(description["parts"]), description)
    except BaseException:
        # Without importing its tasks: that is what fails. They come by value.
        _adopt(_rebuild(description["parts"]), description, import_tasks=False)
        raise
    return functools.partial(_finish_loading, description["logs"])


def _finish_loading(logs: Logs | None) -> None:
    if _app is not None:
        # What a preload has opened; what the app has is closed already.
        django.close_connections(_app)
    _prepare_logging(logs)


def _import(location: str | None) -> Celery | None:
    if location is None:
        return None
    module, _, attribute = location.partition(":")
    app: Celery = getattr(importlib.import_module(module), attribute)
    return app


def _rebuild(parts: bytes) -> Celery:
    cls, keywords = pickling.from_bytes(parts)
    app: Celery = cls(**{**keywords, "set_as_current": True})
    return app


def _adopt(app: Celery, description: dict[str, Any], *, import_tasks: bool = True) -> None:
    global _app
    _app = app
    try:
        # Before the settings, which may be of classes whose modules import models; and also where
        # tasks are not imported, since by value they come with models as well.
        django.set_up(app)
    except Exception:
        if import_tasks:
            raise
    app.conf.update(
        {name: pickling.from_bytes(value) for name, value in description["changes"].items()}
    )
    if import_tasks:
        app.loader.init_worker()
    if description["queues"] is not None:
        app.amqp.queues.select(description["queues"])
    # Current and default app, finalised, and the patch by which calling a plain task in a body
    # behaves as it does in a worker.
    trace.setup_worker_optimizations(app, description["hostname"])
    global _sends_signals
    _sends_signals = settings.worker_settings(app).worker_process_init
    # Every child sets up logging, and many a body sends a task. Celery imports what that takes when
    # it is first used; once here is cheaper than in each child. Neither opens anything.
    _ = app.log
    importlib.import_module(app.amqp_cls.partition(":")[0])
    # As a worker does when it starts: an AppConfig's ready(), a check, a module may have connected.
    django.close_connections(app)


def _consumed(app: Celery) -> list[str] | None:
    """The queues that this worker was told to consume from, as it publishes to them."""
    if "amqp" not in vars(app):
        return None
    queues = app.amqp.queues
    return None if queues.consume_from is queues else list(queues.consume_from)


def _parts(app: Celery) -> bytes:
    """What the app is built anew from, where it cannot be imported."""
    keywords = dict(app.__reduce_keys__())
    keywords["changes"] = {}
    try:
        return pickling.to_bytes((type(app), keywords), pickler=byvalue.Pickler)
    except Exception:
        # Most often a task_cls that holds on to another framework's app. The tasks that come by
        # value bring their classes along.
        known = {
            name: value
            for name, value in keywords.items()
            if pickling.error_of(value, pickler=byvalue.Pickler) is None
        }
        return pickling.to_bytes((type(app), known), pickler=byvalue.Pickler)


def _location(app: Celery) -> str | None:
    """``module:attribute`` under which an import finds the app; None where there is none."""
    preferred = [app.main] if isinstance(app.main, str) else []
    for name in (*preferred, *sorted(sys.modules)):
        if name.split(".")[0] in _NOT_SEARCHED:
            continue
        module = sys.modules.get(name)
        if getattr(module, "__spec__", None) is None:
            continue
        for attribute, value in list(vars(module).items()):
            if value is app:
                return f"{name}:{attribute}"
    return None


def _picklable_settings(app: Celery) -> dict[str, bytes]:
    """What was changed in ``app.conf``, each pickled; a default of Celery's own is not sent.

    They are loaded after the app: a value may be of a class whose module imports the app.
    """
    changes = {}
    for name, value in dict(app.conf.changes).items():
        try:
            changes[name] = pickling.to_bytes(value, pickler=byvalue.Pickler)
        except Exception as exc:
            logger.warning(
                "setting %s cannot be pickled, so isolated bodies do not see a change that was "
                "made to it at run time: %s",
                name,
                exc,
            )
    return changes


# ── a call ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StackEntry:
    """A task that is being executed, with its request, as they stand on Celery's stacks."""

    task: str
    request: dict[str, Any]


@dataclass(frozen=True)
class Logs:
    """How the worker has set up logging; the arguments of ``app.log.setup``."""

    level: int
    file: str | None
    redirect: bool
    redirect_level: str
    hostname: str | None
    #: ``%(processName)s`` in the worker's formats.
    process_name: str
    #: ``%i`` and ``%I`` in the name of the worker's log file; None where it is no pool process.
    process_index: int | None

    @property
    def arguments(self) -> tuple[object, ...]:
        """What is the same for all processes of a worker."""
        return self.level, self.file, self.redirect, self.redirect_level


@dataclass(frozen=True)
class BodyCall:
    """Everything that the body of a task finds around itself."""

    task: str
    #: Of the message that the call belongs to; None for an errback in the main process.
    task_id: str | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: Outermost first. The last is the task's own, unless it is called directly.
    stack: list[StackEntry]
    #: The task is called as a function, by the task on top of the stack (``celery.map``).
    directly: bool
    #: Whether ``AsyncResult.get()`` is refused.
    join_will_block: bool
    #: Nobody stores the result.
    result_is_ignored: bool
    #: The task's, where it has one: what is sent back is not to be unpickled.
    result_serializer: str | None
    logs: Logs | None
    #: See `context`.
    carried: context.Carried | None = None
    #: Tasks that come by value.
    definitions: list[bytes] = field(default_factory=list)
    #: What is to be made of it.
    profile: profiles.Profile | None = None


def run(call: BodyCall) -> Outcome:
    """Run the body of a task, in the child.

    Returns:
        Its outcome; with a note ``unknown_task`` where the child's app has no task of that name:
        then nothing has run.
    """
    app = _app
    board.name_call(call.task_id)
    if app is None:
        raise ForkserverError(
            f"task {call.task!r}: the app could not be loaded; the worker's log says why"
        )
    _become_worker_process(app, call)
    for definition in call.definitions:
        byvalue.define(app, definition)
    missing = [name for name in (call.task, *(e.task for e in call.stack)) if name not in app.tasks]
    if missing:
        return Outcome(notes={"unknown_task": missing[0]})
    with _stack(app, call.stack) as requests:
        canvas = _canvas(requests[-1]) if requests else {}
        recording = profiles.Recording(call.profile)
        outcome = _outcome(app.tasks[call.task], call, recording)
        if recording.problem is not None:
            outcome.notes["profile"] = recording.problem
        if requests:
            outcome.notes["children"] = [one.as_tuple() for one in requests[-1]._children or ()]
            outcome.notes["request"] = _changes(requests[-1], call.stack[-1].request, canvas)
    if call.result_serializer is None:
        return outcome
    task = app.tasks[call.task]
    return encoded.pack(
        outcome, call.result_serializer, task=task, is_ignored=call.result_is_ignored
    )


run.marks_body = True  # type: ignore[attr-defined]


def _outcome(task: Any, call: BodyCall, recording: profiles.Recording) -> Outcome:
    frame = sys._getframe()
    args = _arguments(call)
    with _surroundings(task, call, args):
        # What the body raises does not leave this block: contextlib sets its __traceback__, which
        # an exception that is a frozen dataclass refuses.
        try:
            function = task if call.directly else task.callable_in_child()
            with recording, limits.body():
                value = function(*args, **call.kwargs)
        except BaseException as exc:
            outcome = Outcome(failure=Failure.of(exc, skip=frame))
            if isinstance(exc, Retry):
                if exc.sig is not None:
                    outcome.notes["retry"] = _retried(exc)
                if call.result_serializer is not None:
                    outcome.notes["how"] = encoded.retry_notes(exc)
            return outcome
    stand_in = functools.partial(_stand_in, task, value, is_ignored=call.result_is_ignored)
    return Outcome(value, stand_in=stand_in)


def _arguments(call: BodyCall) -> Sequence[Any]:
    """What the body is called with; an errback, with the exception that it is told of."""
    return [one.exception() if isinstance(one, Failure) else one for one in call.args]


def _retried(exc: Retry) -> tuple[bytes | None, bool]:
    """What a pickled `Retry` loses: the message that it has sent, or that ``apply()`` runs next.

    Hooks and receivers may look at it, so it goes along unless it is large.
    """
    pickled = None
    with contextlib.suppress(Exception):
        pickled = pickling.to_bytes(dict(exc.sig))
    if pickled is not None and len(pickled) > MAX_RETRIED and not exc.is_eager:
        pickled = None
    return pickled, exc.is_eager


@contextlib.contextmanager
def _surroundings(task: Any, call: BodyCall, args: Sequence[Any]) -> Iterator[None]:
    """What code keeps around a task, here as it stands in the slot."""
    arguments = {"task_id": call.task_id, "args": args, "kwargs": call.kwargs}
    with context.restored(call.carried) as carried, django.around_body(task.app):
        own_signals.isolated_prerun.send(sender=task, carried=carried, **arguments)
        try:
            yield
        finally:
            own_signals.isolated_postrun.send(sender=task, carried=carried, **arguments)


# ── what Celery looks at after the body ─────────────────────────────────────────────────────────

#: Not taken back: the call's own, and what is taken back in another way.
_NOT_TAKEN_BACK = frozenset({"args", "kwargs", "_children", "_protected"})

#: What Celery's tracer reads from the request after the body, and a body may change in place.
_CANVAS = ("callbacks", "errbacks", "chain", "chord")


def _canvas(request: Context) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in _CANVAS}
    return {name: copy.deepcopy(value) for name, value in values.items() if value}


def _changes(
    request: Context, before: Mapping[str, Any], canvas: Mapping[str, Any]
) -> dict[str, bytes]:
    """What the body has set or changed in its request, each pickled; what will not, is left."""
    changes = {}
    for name, value in vars(request).items():
        old = canvas.get(name, before.get(name, request))
        if name in _NOT_TAKEN_BACK or value is old:
            continue
        with contextlib.suppress(Exception):
            if value != old:
                changes[name] = pickling.to_bytes(value)
    return changes


def _stand_in(task: Any, value: object, *, is_ignored: bool) -> Any:
    """What the slot can get where the result cannot be pickled.

    Celery does not pickle results: stored, or handed to the next task of a chain, they are encoded
    by the result serializer, and ignored ones by nobody.

    Raises:
        Exception: There is nothing that would do; what the serializer raised.
    """
    serializer = task.app.conf.result_serializer
    try:
        content_type, encoding, data = kombu.serialization.dumps(value, serializer=serializer)
        return kombu.serialization.loads(data, content_type, encoding, accept=[content_type])
    except Exception:
        if is_ignored:
            return pickling.StandIn(saferepr(value, task.resultrepr_maxsize))
        raise


@contextlib.contextmanager
def _stack(app: Celery, entries: Sequence[StackEntry]) -> Iterator[list[Context]]:
    """Have Celery's stacks as they are where the task was called."""
    requests = []
    for entry in entries:
        task = app.tasks[entry.task]
        request = Context()
        # Not Context(request): it would take our copy of the headers for custom headers.
        request.__dict__.clear()
        request.__dict__.update(entry.request)
        if request._children:
            request._children = [result_from_tuple(one, app) for one in request._children]
        _state.push_current_task(task)
        task.request_stack.push(request)
        requests.append(request)
    try:
        yield requests
    finally:
        for entry in reversed(entries):
            app.tasks[entry.task].request_stack.pop()
            _state.pop_current_task()


# ── the process ─────────────────────────────────────────────────────────────────────────────────

_is_set_up = False


def _become_worker_process(app: Celery, call: BodyCall) -> None:
    """Do what a pool process does when it is born; once for each child."""
    global _is_set_up
    _state._set_task_join_will_block(call.join_will_block)
    if _is_set_up:
        return
    _is_set_up = True
    # os.fork() alone does not run these; kombu, Celery and SQLAlchemy's backend register theirs
    # with multiprocessing, to let go of connections that they have in common with the parent.
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    # What no hook resets: reply queues and per-thread backends.
    app.__dict__.pop("oid", None)
    app._local = threading.local()
    app._backend_cache = None
    app.loader.init_worker_process()
    if call.logs is not None:
        _set_up_logging(app, call.logs)
    django.become_process(app)
    hostname = call.logs.hostname if call.logs is not None else None
    if _sends_signals:
        signals.worker_process_init.send(sender=hostname)
    own_signals.isolated_process_init.send(sender=None)
    # Registered before any hook of the body's, so it runs after them.
    atexit.register(_end_worker_process, os.getpid(), hostname)


def _end_worker_process(pid: int, hostname: str | None) -> None:
    if os.getpid() != pid:
        # A process that the body has forked, and that leaves as programs do.
        return
    if _sends_signals:
        signals.worker_process_shutdown.send(sender=hostname, pid=pid, exitcode=0)
    own_signals.isolated_process_shutdown.send(sender=None)
    if _app is not None:
        django.close_connections(_app)
    context.flush(FLUSH_SECONDS)


@dataclass(frozen=True)
class _Prepared:
    """Logging as a forkserver has set it up for its children."""

    arguments: tuple[object, ...]
    #: The root's, as long as nobody has changed anything since.
    handlers: list[logging.Handler]
    #: What ``sys.stdout`` and ``sys.stderr`` were before they were redirected.
    streams: tuple[Any, Any]


_prepared: _Prepared | None = None


def _prepare_logging(logs: Logs | None) -> None:
    """Set up logging in the forkserver, whose children then need not, where nobody can tell.

    A receiver of Celery's logging signals may start a thread or open a connection, and a log file
    may be named for each process: those are for the child.
    """
    global _prepared
    hooks = (signals.setup_logging, signals.after_setup_logger, signals.after_setup_task_logger)
    if _app is None or logs is None or logs.file or any(hook.receivers for hook in hooks):
        return
    streams = sys.stdout, sys.stderr
    # A worker redirects its own later, when it starts.
    redirect = bool(_app.conf.worker_redirect_stdouts)
    level = str(_app.conf.worker_redirect_stdouts_level)
    logs = dataclasses.replace(logs, redirect=redirect, redirect_level=level)
    _configure_logging(_app, logs)
    _prepared = _Prepared(logs.arguments, list(logging.root.handlers), streams)


def _set_up_logging(app: Celery, logs: Logs) -> None:
    multiprocessing.current_process().name = logs.process_name
    if logs.process_index is not None:
        billiard.current_process().index = logs.process_index
    if _prepared is not None:
        is_as_prepared = _prepared.handlers == logging.root.handlers
        if is_as_prepared and _prepared.arguments == logs.arguments:
            return
        sys.stdout, sys.stderr = _prepared.streams
    _configure_logging(app, logs)


def _configure_logging(app: Celery, logs: Logs) -> None:
    app.log.already_setup = False
    app.log.setup(logs.level, logs.file, logs.redirect, logs.redirect_level, hostname=logs.hostname)


def current_logs(hostname: str | None) -> Logs | None:
    """How this process, a worker's, has set up logging; None where it is no worker's.

    Celery leaves these variables for processes that it starts (celery/app/log.py, ``setup``).
    """
    if "CELERY_LOG_LEVEL" not in os.environ:
        return None
    return Logs(
        level=int(os.environ.get("CELERY_LOG_LEVEL") or 0),
        file=os.environ.get("CELERY_LOG_FILE") or None,
        redirect=bool(os.environ.get("CELERY_LOG_REDIRECT")),
        redirect_level=os.environ.get("CELERY_LOG_REDIRECT_LEVEL") or "WARNING",
        hostname=hostname,
        process_name=multiprocessing.current_process().name,
        process_index=getattr(billiard.current_process(), "index", None),
    )
