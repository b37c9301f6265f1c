"""What one process is asked for: validated here, once, so that nobody else has to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from isolated_tasks.errors import OptionError

__all__ = ["ProcessOptions", "StartMethod"]

StartMethod = Literal["forkserver", "spawn"]

#: poll(2) and epoll_wait(2) count milliseconds in an int, which ends after 24 days.
MAX_SECONDS = 2_000_000


@dataclass(frozen=True)
class ProcessOptions:
    """How a child is started, how many calls it serves, and how long things may take.

    Two calls may share a batch process only if their options are equal.

    Raises:
        OptionError: A value cannot be used; the error names the option and the value.
    """

    #: Who asks, for logs and errors: the task's name.
    name: str
    #: ``"forkserver"``: a fork of the preloaded process; ``"spawn"``: a fresh interpreter.
    start_method: StartMethod = "forkserver"
    #: Calls that the process serves before it exits.
    batch_size: int = 1
    #: The process waits this long for its next call, in seconds.
    batch_idle_timeout: float = 5.0
    #: A process that holds more RSS than this after a call, in bytes, is not used again.
    batch_memory_limit_bytes: int | None = None
    #: Set in the environment of the process before its first call.
    env: Mapping[str, str] = field(default_factory=dict)
    #: A call that no child has accepted after this long, in seconds, has failed.
    start_timeout: float = 60.0
    #: Exit hooks of the process may take this long, in seconds.
    exit_timeout: float = 5.0

    def __post_init__(self) -> None:
        if self.start_method not in get_args(StartMethod):
            self._refuse("start_method", "must be 'forkserver' or 'spawn'")
        if not _is_integer(self.batch_size) or self.batch_size < 1:
            self._refuse("batch_size", "must be a whole number, 1 or more")
        limit = self.batch_memory_limit_bytes
        if limit is not None and (not _is_integer(limit) or limit <= 0):
            self._refuse("batch_memory_limit_bytes", "must be a whole number above 0, or None")
        for option in ("batch_idle_timeout", "start_timeout", "exit_timeout"):
            if not _is_duration(getattr(self, option)):
                self._refuse(option, f"must be a number of seconds, above 0, up to {MAX_SECONDS}")
        if not _is_environment(self.env):
            self._refuse("env", "must map names of variables to strings")

    def _refuse(self, option: str, rule: str) -> None:
        value = repr(getattr(self, option))
        raise OptionError(
            f"task {self.name!r}: {option}={value}: {rule}",
            {"task": self.name, "option": option, "value": value},
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_duration(value: object) -> bool:
    # Neither nan nor infinity is in there, which a timeval of the kernel does not take.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS
    )


def _is_environment(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_variable(name, value) for name, value in value.items()
    )


def _is_variable(name: object, value: object) -> bool:
    # setenv(3) and execve(2) cannot take others.
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    try:
        os.fsencode(name + value)
    except UnicodeEncodeError:
        return False
    return bool(name) and "=" not in name and "\0" not in name + value
