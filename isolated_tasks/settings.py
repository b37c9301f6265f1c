"""Task attributes and ``app.conf`` become options. The only place where units are converted.

An option is, in this order: what the task says (a decorator's option, an attribute of its class or
a base, ``task_annotations``), what ``app.conf`` says under ``isolated_<option>``, the default.

A setting may have its old upper-case name, as Celery's own may. One that nobody knows is refused,
since Celery takes any name without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import operator
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import kombu.exceptions
import kombu.serialization
from celery.app.defaults import NAMESPACES, Namespace, Option
from celery.app.task import Task

from isolated_tasks.errors import OptionError
from isolated_tasks.process.options import (
    MAX_INTEGER,
    MIN_RESULT_BYTES,
    CallOptions,
    ProcessOptions,
)

if TYPE_CHECKING:
    from celery import Celery

    from isolated_tasks.task import IsolatedMixin

__all__ = [
    "PROFILERS",
    "TASK_OPTIONS",
    "MemoryStep",
    "Profiling",
    "SlotSettings",
    "WorkerSettings",
    "check_names",
    "check_settings",
    "check_task",
    "for_slot",
    "is_isolated",
    "memory_audit_of",
    "memory_ladder",
    "nothing_isolated",
    "process_options",
    "profiling",
    "result_codec",
    "result_serializer",
    "size_bytes",
    "spares_of",
    "worker_settings",
]

#: Attributes of a task that are options, with their defaults. The setting that gives an app's own
#: default is ``isolated_`` and the name; that of ``isolated`` is ``isolated_enabled``.
TASK_OPTIONS: dict[str, Any] = {
    "isolated": True,
    "batch_size": 1,
    "batch_idle_timeout": 5.0,
    "batch_memory_limit": None,
    "memory_limit": None,
    "soft_memory_limit": None,
    "cpu_time_limit": None,
    "nice": None,
    "max_open_files": None,
    "keep_children": False,
    "max_result_bytes": ProcessOptions.max_result_bytes,
    "result_serializer": None,
    "start_method": "forkserver",
    "env": None,
    "profile": None,
    "profile_every": 1,
    "profile_directory": None,
}

#: What ``profile`` may be.
PROFILERS = ("memray", "tracemalloc")

#: How much of an attribute's name must agree with an option's for it to be a misspelt one, as
#: `difflib` counts: ``batchsize``, ``isolate`` and ``batch_idle_timout`` do, ``batch`` does not.
_MISSPELT = 0.85

#: The last one that there is in TCP.
MAX_PORT = 65535

_UNITS = {
    "": 1,
    "b": 1,
    **{
        f"{prefix}{suffix}": 1000**power
        for power, prefix in enumerate("kmgt", 1)
        for suffix in ("", "b")
    },
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


# ── kept from one call to the next ──────────────────────────────────────────────────────────────

C = TypeVar("C", bound=Callable[..., Any])


@dataclass
class _Kept:
    """What was made of all that a task and its app said at one time."""

    said: tuple[object, ...]
    made: dict[object, Any] = field(default_factory=dict)


#: By task.
_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


def _while_unchanged(function: C) -> C:
    """Call a function of a task once, and again only when its options or settings are others.

    Every call asks for all options, and Celery's configuration takes its time to answer. Here a
    change is seen without asking for each: settings are changed in ``app.conf.changes`` alone.
    """

    @functools.wraps(function)
    def cached(task: IsolatedMixin, **keywords: Any) -> Any:
        said = _all_said(task)
        kept = _kept.get(task)
        if kept is None or kept.said != said:
            kept = _kept[task] = _Kept(said)
        key = (function, *keywords.items())
        if key not in kept.made:
            kept.made[key] = function(task, **keywords)
        return kept.made[key]

    return cached  # type: ignore[return-value]


def _all_said(task: IsolatedMixin) -> tuple[object, ...]:
    if getattr(task.app.conf, "changes", None) is None:
        # Before the configuration is read there are none; asking for anything has it read.
        _ = task.app.conf.timezone
    conf = task.app.conf
    values = _options_of(task)
    if not _UNCHANGEABLE.issuperset(map(type, values)):
        # Copies: what is compared must not be what is changed in place.
        values = tuple(map(_copy, values))
    return (values, dict(conf.changes), len(conf.maps))


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list) else value


_options_of = operator.attrgetter(*TASK_OPTIONS)
_UNCHANGEABLE = frozenset({type(None), bool, int, float, str, tuple})


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that belong to an app and not to a task."""

    #: ``isolated_preload``: modules that the forkserver imports, after the app.
    preload: tuple[str, ...] = ()
    #: ``isolated_forkservers``: how many forkservers a worker has.
    forkservers: int = 1
    #: ``isolated_forkserver_max_calls``: a forkserver that has started so many children is replaced
    #: by a fresh one, without a pause; None for never.
    forkserver_max_calls: int | None = None
    #: ``isolated_spares``: so many children of each process that has slots are forked ahead, each
    #: for the next call of a task that was called twice in a row.
    spares: int = 1
    #: ``isolated_worker_process_init``: send Celery's ``worker_process_init`` and
    #: ``worker_process_shutdown`` in each child, as in each pool process.
    worker_process_init: bool = True
    #: ``isolated_eager``: isolate outside a worker too (``apply()``, ``task_always_eager``).
    eager: bool = False
    #: ``isolated_boot_timeout``: a forkserver may take this long to load, in seconds.
    boot_timeout: float = 120.0
    #: ``isolated_start_timeout``: a call may wait this long for its child, in seconds.
    start_timeout: float = 60.0
    #: ``isolated_term_grace``: what a body that is told to end gets for it, in seconds.
    term_grace: float = 5.0
    #: ``isolated_memory_budget``: what the memory limits of all children of a worker may come to,
    #: in bytes; ``"auto"`` for what there is; None for no bound.
    memory_budget: int | str | None = None
    #: ``isolated_max_redeliveries``: how often a message whose child was lost goes back to the
    #: broker, where the task has ``acks_late`` and ``reject_on_worker_lost``.
    max_redeliveries: int = 3
    #: ``isolated_memory_audit``: measure plain tasks as they run.
    memory_audit: bool = False
    #: ``isolated_prometheus_port``: where a worker serves Prometheus metrics; 0 for any port that
    #: is free, None for not at all.
    prometheus_port: int | None = None
    #: ``isolated_prometheus_host``: the address that it listens at.
    prometheus_host: str = "0.0.0.0"


