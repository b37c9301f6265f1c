"""What a body finds around itself in its process, and may leave changed for the next of its batch.

A fresh process is the same for each call. A batch shares one, so it ends with a call that leaves
the process in another condition: the next one gets a fresh one, and the log says why. What a body
leaves in Python's own memory, globals and caches, is what a batch is for.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import locale
import os
import resource
import signal
import threading
from dataclasses import dataclass
from typing import Any

from isolated_tasks.process import descendants, system

__all__ = ["Condition"]

#: Those that make a call fail. CPU time is counted anew for each call.
_LIMITS = {
    f"RLIMIT_{name}": getattr(resource, f"RLIMIT_{name}")
    for name in ("AS", "CORE", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "STACK")
}

#: Packages whose threads may stay. Most have one, which they start when there is first something to
#: report, and whose end would lose that; a body of another call may be what it reports next. Those
#: of a pool of connections look after the pool, which is the batch's.
_HARMLESS = frozenset({"logging", "loguru", "opentelemetry", "psycopg_pool", "sentry_sdk"})

#: Not those of real time, whose handlers a look at would cost more than all else together.
_SIGNALS = sorted(number for number in map(int, signal.valid_signals()) if number < 32)


@dataclass(frozen=True)
class Condition:
    """The condition of this process at one moment."""

    threads: frozenset[threading.Thread]
    #: Processes that it has started, zombies too.
    children: frozenset[int]
    directory: str | None
    handlers: dict[int, Any]
    blocked: frozenset[int]
    umask: int
    environment: dict[Any, Any]
    limits: dict[str, tuple[int, int]]
    locale: str

    @classmethod
    def now(cls) -> Condition:
        """Look around."""
        # Where there are none, as a rule, that is known without a look at each.
        children: frozenset[int] = frozenset()
        if system.has_children():
            children = frozenset(descendants.children(os.getpid()))
        return cls(
            threads=frozenset(threading.enumerate()),
            children=children,
            directory=_directory(),
            # Not signal.getsignal, which makes an enum of each.
            handlers={number: _signal.getsignal(number) for number in _SIGNALS},
            blocked=frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            umask=_umask(),
            environment=_environment(),
            limits={name: resource.getrlimit(number) for name, number in _LIMITS.items()},
            locale=locale.setlocale(locale.LC_ALL),
        )

    def changes(self, later: Condition, *, may_leave_children: bool) -> list[str]:
        """What is not as it was, in words; empty if all is.

        Args:
            later: The condition after the call.
            may_leave_children: Processes that a body leaves are there on purpose.
        """
        if later == self:
            return []
        found = []
        threads = sorted(
            thread.name for thread in later.threads - self.threads if not _is_harmless(thread)
        )
        if threads:
            found.append(f"{len(threads)} thread(s) ({', '.join(threads)})")
        children = sorted(later.children - self.children)
        if children and not may_leave_children:
            found.append(f"{len(children)} process(es) (pid {', '.join(map(str, children))})")
        if later.directory != self.directory:
            found.append(f"another current directory ({later.directory})")
        numbers = [number for number in _SIGNALS if later.handlers[number] != self.handlers[number]]
        handlers = [str(system.signal_name(-number)) for number in numbers]
        if handlers:
            found.append(f"other signal handlers ({', '.join(handlers)})")
        if later.blocked != self.blocked:
            found.append("other blocked signals")
        if later.umask != self.umask:
            found.append(f"another umask ({later.umask:03o})")
        if later.environment != self.environment:
            found.append(f"other environment variables ({_names(self, later)})")
        limits = [name for name in self.limits if later.limits[name] != self.limits[name]]
        if limits:
            found.append(f"other limits ({', '.join(limits)})")
        if later.locale != self.locale:
            found.append(f"another locale ({later.locale})")
        return found


def _is_harmless(thread: threading.Thread) -> bool:
    # It has a target unless its class has a run() of its own.
    module = getattr(getattr(thread, "_target", None), "__module__", None)
    return str(module or type(thread).__module__).partition(".")[0] in _HARMLESS


def _names(before: Condition, after: Condition) -> str:
    """The variables that differ; never their values, which may be secrets."""
    items = before.environment.items() ^ after.environment.items()
    return ", ".join(sorted({os.fsdecode(name) for name, _ in items}))


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        # It has been removed.
        return None


def _umask() -> int:
    # There is no way to ask for it but to set it.
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _environment() -> dict[Any, Any]:
    """A copy, without decoding each variable, of which a process may have hundreds."""
    with contextlib.suppress(AttributeError):
        # CPython's own table, as os.environ has it.
        table: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
        return dict(table)
    return dict(os.environ)
