"""Every exception that this package raises.

::

    IsolationError            the root
    ├── OptionError           an option or a setting has a value that cannot be used (a ValueError)
    ├── UnpicklableError      an argument, a result or an exception cannot be pickled
    ├── ForkserverError       no child could be started, or none has begun in time
    ├── ChildLostError        a child exited without an outcome
    ├── OutOfMemoryError      the body raised a MemoryError
    │   ├── SoftMemoryLimitExceeded   … because of its soft_memory_limit
    │   └── MemoryLimitExceeded       it held more than its memory_limit, and was killed
    ├── CPUTimeLimitExceeded  it used more CPU time than its cpu_time_limit, and was killed
    ├── OpenFilesLimitExceeded  it had as many files open as its max_open_files
    ├── ResultTooLargeError   a result has more bytes than max_result_bytes
    ├── RemoteError           stands for an exception of the body that cannot leave its process
    └── ProtocolError         a peer sent bytes that are not a message

Each takes a message and a mapping of plain data, and shows the data as attributes. Both are kept
in ``args``, so that an error arrives whole through pickle and through Celery's JSON results, which
rebuild an exception as ``cls(*args)``.

A hard time limit is Celery's own ``TimeLimitExceeded``, a soft one its ``SoftTimeLimitExceeded``.
None of these is a ``MemoryError``, a ``WorkerLostError`` or a ``Terminated``: Celery takes the
first for the end of the worker, reports the second twice, and turns the third into ``REVOKED``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "CPUTimeLimitExceeded",
    "ChildLostError",
    "ForkserverError",
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

    #: Where the object is, as an expression, such as ``args[1]["conn"]`` or ``result.session``.
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

    fields = ("address", "errno", "pid")

    #: The socket that was tried.
    address: str | None
    #: The system's error number, where there was one.
    errno: int | None
    #: The child that was too late; None where there was none, or its number never became known.
    pid: int | None


class _EndedChild:
    """What there is to know of a child that has ended before its time."""

    #: The name of the task, or of the callable.
    task: str | None
    #: The id of the message that it was called for; None for a direct call.
    task_id: str | None
    #: The child's process id; None where it never became known.
    pid: int | None
    #: A status of 0 or more, or minus the signal; None where nobody could tell.
    exit_code: int | None
    #: The signal by name (``"SIGSEGV"``); None where there was none.
    signal: str | None
    #: Whether the body had begun, and not just what comes before it in a new process.
    started: bool
    #: The highest resident memory of the process, in bytes; None where unknown.
    peak_rss_bytes: int | None
    #: CPU time of the process and the children it waited for, in seconds; None where unknown.
    user_seconds: float | None
    system_seconds: float | None
    #: The Python frames of every thread, which faulthandler wrote as the process ended.
    crash_traceback: str
    #: The last lines that the body wrote on stderr; empty where that is a terminal.
    stderr: str


_OF_ITS_END = tuple(_EndedChild.__annotations__)


class ChildLostError(IsolationError, _EndedChild):
    """A child exited without an outcome: it crashed, was killed, or ended itself."""

    fields = (
        *_OF_ITS_END,
        "oom_killed",
        "oom_evidence",
        "memory_limit",
        "last_bytes",
        "redeliveries",
        "history",
    )

    #: Whether the kernel's out-of-memory killer has killed it; None where nobody can tell.
    oom_killed: bool | None
    #: Which control group's count has risen, from what to what, as evidence of that; else empty.
    oom_evidence: str
    #: Its ``memory_limit``, in bytes; None where it had none.
    memory_limit: int | None
    #: Memory of the process and its descendants when last seen, in bytes; None where nobody looked.
    last_bytes: int | None
    #: How often the message was given back to the broker before, with ``reject_on_worker_lost``.
    redeliveries: int | None
    #: How its children were lost before, in words, the first one first.
    history: list[str] | None


class OutOfMemoryError(IsolationError):
    """The body raised a ``MemoryError``, which only its own process ran out of.

    It is the cause (``__cause__``) of this error, which Celery can report like any other. A bare
    ``MemoryError`` makes Celery stop the whole worker.
    """


class SoftMemoryLimitExceeded(OutOfMemoryError):
    """The body raised a ``MemoryError`` and did not handle it, and has a ``soft_memory_limit``."""

    fields = ("task", "limit")

    #: The name of the task.
    task: str
    #: The limit, in bytes.
    limit: int


class MemoryLimitExceeded(OutOfMemoryError, _EndedChild):
    """The process and its descendants held more than ``memory_limit``, and were killed."""

    fields = (*_OF_ITS_END, "limit", "peak")

    #: The limit, in bytes.
    limit: int
    #: The most that was seen, in bytes; None where the kernel was faster than any look.
    peak: int | None


class CPUTimeLimitExceeded(IsolationError, _EndedChild):
    """The process used more CPU time than ``cpu_time_limit`` and was killed by the kernel.

    ``crash_traceback`` shows where it was.
    """

    fields = (*_OF_ITS_END, "limit")

    #: The limit, in seconds.
    limit: int


class OpenFilesLimitExceeded(IsolationError):
    """The body raised an ``OSError`` for want of descriptors, and has ``max_open_files``.

    That error is the cause (``__cause__``).
    """

    fields = ("task", "limit")

    #: The name of the task.
    task: str
    #: The limit, in descriptors.
    limit: int


class ResultTooLargeError(IsolationError):
    """A result, or an exception, has more bytes than ``max_result_bytes``, and was not sent."""

    fields = ("task", "size", "limit")

    #: The name of the task.
    task: str
    #: How large it is, pickled or encoded, in bytes.
    size: int
    #: The limit, in bytes.
    limit: int


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
