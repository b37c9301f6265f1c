"""What a body is bound by inside its own process: signals that reach it, and resource limits.

The rest is done from outside, by the requester (`supervisor`): the clocks, the memory of the whole
tree, the stop ladder.

**Signals.** The requester ends a body with signals that mean the same as in a pool process of
Celery: SIGUSR1 raises `soft_time_limit_exceeded` in it; SIGTERM, SIGQUIT and SIGHUP raise
``SystemExit``, so that its ``finally:`` blocks run. But the last three also come to whole terminals
and control groups (systemd, by default, when a service is stopped), and what a worker does about
that is the worker's decision. So they count only if the requester has said so before, by a `Halt`
on the call socket, where nothing else can come while a call is served; else they are ignored.

**Resource limits** are set when the body begins and lifted when it has ended, so that its outcome
can be pickled and sent, and so that a batch has each of them anew for each call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import resource
import signal
import types
from collections.abc import Callable
from typing import NoReturn

from isolated_tasks.process import system
from isolated_tasks.process.condition import Condition
from isolated_tasks.process.protocol import Spawn

__all__ = ["Limits", "body"]

#: Raise ``SystemExit`` in a body, if they come from the requester.
TERMINATING = (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

#: What a body gets for its soft time limit; Celery's wing has its own word for it.
soft_time_limit_exceeded: type[Exception] = TimeoutError

#: Those of this process, if it is a child.
_limits: Limits | None = None


def body() -> contextlib.AbstractContextManager[object]:
    """Mark where a body runs: clocks count, signals interrupt, and limits hold, in this block only.

    Does nothing inside another one, or in a process that is no child.
    """
    return contextlib.nullcontext() if _limits is None or _limits.is_in_body else _limits


class Limits:
    """The limits of the one body that runs in this process at a time: a block in which they hold.

    Not one of ``@contextmanager``: that sets the ``__traceback__`` of what a body raises, which an
    exception that is a frozen dataclass refuses.

    Args:
        spawn: What the process was asked for.
        call: The descriptor of the call socket.
        crash: Where a process that is killed for its CPU time says where it was.
    """

    def __init__(self, spawn: Spawn, call: int, crash: int) -> None:
        self._spawn = spawn
        self._call = call
        self._crash = crash
        self._pending: int | None = None
        self._is_leaving = False
        self._lifted = contextlib.ExitStack()
        self.is_in_body = False
        #: A call has been read and not been answered: what comes now is a `Halt`, not another one.
        self.is_serving = False
        #: Called when the body begins.
        self.on_begin: Callable[[], object] = lambda: None
        #: What the body found, where others follow it in this process; None before it begins.
        self.found: Condition | None = None

    def install(self) -> None:
        """Take the signals; for this process alone, not for what the body forks."""
        global _limits
        _limits = self
        self._take_signals()
        os.register_at_fork(after_in_child=_let_go)
        if self._spawn.nice is not None:
            os.nice(self._spawn.nice)

    def _take_signals(self) -> None:
        for number in TERMINATING:
            system.set_signal(number, self._terminate)
        system.set_signal(signal.SIGUSR1, self._exceed_soft_time_limit)

    @property
    def was_stopped(self) -> bool:
        """Whether a body was told to end."""
        return self._is_leaving or self._pending is not None

    def __enter__(self) -> None:
        # Anew: the last body of a batch may have put its own in their place.
        self._take_signals()
        if self._spawn.batch_size > 1:
            self.found = Condition.now()
        try:
            self._set_limits(self._lifted)
            self.on_begin()
            self.is_in_body = True
            if self._pending is not None:
                _leave(self._pending)
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Lift the limits, again if a signal came in between."""
        try:
            self.is_in_body = False
        finally:
            self._lifted.close()

    # ── signals ─────────────────────────────────────────────────────────────────────────────────

    def _exceed_soft_time_limit(self, number: int, frame: types.FrameType | None) -> None:
        if self.is_in_body:
            raise soft_time_limit_exceeded

    def _terminate(self, number: int, frame: types.FrameType | None) -> None:
        if not self.is_serving or not system.wait_for(self._call, timeout=0):
            return
        if self.is_in_body and not self._is_leaving:
            # Once: what comes next would cut a `finally:` short.
            self._is_leaving = True
            _leave(number)
        # It has not begun, or its outcome is on its way.
        self._pending = number

    # ── resources ───────────────────────────────────────────────────────────────────────────────

    def _set_limits(self, lifted: contextlib.ExitStack) -> None:
        spawn = self._spawn
        if spawn.soft_memory_limit_bytes is not None:
            left = spawn.soft_memory_limit_bytes - system.rss_bytes()
            if left <= 0:
                raise MemoryError(
                    f"before the body begins, {-left} bytes too many are held already"
                )
            _set_limit(resource.RLIMIT_DATA, _data_bytes() + left, lifted)
        if spawn.cpu_time_limit is not None:
            faulthandler.register(signal.SIGXCPU, self._crash, all_threads=True, chain=True)
            usage = resource.getrusage(resource.RUSAGE_SELF)
            used = usage.ru_utime + usage.ru_stime
            _set_limit(resource.RLIMIT_CPU, math.ceil(used + spawn.cpu_time_limit), lifted)
        if spawn.max_open_files is not None:
            _set_limit(resource.RLIMIT_NOFILE, spawn.max_open_files, lifted)


def _leave(number: int) -> NoReturn:
    # As billiard's pool processes do (billiard/common.py, _shutdown_cleanup).
    raise SystemExit(-(256 - number))


def _let_go() -> None:
    """In a process that the body has forked: have signals mean there what they mean anywhere."""
    global _limits
    if _limits is None:
        return
    ours = (_limits._terminate, _limits._exceed_soft_time_limit)
    _limits = None
    for number in (*TERMINATING, signal.SIGUSR1):
        if system.getsignal(number) in ours:
            system.set_signal(number, system.SIG_DFL)


def _set_limit(kind: int, soft: int, lifted: contextlib.ExitStack) -> None:
    """Set the soft limit, which may be raised again; never above the hard one."""
    before, hard = resource.getrlimit(kind)
    soft = max(0, soft) if hard == resource.RLIM_INFINITY else max(0, min(soft, hard))
    resource.setrlimit(kind, (soft, hard))
    lifted.callback(_lift_limit, kind, before)


def _lift_limit(kind: int, before: int) -> None:
    """Set the soft limit to what it was, as far as the body has left that possible."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and (before == resource.RLIM_INFINITY or before > hard):
        before = hard
    resource.setrlimit(kind, (before, hard))


def _data_bytes() -> int:
    """What ``RLIMIT_DATA`` counts, and a stack: private writable mappings (proc(5), ``statm``).

    Much of it may be reserved and not used: stacks of threads, arenas of malloc.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * _PAGE_SIZE
    except OSError:
        return system.rss_bytes()
