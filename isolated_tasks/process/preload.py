"""What a forkserver loads before the first fork, and what that left behind.

Runs in the forkserver and, for its set-up alone, in a spawned child.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from isolated_tasks.process import randomness, system
from isolated_tasks.process.protocol import Boot

__all__ = ["Entry", "adopt", "fork_quietly", "load", "set_up"]


@dataclass
class Entry:
    """One thing that was loaded."""

    #: A module, or the title of the set-up.
    name: str
    seconds: float = 0.0
    #: The traceback, where loading failed.
    error: str | None = None
    #: Names of threads that it started and that a fork would leave behind.
    threads: list[str] = field(default_factory=list)
    #: Sockets that it left open, by the addresses of their two ends: all children have them.
    sockets: list[str] = field(default_factory=list)
    #: It initialised CUDA, which no fork can use.
    cuda: bool = False


def adopt(boot: Boot) -> None:
    """Take over the main process's import path and arguments."""
    if boot.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = boot.python_path
    sys.path[:] = boot.sys_path
    sys.argv[:] = boot.argv


def set_up(boot: Boot) -> Callable[[], object]:
    """Call ``boot.setup``, if there is one.

    Returns:
        What a forkserver is to call when all is loaded: what that function returns, if anything.

    Raises:
        BaseException: Whatever it raises.
    """
    finish = None
    with _current_directory_first():
        if boot.setup:
            module, _, function = boot.setup.partition(":")
            finish = getattr(importlib.import_module(module), function)(boot.setup_argument)
    return finish if callable(finish) else lambda: None


def load(boot: Boot) -> list[Entry]:
    """Load everything; then collect garbage and freeze what is left.

    The frozen objects leave the collector's lists, so that a collection in a child does not write
    to their headers and so copy every page of the forkserver's heap (``gc.freeze``).
    """
    entries = []
    finishing: list[Callable[[], object]] = []
    if boot.setup:
        entries.append(_load_one(boot.setup_name, lambda: finishing.append(set_up(boot))))
    for module in boot.preload:
        entries.append(_load_one(module, functools.partial(_import, module)))
    for finish in finishing:
        finish()
    # What is still in a buffer would be written again by every child.
    sys.stdout.flush()
    sys.stderr.flush()
    randomness.remember()
    gc.collect()
    # A collection in the forkserver would do what the freeze prevents; a child turns it on again.
    gc.disable()
    gc.freeze()
    return entries


def _import(module: str) -> None:
    with _current_directory_first():
        importlib.import_module(module)


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    """Import as Celery's commands do: from the current directory before all others.

    They take it out of the path again. Here it stays, as the last: a body may start processes that
    have to find the app's modules for themselves, and must not find a module there that has the
    name of one of the standard library.
    """
    directory = os.getcwd()
    known = directory in sys.path
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
        if not known:
            sys.path.append(directory)


def _load_one(name: str, action: Callable[[], object]) -> Entry:
    entry = Entry(name)
    threads_before = set(threading.enumerate())
    native_before = _threads_after_fork()
    had_cuda = system.uses_cuda()
    sockets_before = system.sockets()
    began = time.monotonic()
    try:
        action()
    except BaseException:
        # SystemExit and KeyboardInterrupt too: a preload must not end the forkserver unseen.
        entry.error = traceback.format_exc()
    entry.seconds = time.monotonic() - began
    started = _threads_after_fork() - native_before
    if started > 0:
        named = [thread.name for thread in threading.enumerate() if thread not in threads_before]
        entry.threads = named + ["(native)"] * (started - len(named))
    sockets = system.sockets()
    entry.sockets = sorted(sockets[inode] for inode in sockets.keys() - sockets_before.keys())
    entry.cuda = system.uses_cuda() and not had_cuda
    return entry


def _threads_after_fork() -> int:
    """Threads that a fork of this process would really lose.

    Asked by forking: OpenBLAS, which every ``import numpy`` brings along, ends its threads before
    a fork and starts them again when they are needed, so they harm nobody (pthread_atfork(3)).
    """
    if system.thread_count() == 1:
        return 1
    pid = fork_quietly()
    if pid == 0:
        os._exit(0)
    system.waitpid(pid, 0)
    return system.thread_count()


def fork_quietly() -> int:
    """``os.fork`` without the warning about threads of Python 3.12: `Entry.threads` is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return system.fork()