@dataclass(frozen=True)
class MemoryStep:
    """One step of a task's ``memory_limit``."""

    limit_bytes: int
    #: Where the attempt with this limit is sent; None for where the one before was.
    queue: str | None = None


@dataclass(frozen=True)
class Profiling:
    """Which calls of a task are profiled, and where the profiles go."""

    #: One of `PROFILERS`; None for no call, but those whose message asks for it.
    profiler: str | None
    #: One call in so many.
    every: int
    #: An absolute path; None for one of this user's own.
    directory: str | None


@dataclass(frozen=True)
class SlotSettings:
    """What a slot asks for with each call: in one look, since a look at all options takes time."""

    #: ``isolated_spares``.
    spares: int
    profiling: Profiling


def _setting_of(option: str) -> str:
    return "isolated_enabled" if option == "isolated" else f"isolated_{option}"


#: Of settings whose value is no text.
_COMMAND_LINE_TYPES = {
    "isolated_enabled": "bool",
    "isolated_batch_size": "int",
    "isolated_batch_idle_timeout": "float",
    "isolated_cpu_time_limit": "int",
    "isolated_nice": "int",
    "isolated_max_open_files": "int",
    "isolated_keep_children": "bool",
    "isolated_profile_every": "int",
    "isolated_term_grace": "float",
    "isolated_max_redeliveries": "int",
    "isolated_worker_process_init": "bool",
    "isolated_eager": "bool",
    "isolated_forkservers": "int",
    "isolated_forkserver_max_calls": "int",
    "isolated_spares": "int",
    "isolated_memory_audit": "bool",
    "isolated_boot_timeout": "float",
    "isolated_start_timeout": "float",
    "isolated_prometheus_port": "int",
    "isolated_prometheus_host": "string",
}

