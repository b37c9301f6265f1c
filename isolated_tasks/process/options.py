"""What one process, and what one call, is asked for: validated here, so that nobody else has to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from isolated_tasks.errors import OptionError

__all__ = ["CallOptions", "ProcessOptions", "StartMethod"]

StartMethod = Literal["forkserver", "spawn"]

#: The least that a process may be allowed of descriptors: a Python program has some open always.
MIN_OPEN_FILES = 16
#: The least that an outcome may be allowed: an error has to fit, with its traceback.
MIN_RESULT_BYTES = 64 * 1024
#: What an environment may have, in bytes as JSON, in which it travels: a request has to fit into a
#: message of the forkserver's (`protocol.CONTROL_LIMITS`), beside what else is in it.
MAX_ENVIRONMENT_BYTES = (4 << 20) - (64 << 10)
#: The highest niceness (setpriority(2)). Below 0 takes a privilege.
MAX_NICE = 19

#: The largest whole number that there may be, here and in messages: no kernel takes more than 64
#: bits, and what has thousands of digits Python does not even print.
MAX_INTEGER = (1 << 63) - 1
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
    #: The process and its descendants may hold this much memory, in bytes; beyond it all are
    #: killed.
    memory_limit_bytes: int | None = None
    #: Beyond this, in bytes, a body gets a ``MemoryError``.
    soft_memory_limit_bytes: int | None = None
    #: CPU time of the process for one call, in whole seconds, as the kernel counts.
    cpu_time_limit: int | None = None
    #: Added to the niceness of the process.
    nice: int | None = None
    #: Descriptors that the process may have open during a call.
    max_open_files: int | None = None
    #: Processes that a body leaves live on when its process has exited.
    keep_children: bool = False
    #: An outcome may have this many bytes, pickled; a larger one fails the call.
    max_result_bytes: int = 2 << 30
    #: Nothing that a body sends is unpickled here, see `plain`.
    plain_outcomes: bool = False
    #: Set in the environment of the process before its first call.
    env: Mapping[str, str] = field(default_factory=dict)
    #: A call that no child has accepted after this long, in seconds, has failed.
    start_timeout: float = 60.0
    #: Exit hooks of the process may take this long, in seconds.
    exit_timeout: float = 5.0
    #: Between one rung of the stop ladder and the next, in seconds.
    term_grace: float = 5.0

    def __post_init__(self) -> None:
        if self.start_method not in get_args(StartMethod):
            self._refuse("start_method", "must be 'forkserver' or 'spawn'")
        if not _is_integer(self.batch_size, least=1):
            self._refuse("batch_size", f"must be a whole number, 1 to {MAX_INTEGER}")
        for option in ("batch_memory_limit_bytes", "memory_limit_bytes", "soft_memory_limit_bytes"):
            self._check_integer(option, least=1)
        hard, soft = self.memory_limit_bytes, self.soft_memory_limit_bytes
        if hard is not None and soft is not None and soft > hard:
            self._refuse("soft_memory_limit_bytes", f"is above memory_limit_bytes={hard}")
        self._check_integer("cpu_time_limit", least=1)
        self._check_integer("nice", least=0, most=MAX_NICE)
        self._check_integer("max_open_files", least=MIN_OPEN_FILES)
        if not _is_integer(self.max_result_bytes, least=MIN_RESULT_BYTES):
            self._refuse("max_result_bytes", f"must be a whole number, {MIN_RESULT_BYTES} or more")
        if not isinstance(self.keep_children, bool):
            self._refuse("keep_children", "must be True or False")
        for option in ("batch_idle_timeout", "start_timeout", "exit_timeout", "term_grace"):
            if not _is_duration(getattr(self, option)):
                self._refuse(option, f"must be a number of seconds, above 0, up to {MAX_SECONDS}")
        if not _is_environment(self.env):
            self._refuse("env", "must map names of variables to strings")
        if self.env and (size := len(json.dumps(dict(self.env)))) > MAX_ENVIRONMENT_BYTES:
            # Not its value: that would make the error as large.
            value = f"<{len(self.env)} variables, {size} bytes>"
            raise _refusal(self.name, "env", value, f"above {MAX_ENVIRONMENT_BYTES} bytes")

    def _check_integer(self, option: str, *, least: int, most: int = MAX_INTEGER) -> None:
        value = getattr(self, option)
        if value is not None and not _is_integer(value, least=least, most=most):
            self._refuse(option, f"must be a whole number, {least} to {most}, or None")

    def _refuse(self, option: str, rule: str) -> None:
        raise _refusal(self.name, option, getattr(self, option), rule)


@dataclass(frozen=True)
class CallOptions:
    """What differs between calls that share a batch process.

    Raises:
        OptionError: A value cannot be used; the error names the option and the value.
    """

    #: Who asks, for logs and errors: the task's name.
    name: str = ""
    #: For logs and errors: the task's id.
    title: str = ""
    #: What a stop request names: the same for no other call, nor for another delivery of this one.
    call_id: str | None = None
    #: The body gets `limits.soft_time_limit_exceeded` after this long, in seconds.
    soft_time_limit: float | None = None
    #: The process is stopped when the body has run for this long, in seconds.
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for option in ("soft_time_limit", "time_limit"):
            value = getattr(self, option)
            if value is not None and not _is_duration(value):
                rule = f"must be a number of seconds, above 0, up to {MAX_SECONDS}, or None"
                raise _refusal(self.name, option, value, rule)
        hard, soft = self.time_limit, self.soft_time_limit
        if hard is not None and soft is not None and soft > hard:
            raise _refusal(self.name, "soft_time_limit", soft, f"is above time_limit={hard!r}")

    @property
    def is_timed(self) -> bool:
        """Whether a clock runs."""
        return self.soft_time_limit is not None or self.time_limit is not None


def _refusal(task: str, option: str, value: object, rule: str) -> OptionError:
    return OptionError(
        f"task {task!r}: {option}={value!r}: {rule}",
        {"task": task, "option": option, "value": repr(value)},
    )


def _is_integer(value: object, *, least: int, most: int = MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


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
