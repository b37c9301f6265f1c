"""Every exception that this package raises.

::

    IsolationError            the root
    ├── OptionError           an option or a setting has a value that cannot be used (a ValueError)
    ├── UnpicklableError      an argument, a result or an exception cannot be pickled
    ├── ForkserverError       no child could be started
    ├── ChildLostError        a child exited without an outcome
    ├── OutOfMemoryError      the body raised a MemoryError
    ├── RemoteError           stands for an exception of the body that cannot leave its process
    └── ProtocolError         a peer sent bytes that are not a message

Each takes a message and a mapping of plain data, and shows the data as attributes. Both are kept
in ``args``, so that an error arrives whole through pickle and through Celery's JSON results, which
rebuild an exception as ``cls(*args)``.

None of these is a ``MemoryError``, a ``WorkerLostError`` or a ``Terminated``: Celery takes the
first for the end of the worker, reports the second twice, and turns the third into ``REVOKED``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "ChildLostError",
    "ForkserverError",
    "IsolationError",
    "OptionError",
    "OutOfMemoryError",
    "ProtocolError",
    "RemoteError",
    "UnpicklableError",
]


class IsolationError(Exception):
    """The root of all errors of this package.

    Args:
        message: What happened, in words.
        data: Values for the attributes that the class names in ``fields``; plain data only.
    """

    #: The names of the attributes that this class takes from ``data``; a missing one is None.
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", data: Mapping[str, Any] | None = None) -> None:
        given = dict(data or {})
        super().__init__(*((message, given) if given else (message,)))
        for field in self.fields:
            setattr(self, field, given.get(field))

    def __str__(self) -> str:
        return str(self.args[0])


class OptionError(IsolationError, ValueError):
    """A task option or an ``isolated_*`` setting has a value that cannot be used."""

    fields = ("task", "option", "value")

    #: The task's name; None where the value is the app's.
    task: str | None
    #: The option or setting.
    option: str
    #: ``repr()`` of the value.
    value: str


class UnpicklableError(IsolationError):
    """An argument, a result or an exception cannot be pickled, so it cannot change process.

    Raised in the slot; for an argument before any child has been asked for.
    """

    fields = ("path", "type_name", "reason")

    #: Where the object is, as an expression: ``args[1]["conn"]``, ``result.session``.
    path: str
    #: The qualified name of its type.
    type_name: str
    #: What pickle said.
    reason: str


class ForkserverError(IsolationError):
    """No child could be started, so the body has not begun.

    The forkserver could not be reached, died while it loaded, refused, or did not bring a child
    up within ``isolated_start_timeout`` seconds.
    """

    fields = ("address", "errno")

    #: The socket that was tried.
    address: str | None
    #: The system's error number, where there was one.
    errno: int | None


class ChildLostError(IsolationError):
    """A child exited without an outcome: it crashed, was killed, or ended itself."""

    fields = (
        "task",
        "pid",
        "exit_code",
        "signal",
        "started",
        "peak_rss_bytes",
        "user_seconds",
        "system_seconds",
        "crash_traceback",
    )

    #: The name of the task, or of the callable.
    task: str | None
    #: The child's process id; None where it never became known.
    pid: int | None
    #: The exit code: a status of 0 or more, or minus the signal; None where nobody could tell.
    exit_code: int | None
    #: The signal by name (``"SIGSEGV"``); None where there was none.
    signal: str | None
    #: Whether the body had begun.
    started: bool
    #: The highest resident memory of the process, in bytes; None where unknown.
    peak_rss_bytes: int | None
    #: CPU time of the process and the children it waited for, in seconds; None where unknown.
    user_seconds: float | None
    system_seconds: float | None
    #: What faulthandler wrote as the process crashed: the Python frames of every thread.
    crash_traceback: str


class OutOfMemoryError(IsolationError):
    """The body raised a ``MemoryError``, which only its own process ran out of.

    It is the cause (``__cause__``) of this error, which Celery can report like any other. A bare
    ``MemoryError`` makes Celery stop the whole worker.
    """


class RemoteError(IsolationError):
    """Stands for an exception of the body that cannot be raised where the task was called.

    It can neither be pickled nor be taken apart; or it is no ``Exception``, as ``SystemExit`` and
    ``KeyboardInterrupt`` are, and would end the slot instead of the call.
    """

    fields = ("type_name", "text")

    #: The qualified name of the exception's type.
    type_name: str
    #: Its message.
    text: str


class ProtocolError(IsolationError):
    """A peer sent bytes that are not a message, or a message that cannot come now."""