#: Every setting.
SETTINGS = frozenset(
    {
        *(_setting_of(option) for option in TASK_OPTIONS),
        *(f"isolated_{field.name}" for field in dataclasses.fields(WorkerSettings)),
    }
)

# Celery's parser of `celery worker -- isolated.batch_size=4` asks here for the type of a value, and
# knows no other way to be told.
NAMESPACES["isolated"] = Namespace(
    **{
        name.removeprefix("isolated_"): Option(type=_COMMAND_LINE_TYPES.get(name, "any"))
        for name in sorted(SETTINGS)
    }
)


def worker_settings(app: Celery) -> WorkerSettings:
    """Read and check the app's settings.

    Raises:
        OptionError: A setting has a value that cannot be used.
    """
    default = WorkerSettings()
    preload = _setting(app, "isolated_preload", default.preload)
    if isinstance(preload, str):
        preload = tuple(name for name in re.split(r"[\s,]+", preload) if name)
    if not isinstance(preload, list | tuple) or not all(isinstance(n, str) for n in preload):
        raise _refusal(None, "isolated_preload", preload, "must be a list of module names")
    forkservers = _setting(app, "isolated_forkservers", default.forkservers)
    max_calls = _setting(app, "isolated_forkserver_max_calls", default.forkserver_max_calls)
    rule = "must be a whole number above 0"
    if not _is_count(forkservers) or not forkservers:
        raise _refusal(None, "isolated_forkservers", forkservers, rule)
    if max_calls is not None and not (_is_count(max_calls) and max_calls):
        raise _refusal(None, "isolated_forkserver_max_calls", max_calls, rule)
    max_redeliveries = _setting(app, "isolated_max_redeliveries", default.max_redeliveries)
    if not _is_count(max_redeliveries):
        rule = "must be a whole number, 0 or more"
        raise _refusal(None, "isolated_max_redeliveries", max_redeliveries, rule)
    spares = spares_of(app)
    return WorkerSettings(
        preload=tuple(preload),
        forkservers=forkservers,
        forkserver_max_calls=max_calls,
        spares=spares,
        worker_process_init=_flag(app, "isolated_worker_process_init", default.worker_process_init),
        eager=_flag(app, "isolated_eager", default.eager),
        boot_timeout=_seconds(app, "isolated_boot_timeout", default.boot_timeout),
        start_timeout=_seconds(app, "isolated_start_timeout", default.start_timeout),
        term_grace=_seconds(app, "isolated_term_grace", default.term_grace),
        memory_budget=_memory_budget(app, forkservers),
        max_redeliveries=max_redeliveries,
        memory_audit=memory_audit_of(app),
        prometheus_port=_port(app, "isolated_prometheus_port"),
        prometheus_host=_host(app, "isolated_prometheus_host", default.prometheus_host),
    )


def spares_of(app: Celery) -> int:
    """``isolated_spares``, checked; it is asked for with each call.

    Raises:
        OptionError: It has a value that cannot be used.
    """
    spares: object = _setting(app, "isolated_spares", WorkerSettings.spares)
    if not _is_count(spares):
        raise _refusal(None, "isolated_spares", spares, "must be a whole number, 0 or more")
    assert isinstance(spares, int)
    return spares


@_while_unchanged
def for_slot(task: IsolatedMixin) -> SlotSettings:
    """What a slot asks for with each call of a task.

    Raises:
        OptionError: An option or a setting has a value that cannot be used.
    """
    return SlotSettings(spares_of(task.app), profiling(task))


