"""Celery tasks whose bodies run in short-lived processes, so that memory is given back.

The package has two wings, and imports point down only (a test says so)::

    testing/    for the tests of projects: an embedded worker, pytest's fixtures, a check for growth
    commands/   `celery isolated …`: audit, top; and our options of `celery worker`
    auditor     collects what the workers' audits send, and what comes of it
    audit       measures plain tasks as they run, in the worker
    advice      what the figures of a plain task come to
    worker      the bootstep that starts and stops the forkserver
    remote      what a worker answers to `celery inspect isolated`
    prometheus  metrics of what calls used, and of the forkserver
    task        IsolatedTask: decides who runs a call, and where
    calls       one call, from its slot: what travels, what comes back
    failures    what a call fails with
    request     what the main process does about a call: limits, revocation, acknowledgement
    losses      how the children of one message were lost so far
    usage       where one finds what a call used
    requester   what the slots of a process share: children, and the way to a forkserver
    body        inside the child: rebuild task.request, run the body
    encoded     what comes back where nothing of a body's is to be unpickled
    byvalue     tasks that the forkserver cannot import
    django      a Django project's set-up and connections, in forkserver and child
    profiles    memory profiles of calls: which, where, and around the body
    context     what code keeps around a task: context variables, tracing, bound log fields
    signals     our own signals, sent in the slot and in the child
    settings    task attributes and app.conf become options
    ──────────  below this line nothing knows of Celery
    process/    run any callable in a child: see its own map
    ──────────
    errors      every exception; imports nothing

What is exported here, the ``isolated_*`` settings, ``isolated_tasks.errors``,
``isolated_tasks.signals``, ``isolated_tasks.testing``, ``isolated_tasks.audit.install`` and
``isolated_tasks.prometheus.register`` are public; everything else may change. Names are loaded on
first use (PEP 562), because the forkserver and a spawned child import this package too and must be
free to do so without Celery.

PYTEST_DONT_REWRITE: a package with a plugin of pytest is one whose assertions pytest rewrites; it
warns where it comes too late, as when this module was imported before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isolated_tasks.errors import (
        ChildLostError,
        CPUTimeLimitExceeded,
        ForkserverError,
        IsolationError,
        MemoryLimitExceeded,
        OpenFilesLimitExceeded,
        OptionError,
        OutOfMemoryError,
        ProtocolError,
        RemoteError,
        ResultTooLargeError,
        SoftMemoryLimitExceeded,
        UnpicklableError,
    )
    from isolated_tasks.process.usage import ExitReason, Usage
    from isolated_tasks.task import IsolatedMixin, IsolatedTask

__version__ = "0.1.0"

__all__ = [
    "CPUTimeLimitExceeded",
    "ChildLostError",
    "ExitReason",
    "ForkserverError",
    "IsolatedMixin",
    "IsolatedTask",
    "IsolationError",
    "MemoryLimitExceeded",
    "OpenFilesLimitExceeded",
    "OptionError",
    "OutOfMemoryError",
    "ProtocolError",
    "RemoteError",
    "ResultTooLargeError",
    "SoftMemoryLimitExceeded",
    "UnpicklableError",
    "Usage",
    "__version__",
]

_MODULE_OF = {
    "ExitReason": "isolated_tasks.process.usage",
    "Usage": "isolated_tasks.process.usage",
    "IsolatedMixin": "isolated_tasks.task",
    "IsolatedTask": "isolated_tasks.task",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULE_OF.get(name, "isolated_tasks.errors"))
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
