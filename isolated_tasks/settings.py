"""Task attributes and ``app.conf`` become options. The only place where units are converted.

An option is, in this order: what the task says (a decorator's option, an attribute of its class or
a base, ``task_annotations``), what ``app.conf`` says under ``isolated_<option>``, the default.

A setting may have its old upper-case name, as Celery's own may. One that nobody knows is refused,
since Celery takes any name without a word.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.app.defaults import NAMESPACES, Namespace, Option

from isolated_tasks.errors import OptionError
from isolated_tasks.process.options import ProcessOptions

if TYPE_CHECKING:
    from celery import Celery

    from isolated_tasks.task import IsolatedMixin

__all__ = [
    "TASK_OPTIONS",
    "WorkerSettings",
    "check_names",
    "check_settings",
    "is_isolated",
    "process_options",
    "worker_settings",
]

#: Attributes of a task that are options, with their defaults. The setting that gives an app's own
#: default is ``isolated_`` and the name; that of ``isolated`` is ``isolated_enabled``.
TASK_OPTIONS: dict[str, Any] = {
    "isolated": True,
    "batch_size": 1,
    "batch_idle_timeout": 5.0,
    "batch_memory_limit": None,
    "start_method": "forkserver",
    "env": None,
}

#: How much of an attribute's name must agree with an option's for it to be a misspelt one, as
#: `difflib` counts: ``batchsize``, ``isolate`` and ``batch_idle_timout`` do, ``batch`` does not.
_MISSPELT = 0.85

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


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that belong to an app and not to a task."""

    #: ``isolated_preload``: modules that the forkserver imports, after the app.
    preload: tuple[str, ...] = ()
    #: ``isolated_forkservers``: how many forkservers a worker has.
    forkservers: int = 1
    #: ``isolated_worker_process_init``: send Celery's ``worker_process_init`` and
    #: ``worker_process_shutdown`` in each child, as in each pool process.
    worker_process_init: bool = True
    #: ``isolated_eager``: isolate outside a worker too (``apply()``, ``task_always_eager``).
    eager: bool = False
    #: ``isolated_boot_timeout``: a forkserver may take this long to load, in seconds.
    boot_timeout: float = 120.0
    #: ``isolated_start_timeout``: a call may wait this long for its child, in seconds.
    start_timeout: float = 60.0


def _setting_of(option: str) -> str:
    return "isolated_enabled" if option == "isolated" else f"isolated_{option}"


#: Of settings whose value is no text.
_COMMAND_LINE_TYPES = {
    "isolated_enabled": "bool",
    "isolated_batch_size": "int",
    "isolated_batch_idle_timeout": "float",
    "isolated_worker_process_init": "bool",
    "isolated_eager": "bool",
    "isolated_forkservers": "int",
    "isolated_boot_timeout": "float",
    "isolated_start_timeout": "float",
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
    if not isinstance(forkservers, int) or isinstance(forkservers, bool) or forkservers < 1:
        raise _refusal(None, "isolated_forkservers", forkservers, "must be a whole number above 0")
    return WorkerSettings(
        preload=tuple(preload),
        forkservers=forkservers,
        worker_process_init=_flag(app, "isolated_worker_process_init", default.worker_process_init),
        eager=_flag(app, "isolated_eager", default.eager),
        boot_timeout=_seconds(app, "isolated_boot_timeout", default.boot_timeout),
        start_timeout=_seconds(app, "isolated_start_timeout", default.start_timeout),
    )


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
    return bool(_option(task, "isolated")) and not (task.name or "").startswith("celery.")


def process_options(task: IsolatedMixin) -> ProcessOptions:
    """What the processes of a task are asked for.

    Raises:
        OptionError: An option has a value that cannot be used.
    """
    limit = _option(task, "batch_memory_limit")
    env = _option(task, "env")
    if env is not None and not isinstance(env, Mapping):
        raise _refusal(task.name, "env", env, "must map names of variables to strings")
    return ProcessOptions(
        name=task.name,
        start_method=_option(task, "start_method"),
        batch_size=_option(task, "batch_size"),
        batch_idle_timeout=_option(task, "batch_idle_timeout"),
        batch_memory_limit_bytes=(
            None if limit is None else _bytes(task.name, "batch_memory_limit", limit)
        ),
        env=dict(env or {}),
        start_timeout=_seconds(task.app, "isolated_start_timeout", WorkerSettings.start_timeout),
    )


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


def _bytes(task: str | None, option: str, value: object) -> int:
    """A size: a number of bytes, or a string such as ``"1.5GiB"``, ``"512 MB"``."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        size = int(float(match[1]) * unit) if match and unit else 0
        if size > 0:
            return size
    raise _refusal(
        task, option, value, "must be a number of bytes above 0, or a size such as '512MiB'"
    )


def _seconds(app: Celery, setting: str, default: float) -> float:
    value = _setting(app, setting, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _refusal(None, setting, value, "must be a number of seconds above 0")
    return float(value)


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