def memory_audit_of(app: Celery) -> bool:
    """``isolated_memory_audit``, checked.

    Raises:
        OptionError: It has a value that cannot be used.
    """
    value: object = _setting(app, "isolated_memory_audit", WorkerSettings.memory_audit)
    if not isinstance(value, bool):
        raise _refusal(None, "isolated_memory_audit", value, "must be True or False")
    return value


def _memory_budget(app: Celery, forkservers: int) -> int | str | None:
    budget = _setting(app, "isolated_memory_budget", None)
    if budget is None:
        return None
    if forkservers > 1:
        rule = "each forkserver knows of its own children alone, so isolated_forkservers must be 1"
        raise _refusal(None, "isolated_memory_budget", budget, rule)
    if budget == "auto":
        return "auto"
    return _bytes(None, "isolated_memory_budget", budget, also=", or 'auto'")


def check_settings(app: Celery) -> None:
    """Refuse settings that begin with ``isolated_`` and do not exist.

    Raises:
        OptionError: There is one; the error suggests the right name.
    """
    names = list(app.conf)
    # Known only when the configuration has been read.
    prefix = app.conf.prefix or ""
    for name in names:
        known_as = name.removeprefix(prefix).lower()
        if known_as.startswith("isolated_") and known_as not in SETTINGS:
            rule = f"there is no such setting{_meant(known_as, SETTINGS)}"
            raise _refusal(None, name, app.conf[name], rule)


def check_names(cls: type[Any]) -> None:
    """Refuse attributes of a task that look like a misspelt option.

    A task may have any attribute, so only what is close to an option and is no function is taken
    for one.

    Raises:
        OptionError: There is one; the error suggests the right name.
    """
    for base in cls.__mro__:
        if base.__module__.startswith(("celery.", "isolated_tasks.")) or base is object:
            continue
        for name, value in vars(base).items():
            if name in TASK_OPTIONS or name.startswith("_") or _is_code(value):
                continue
            if name in vars(Task):
                # Celery's own, such as time_limit. (Asking for Task.app would bind it.)
                continue
            option = name.removeprefix("isolated_")
            if option in TASK_OPTIONS:
                hint = f", did you mean {option!r}?"
            elif difflib.get_close_matches(name, TASK_OPTIONS, cutoff=_MISSPELT):
                hint = _meant(name, TASK_OPTIONS)
            else:
                continue
            raise _refusal(cls.name, name, value, f"there is no such option{hint}")


def is_isolated(task: IsolatedMixin) -> bool:
    """Whether calls of this task by a worker run in a child.

    Celery's own tasks never do, also where ``Celery(task_cls=…)`` makes them `IsolatedTask`: they
    are the worker's own work, and light.
    """
    return not _nothing_isolated and _is_isolated(task)


@contextlib.contextmanager
def nothing_isolated() -> Iterator[None]:
    """Have no task of this process isolated for a while; see `isolated_tasks.testing.in_place`."""
    global _nothing_isolated
    _nothing_isolated += 1
    try:
        yield
    finally:
        _nothing_isolated -= 1


#: So many have asked for that.
_nothing_isolated = 0


@_while_unchanged
def _is_isolated(task: IsolatedMixin) -> bool:
    return bool(_option(task, "isolated")) and not (task.name or "").startswith("celery.")


def check_task(task: IsolatedMixin) -> None:
    """Refuse options of a task that cannot be used, Celery's time limits among them.

    Raises:
        OptionError: There is one.
    """
    process_options(task)
    profiling(task)
    CallOptions(
        task.name,
        soft_time_limit=getattr(task, "soft_time_limit", None) or None,
        time_limit=getattr(task, "time_limit", None) or None,
    )


