"""Task attributes and ``app.conf`` become options. The only place where units are converted.

An option is, in this order: what the task says (a decorator's option, an attribute of its class or
a base, ``task_annotations``), what ``app.conf`` says under ``isolated_<option>``, the default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isolated_tasks.errors import OptionError
from isolated_tasks.process.options import ProcessOptions

if TYPE_CHECKING:
    from celery import Celery

    from isolated_tasks.task import IsolatedMixin

__all__ = ["TASK_OPTIONS", "WorkerSettings", "is_isolated", "process_options", "worker_settings"]

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
    #: ``isolated_eager``: isolate outside a worker too (``apply()``, ``task_always_eager``).
    eager: bool = False
    #: ``isolated_boot_timeout``: a forkserver may take this long to load, in seconds.
    boot_timeout: float = 120.0
    #: ``isolated_start_timeout``: a call may wait this long for its child, in seconds.
    start_timeout: float = 60.0


def worker_settings(app: Celery) -> WorkerSettings:
    """Read and check the app's settings.

    Raises:
        OptionError: A setting has a value that cannot be used.
    """
    default = WorkerSettings()
    preload = app.conf.get("isolated_preload", default.preload)
    if isinstance(preload, str):
        preload = tuple(name for name in re.split(r"[\s,]+", preload) if name)
    if not isinstance(preload, list | tuple) or not all(isinstance(n, str) for n in preload):
        raise _refusal(None, "isolated_preload", preload, "must be a list of module names")
    forkservers = app.conf.get("isolated_forkservers", default.forkservers)
    if not isinstance(forkservers, int) or isinstance(forkservers, bool) or forkservers < 1:
        raise _refusal(None, "isolated_forkservers", forkservers, "must be a whole number above 0")
    return WorkerSettings(
        preload=tuple(preload),
        forkservers=forkservers,
        eager=bool(app.conf.get("isolated_eager", default.eager)),
        boot_timeout=_seconds(app, "isolated_boot_timeout", default.boot_timeout),
        start_timeout=_seconds(app, "isolated_start_timeout", default.start_timeout),
    )


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
    setting = "isolated_enabled" if name == "isolated" else f"isolated_{name}"
    # Not app.conf.<name>: Celery knows no third party's settings, and an unset one would raise.
    value = task.app.conf.get(setting)
    return TASK_OPTIONS[name] if value is None else value


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
    value = app.conf.get(setting, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _refusal(None, setting, value, "must be a number of seconds above 0")
    return float(value)


def _refusal(task: str | None, option: str, value: object, rule: str) -> OptionError:
    where = f"task {task!r}" if task else "app.conf"
    return OptionError(
        f"{where}: {option}={value!r}: {rule}",
        {"task": task, "option": option, "value": repr(value)},
    )
