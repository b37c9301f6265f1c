"""What code keeps around a task: taken along from the slot, put in place around the body.

In the slot, `capture` collects what stands when Celery calls the task: context variables, what the
libraries below keep elsewhere, and what receivers of `signals.before_isolated_call` hand over. In
the child, `restored` puts it in place around the body, and takes it away again. `flush` sends what
libraries have buffered there before the process ends.

A library is served only if the program has imported it, and its trouble never is the call's: it is
logged, once. Only plain data travels. A value that does not pickle stays behind, alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import cloudpickle

from isolated_tasks import signals

__all__ = ["NOTHING", "Carried", "capture", "flush", "restored"]

logger = logging.getLogger(__name__)

#: Values by their names, each pickled by itself.
Values = dict[str, bytes]


@dataclass(frozen=True)
class Carried:
    """What goes to the child with one call."""

    #: By place, ``module:attribute`` or ``module:Class.attribute``.
    variables: Values = field(default_factory=dict)
    #: By library, see `_LIBRARIES`.
    libraries: dict[str, Values] = field(default_factory=dict)
    #: What receivers of `signals.before_isolated_call` gave.
    hook: Values = field(default_factory=dict)


#: There is nothing to carry.
NOTHING = Carried()


def capture(task: Any, task_id: str | None) -> Carried:
    """Collect, in the slot, what stands around a call that is about to be sent."""
    hook = _ask_receivers(task, task_id)
    variables = _capture_variables(copy_context())
    libraries = {}
    for library in _LIBRARIES:
        module = sys.modules.get(library.module)
        if module is not None:
            with _harmless(library, "its context is not carried to the child"):
                values = library.capture(module, task_id)
                if values:
                    libraries[library.module] = values
    if not (hook or variables or libraries):
        return NOTHING
    return Carried(variables, libraries, hook)


@contextlib.contextmanager
def restored(carried: Carried | None) -> Iterator[dict[str, Any]]:
    """Put in place, in the child, what was captured; for as long as the body runs.

    The block runs in a context of its own, a copy of the process's: whatever it sets, here or in
    the body, is gone after it.

    Yields:
        What receivers of `signals.before_isolated_call` gave.
    """
    carried = carried or NOTHING
    with _fresh_context(), contextlib.ExitStack() as stack:
        for place, pickled in carried.variables.items():
            _restore_variable(place, pickled)
        for library in _LIBRARIES:
            values = carried.libraries.get(library.module)
            module = sys.modules.get(library.module)
            if values and module is not None:
                with _harmless(library, "the body runs without its context"):
                    library.restore(module, _Loaded(library.module, values), stack)
        yield _load_hook(carried.hook)


def flush(timeout: float) -> None:
    """Send what libraries have buffered in this process, which is about to end.

    Args:
        timeout: For all of them together, in seconds.
    """
    deadline = time.monotonic() + timeout
    waiting: list[tuple[_Library, Callable[[float], object]]] = []
    for library in _LIBRARIES:
        module = sys.modules.get(library.module)
        if module is not None:
            with _harmless(library, "what it had buffered in a child is lost"):
                waiting.extend((library, send) for send in library.senders(module))
    if not waiting:
        return

    def send_all() -> None:
        for library, send in waiting:
            with _harmless(library, "what it had buffered in a child is lost"):
                send(max(0.0, deadline - time.monotonic()))

    # In a thread: an exporter may take no notice of a timeout (opentelemetry-python #4568).
    thread = threading.Thread(target=send_all, name="isolated_tasks flush", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        names = " and ".join(dict.fromkeys(library.module for library, _ in waiting))
        logger.warning(
            "%s could not send all that was buffered within %g s; the rest is lost", names, timeout
        )


# ── the hook ────────────────────────────────────────────────────────────────────────────────────


def _ask_receivers(task: Any, task_id: str | None) -> Values:
    if not signals.before_isolated_call.receivers:
        return {}
    carried: dict[str, Any] = {}
    signals.before_isolated_call.send(sender=task, task_id=task_id, carried=carried)
    pickled = {}
    for key, value in carried.items():
        try:
            pickled[key] = cloudpickle.dumps(value, protocol=5)
        except Exception as exc:
            logger.warning(
                "task %s[%s]: carried[%r], of type %s, does not come to the body: it cannot be "
                "pickled: %s",
                task.name,
                task_id,
                key,
                type(value).__qualname__,
                exc,
            )
    return pickled


def _load_hook(values: Values) -> dict[str, Any]:
    loaded = {}
    for key, pickled in values.items():
        try:
            loaded[key] = pickle.loads(pickled)
        except Exception as exc:
            logger.warning("carried[%r] does not come to the body: %r", key, exc)
    return loaded


# ── context variables ───────────────────────────────────────────────────────────────────────────

#: Packages whose variables stay behind: what belongs to this process or thread and not to the task,
#: which may be large and fail to pickle late, and what `_LIBRARIES` takes along in a better way.
_STAY_BEHIND = frozenset(
    {
        "asyncio",
        "eventlet",
        "flask",
        "gevent",
        "opentelemetry",
        "sentry_sdk",
        "structlog",
        "werkzeug",
    }
)

#: Where to import a variable from; None if it was looked for and is nowhere.
_places: dict[ContextVar[Any], str | None] = {}
#: More variables than any program has: one that makes them for each call must not fill the memory.
_MAX_PLACES = 10_000


def _capture_variables(context: Context) -> Values:
    if any(variable not in _places for variable in context):
        _find(set(context))
    pickled = {}
    for variable, value in context.items():
        place = _places.get(variable)
        if place is None:
            continue
        try:
            pickled[place] = _dump(value)
        except Exception as exc:
            logger.debug("context variable %s stays in the slot: %r", place, exc)
    return pickled


def _find(variables: set[ContextVar[Any]]) -> None:
    """Note the places of all variables that there are, and that the others of these have none."""
    if len(_places) > _MAX_PLACES:
        _places.clear()
    found: dict[ContextVar[Any], str] = {}
    # In the order of import, which an application's own modules begin: the first place in which
    # a variable is found is the likeliest to be in the child too.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _STAY_BEHIND or name in ("__main__", "__mp_main__"):
            continue
        for attribute, value in _attributes(module):
            if type(value) is ContextVar:
                found.setdefault(value, f"{name}:{attribute}")
            # Its type, not isinstance(): that asks proxies, and they would go and get their object.
            elif issubclass(type(value), type) and value.__module__ == name:
                for inner, part in list(vars(value).items()):
                    if type(part) is ContextVar:
                        found.setdefault(part, f"{name}:{attribute}.{inner}")
    _places.update(dict.fromkeys(variables))
    _places.update(found)


def _attributes(module: object) -> list[tuple[str, Any]]:
    # As object does it: a lazy module would load itself.
    try:
        return list(object.__getattribute__(module, "__dict__").items())
    except AttributeError:
        return []


def _restore_variable(place: str, pickled: bytes) -> None:
    try:
        _variable(place).set(pickle.loads(pickled))
    except Exception as exc:
        logger.debug("context variable %s does not come to the body: %r", place, exc)


@functools.cache
def _variable(place: str) -> ContextVar[Any]:
    module, _, path = place.partition(":")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    if type(value) is not ContextVar:
        raise TypeError(f"{place} is no context variable here")
    return value


# Looked up once: ctypes makes a function of each name that it is asked for.
_enter_context = ctypes.pythonapi.PyContext_Enter
_exit_context = ctypes.pythonapi.PyContext_Exit


@contextlib.contextmanager
def _fresh_context() -> Iterator[None]:
    """Run a block as ``copy_context().run()`` runs a function.

    Tokens would not do: they cannot take away what the body has set and has not reset.
    """
    context = ctypes.py_object(copy_context())
    _enter_context(context)
    try:
        yield
    finally:
        _exit_context(context)


# ── plain data ──────────────────────────────────────────────────────────────────────────────────


def _dump(value: object) -> bytes:
    """Pickle plain data; a function, or anything that holds one, is not to go by value."""
    pickled = pickle.dumps(value, protocol=5)
    # A class of the worker's __main__ is not to be found in the child's.
    return cloudpickle.dumps(value, protocol=5) if b"__main__" in pickled else pickled


def _dump_each(library: str, values: Mapping[str, Any]) -> Values:
    pickled = {}
    for name, value in values.items():
        try:
            pickled[name] = _dump(value)
        except Exception as exc:
            if isinstance(value, dict):
                # One level down, so that one bad tag does not cost the others.
                pickled[name] = _dump(_picklable(value))
            logger.debug("%s: %s stays in the slot, or a part of it: %r", library, name, exc)
    return pickled


def _picklable(values: Mapping[Any, Any]) -> dict[Any, Any]:
    left = {}
    for name, value in values.items():
        with contextlib.suppress(Exception):
            _dump((name, value))
            left[name] = value
    return left


class _Loaded(dict[str, Any]):
    """The values that can be loaded here."""

    def __init__(self, library: str, values: Values) -> None:
        super().__init__()
        for name, pickled in values.items():
            try:
                self[name] = pickle.loads(pickled)
            except Exception as exc:
                logger.debug("%s: %s does not come to the body: %r", library, name, exc)


# ── libraries ───────────────────────────────────────────────────────────────────────────────────


class _Library:
    """What plain variables do not do for one library."""

    #: The module that a program which uses it has imported.
    module: str

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        """Collect, in the slot."""
        return {}

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        """Put in place, in the child and in a context of its own."""

    def senders(self, module: ModuleType) -> Iterable[Callable[[float], object]]:
        """Functions that send what is buffered; they take the seconds that are left."""
        return ()


class _Structlog(_Library):
    """``bind_contextvars`` makes a variable for each key, when it is first bound."""

    module = "structlog.contextvars"

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        return _dump_each("structlog", module.get_contextvars())

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        module.bind_contextvars(**values)


class _OpenTelemetry(_Library):
    """Spans do not change process, so the current one becomes the remote parent, as over HTTP."""

    module = "opentelemetry.context"

    #: By the module that is loaded if there is a provider, the function that returns it.
    _PROVIDERS: Mapping[str, str] = {
        "opentelemetry.trace": "get_tracer_provider",
        "opentelemetry.metrics": "get_meter_provider",
        "opentelemetry._logs": "get_logger_provider",
    }

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        if not module.get_current():
            return {}
        carrier: dict[str, str] = {}
        importlib.import_module("opentelemetry.propagate").inject(carrier)
        return _dump_each("opentelemetry", carrier)

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        propagate = importlib.import_module("opentelemetry.propagate")
        module.attach(propagate.extract(values, module.Context()))

    def senders(self, module: ModuleType) -> Iterable[Callable[[float], object]]:
        for name, getter in self._PROVIDERS.items():
            if name in sys.modules:
                provider = getattr(sys.modules[name], getter)()
                # Where nobody has set one up, it is a proxy without this method.
                if hasattr(provider, "force_flush"):
                    yield functools.partial(self._send, provider)

    def _send(self, provider: Any, timeout: float) -> None:
        provider.force_flush(timeout_millis=int(timeout * 1000))


class _Sentry(_Library):
    """A scope holds the client, so its data travel; the trace as it does over HTTP.

    What a body raises is reported from the slot, where Sentry's integration with Celery is at work
    and has everything at hand, the body's frames included.
    """

    module = "sentry_sdk"

    #: What `Scope.clear` clears, but for what cannot change process: spans, sessions, attachments.
    _FIELDS = (
        "_level",
        "_fingerprint",
        "_transaction",
        "_transaction_info",
        "_user",
        "_tags",
        "_contexts",
        "_extras",
        "_breadcrumbs",
        "_attributes",
    )

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        client = module.get_client()
        if not client.is_active():
            return {}
        scope = module.get_isolation_scope().fork()
        scope.update_from_scope(module.get_current_scope())
        fields = {name: getattr(scope, name, None) for name in self._FIELDS}
        values = {name: value for name, value in fields.items() if value}
        if "celery" in client.integrations:
            # The integration adds it to each event of the slot.
            values["_tags"] = {**values.get("_tags", {}), "celery_task_id": task_id}
        values["headers"] = {
            "sentry-trace": module.get_traceparent(),
            "baggage": module.get_baggage(),
        }
        values["is_traced"] = module.get_current_span() is not None
        return _dump_each("sentry_sdk", values)

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        if not module.get_client().is_active():
            return
        # They are left again, for they are no copies where a context is copied.
        scope = stack.enter_context(module.isolation_scope())
        for one in (scope, module.get_current_scope()):
            one.clear()
        headers = values.pop("headers", {})
        is_traced = values.pop("is_traced", False)
        for name, value in values.items():
            setattr(scope, name, value)
        transaction = module.continue_trace(
            {name: value for name, value in headers.items() if value},
            op="function",
            name=values.get("_transaction"),
            source="task",
        )
        if is_traced:
            # Spans of the body need one to belong to, and to be told to whom the body sends.
            module.get_current_scope().span = module.start_transaction(transaction)
            stack.callback(self._finish, transaction)

    def _finish(self, transaction: Any) -> None:
        """Send a transaction that has spans; one more for every call would only cost."""
        with _harmless(self, "spans of a body are lost"):
            recorder = getattr(transaction, "_span_recorder", None)
            if recorder is not None and len(recorder.spans) > 1:
                transaction.finish()

    def senders(self, module: ModuleType) -> Iterable[Callable[[float], object]]:
        if module.get_client().is_active():
            yield lambda timeout: module.flush(timeout=timeout)


class _Django(_Library):
    """``activate()`` of a language or a time zone: its variables are not to be found by import."""

    module = "django.conf"

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        if not module.settings.configured:
            return {}
        values = {}
        translation = sys.modules.get("django.utils.translation")
        if translation is not None:
            language = translation.get_language()
            if language != module.settings.LANGUAGE_CODE:
                values["language"] = language
        timezone = sys.modules.get("django.utils.timezone")
        if timezone is not None:
            current = timezone.get_current_timezone()
            if current is not timezone.get_default_timezone():
                values["timezone"] = current
        return _dump_each("django", values)

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        if "language" in values:
            translation = importlib.import_module("django.utils.translation")
            if values["language"] is None:
                translation.deactivate_all()
            else:
                translation.activate(values["language"])
        if "timezone" in values:
            importlib.import_module("django.utils.timezone").activate(values["timezone"])


class _Decimal(_Library):
    """The arithmetic context stands in a variable of the C module, which nothing exports."""

    module = "decimal"

    def capture(self, module: ModuleType, task_id: str | None) -> Values:
        current = module.getcontext()
        if self._settings(current) == self._settings(module.DefaultContext):
            return {}
        return _dump_each("decimal", {"context": current})

    def restore(
        self, module: ModuleType, values: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        module.setcontext(values["context"])

    def _settings(self, context: Any) -> tuple[object, ...]:
        return (
            context.prec,
            context.rounding,
            context.Emin,
            context.Emax,
            context.capitals,
            context.clamp,
            context.traps,
        )


_LIBRARIES: tuple[_Library, ...] = (
    _Structlog(),
    _OpenTelemetry(),
    _Sentry(),
    _Django(),
    _Decimal(),
)

#: What has been said already, in this process.
_said: set[tuple[str, str]] = set()


@contextlib.contextmanager
def _harmless(library: _Library, consequence: str) -> Iterator[None]:
    """Log what goes wrong in a library's part, once for each process, and go on."""
    try:
        yield
    except Exception:
        if (library.module, consequence) not in _said:
            _said.add((library.module, consequence))
            logger.warning("%s failed: %s", library.module, consequence, exc_info=True)