@_while_unchanged
def memory_ladder(task: IsolatedMixin) -> tuple[MemoryStep, ...]:
    """The steps of a task's ``memory_limit``; empty where it has none.

    Raises:
        OptionError: It is neither a size nor a sequence of rising ones.
    """
    value = _option(task, "memory_limit")
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        return (MemoryStep(_bytes(task.name, "memory_limit", value)),)
    steps = tuple(_memory_step(task.name, value, step) for step in value)
    limits = [step.limit_bytes for step in steps]
    if not steps or limits != sorted(set(limits)):
        raise _refusal(task.name, "memory_limit", value, "each step must be above the one before")
    return steps


def _memory_step(task: str, ladder: object, step: object) -> MemoryStep:
    queue = None
    if isinstance(step, list | tuple):
        if len(step) != 2 or not isinstance(step[1], str) or not step[1]:
            rule = "a step must be a size, or a pair of a size and the name of a queue"
            raise _refusal(task, "memory_limit", ladder, rule)
        step, queue = step
    return MemoryStep(_bytes(task, "memory_limit", step, whole=ladder), queue)


@_while_unchanged
def process_options(task: IsolatedMixin, *, step: int = 0) -> ProcessOptions:
    """What the processes of a task are asked for.

    Args:
        task: Which.
        step: Of its ``memory_limit``, where that is a ladder.

    Raises:
        OptionError: An option has a value that cannot be used.
    """
    ladder = memory_ladder(task)
    hard = ladder[min(step, len(ladder) - 1)].limit_bytes if ladder else None
    soft = _optional_bytes(task, "soft_memory_limit")
    if soft is not None and hard is not None and soft > hard:
        rule = f"is above memory_limit, {hard} bytes"
        raise _refusal(task.name, "soft_memory_limit", _option(task, "soft_memory_limit"), rule)
    env = _option(task, "env")
    if env is not None and not isinstance(env, Mapping):
        raise _refusal(task.name, "env", env, "must map names of variables to strings")
    return ProcessOptions(
        name=task.name,
        start_method=_option(task, "start_method"),
        batch_size=_option(task, "batch_size"),
        batch_idle_timeout=_option(task, "batch_idle_timeout"),
        batch_memory_limit_bytes=_optional_bytes(task, "batch_memory_limit"),
        memory_limit_bytes=hard,
        soft_memory_limit_bytes=soft,
        cpu_time_limit=_option(task, "cpu_time_limit"),
        nice=_option(task, "nice"),
        max_open_files=_option(task, "max_open_files"),
        keep_children=_option(task, "keep_children"),
        max_result_bytes=_bytes(
            task.name, "max_result_bytes", _option(task, "max_result_bytes"), least=MIN_RESULT_BYTES
        ),
        plain_outcomes=result_codec(task) is not None,
        env=dict(env or {}),
        start_timeout=_seconds(task.app, "isolated_start_timeout", WorkerSettings.start_timeout),
        term_grace=_seconds(task.app, "isolated_term_grace", WorkerSettings.term_grace),
    )


@_while_unchanged
def result_serializer(task: IsolatedMixin) -> str | None:
    """The name of the serializer by which a task's result comes from its child, if it has one."""
    name: str | None = _option(task, "result_serializer")
    return name


@_while_unchanged
def result_codec(task: IsolatedMixin) -> tuple[str, str] | None:
    """Content type and encoding of a task's ``result_serializer``; None where it has none.

    Raises:
        OptionError: Kombu has no serializer of that name, or it is the one that this replaces.
    """
    name = result_serializer(task)
    if name is None:
        return None
    if name == "pickle":
        rule = "results are pickled where it is None; it is for results that are not to be"
        raise _refusal(task.name, "result_serializer", name, rule)
    try:
        content_type, encoding, _ = kombu.serialization.dumps(None, serializer=name)
    except (kombu.exceptions.KombuError, TypeError, KeyError) as exc:
        rule = f"must be the name of a serializer: {exc}"
        raise _refusal(task.name, "result_serializer", name, rule) from exc
    return content_type, encoding


