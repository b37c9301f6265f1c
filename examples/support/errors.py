"""What can end an example early, each told in one line.

ExampleError         exit code 1
├── UsageError       exit code 2
└── WorkerFailed     one line and the tail of the worker's log
"""

from __future__ import annotations

from pathlib import Path

LOG_TAIL_LINES = 20


class ExampleError(Exception):
    """The example cannot go on."""

    exit_code = 1


class UsageError(ExampleError):
    """The options, or what is installed here, do not allow the example to start."""

    exit_code = 2


class WorkerFailed(ExampleError):
    """A worker ended, or stopped answering, before its tasks were done."""

    def __init__(self, message: str, *, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        tail = [line for line in lines if line.strip()][-LOG_TAIL_LINES:]
        super().__init__("\n".join([message, *(f"  | {line}" for line in tail)]))