def profiling(task: IsolatedMixin) -> Profiling:
    """Which calls of a task are profiled, and where the profiles go.

    Raises:
        OptionError: An option has a value that cannot be used.
    """
    profiler = _option(task, "profile")
    if profiler is not None and profiler not in PROFILERS:
        rule = f"must be {' or '.join(map(repr, PROFILERS))}"
        raise _refusal(task.name, "profile", profiler, rule)
    every = _option(task, "profile_every")
    if not _is_count(every) or not every:
        raise _refusal(task.name, "profile_every", every, "must be a whole number above 0")
    directory = _option(task, "profile_directory")
    if directory is not None and not _is_absolute(directory):
        # What it would be relative to differs from process to process.
        rule = "must be the absolute path of a directory"
        raise _refusal(task.name, "profile_directory", directory, rule)
    return Profiling(profiler, every, None if directory is None else os.fspath(directory))


def _optional_bytes(task: IsolatedMixin, option: str) -> int | None:
    value = _option(task, option)
    return None if value is None else _bytes(task.name, option, value)


def size_bytes(task: str, option: str, value: object) -> int:
    """A size that somebody has said of a task: bytes, or a string such as ``"5MB"``.

    Raises:
        OptionError: It cannot be used.
    """
    return _bytes(task, option, value)


def _option(task: IsolatedMixin, name: str) -> Any:
    value = getattr(task, name)
    if value is not None:
        return value
    return _setting(task.app, _setting_of(name), TASK_OPTIONS[name])


def _setting(app: Celery, name: str, default: Any) -> Any:
    # Not app.conf.<name>: Celery knows no third party's settings, and an unset one would raise.
    # Nor does it translate their old names.
    for spelling in (name, name.upper()):
        value = app.conf.get(spelling)
        if value is not None:
            return value
    return default


def _bytes(
    task: str | None,
    option: str,
    value: object,
    *,
    whole: object = None,
    also: str = "",
    least: int = 1,
) -> int:
    """A size: a number of bytes, or a string such as ``"1.5GiB"``, ``"512 MB"``.

    Args:
        task: Whose option it is.
        option: Its name.
        value: What it says.
        whole: What it is a part of, for the error.
        also: What else may be said, for the error.
        least: What it has to be.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_INTEGER:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        size = float(match[1]) * unit if match and unit else 0
        if least <= size <= MAX_INTEGER:
            return int(size)
    above = f"above {least - 1}" if least == 1 else f"from {least} on"
    rule = f"must be a number of bytes {above}, or a size such as '512MiB'{also}"
    if whole is not None:
        rule = f"{value!r}: {rule}"
    raise _refusal(task, option, value if whole is None else whole, rule)


def _seconds(app: Celery, setting: str, default: float) -> float:
    value = _setting(app, setting, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _refusal(None, setting, value, "must be a number of seconds above 0")
    return float(value)


def _port(app: Celery, setting: str) -> int | None:
    value = _setting(app, setting, None)
    if value is None:
        return None
    if not _is_count(value) or value > MAX_PORT:
        raise _refusal(None, setting, value, f"must be a port, a whole number up to {MAX_PORT}")
    assert isinstance(value, int)
    return value


def _host(app: Celery, setting: str, default: str) -> str:
    value = _setting(app, setting, default)
    if not isinstance(value, str) or not value:
        raise _refusal(None, setting, value, "must be a name or an address of this machine")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_absolute(path: object) -> bool:
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    return isinstance(path, str) and os.path.isabs(path) and "\0" not in path


def _flag(app: Celery, setting: str, default: bool) -> bool:
    return bool(_setting(app, setting, default))


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(value, "__get__")


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _refusal(task: str | None, option: str, value: object, rule: str) -> OptionError:
    where = f"task {task!r}" if task else "app.conf"
    return OptionError(
        f"{where}: {option}={value!r}: {rule}",
        {"task": task, "option": option, "value": repr(value)},
    )
