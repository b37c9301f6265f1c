"""The children of one requesting process: running, idle between calls of a batch, or exiting.

A slot's next process is not started before its last one has been reaped, so that no slot ever
holds the memory of two calls. Greenlets come and go and threads are not told apart here, so the
rule is kept for the process as a whole: with ``slots`` slots there are never more than that many
children. One that is starting and finds no room ends one that is idle, or waits for one that is
exiting; whichever runs is never touched.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator

from isolated_tasks.errors import ChildLostError
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.outcome import Outcome
from isolated_tasks.process.pickling import Pickled
from isolated_tasks.process.supervisor import NotBegunError, Supervisor

__all__ = ["Children"]

#: A child that goes before it accepts is replaced this often before the call fails.
MAX_STARTS = 5

#: What an exiting child gets on top of the time that its exit hooks have.
_EXIT_GRACE = 1.0


class Children:
    """Runs calls in children.

    Safe to use from several threads or greenlets; each call blocks only its own.

    Args:
        slots: How many children there may be at a time.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._lock = threading.Lock()
        self._running = 0
        # Oldest first. Never waited for or closed while the lock is held.
        self._idle: collections.deque[Supervisor] = collections.deque()
        self._exiting: collections.deque[Supervisor] = collections.deque()

    def call(
        self, pickled: Pickled, options: ProcessOptions, address: Callable[[], str]
    ) -> Outcome:
        """Run one call, in an idle child with the same options or in a new one.

        Args:
            pickled: A tuple of a callable, its positional and its keyword arguments.
            options: What the child must be.
            address: Finds the forkserver's socket; asked anew for each start.

        Raises:
            ForkserverError: No child could be started.
            ChildLostError: The child exited without an outcome, or several went before they began.
        """
        with self._running_one():
            starts = 0
            while True:
                child = self._take_idle(options)
                try:
                    if child is None:
                        starts += 1
                        self._make_room()
                        child = Supervisor(address(), options)
                    return child.call(pickled, meanwhile=address)
                except NotBegunError as exc:
                    if starts >= MAX_STARTS:
                        raise _never_began(options, child, exc) from exc
                finally:
                    if child is not None:
                        self._put_back(child)

    def close(self, timeout: float = 5.0) -> None:
        """End idle children and wait for exiting ones; for the end of the process.

        Args:
            timeout: For each, in seconds; what has not exited then is killed.
        """
        with self._lock:
            children = [*self._idle, *self._exiting]
            self._idle.clear()
            self._exiting.clear()
        for child in children:
            if child.is_usable:
                child.dismiss()
        for child in children:
            self._see_off(child, timeout)

    @contextlib.contextmanager
    def _running_one(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def _take_idle(self, options: ProcessOptions) -> Supervisor | None:
        if options.batch_size == 1:
            return None
        while True:
            with self._lock:
                child = next((one for one in self._idle if one.options == options), None)
                if child is None:
                    return None
                self._idle.remove(child)
            if child.is_usable:
                return child
            self._put_back(child)

    def _make_room(self) -> None:
        while True:
            with self._lock:
                others = len(self._exiting) + len(self._idle)
                if self._running + others <= self.slots or not others:
                    return
                child = (self._exiting or self._idle).popleft()
            if child.is_usable:
                child.dismiss()
            self._see_off(child, child.options.exit_timeout + _EXIT_GRACE)

    def _put_back(self, child: Supervisor) -> None:
        if child.has_exited:
            child.close()
            return
        # Asked before the lock is taken: a look at sockets may switch greenlets.
        parked = self._idle if child.is_usable else self._exiting
        with self._lock:
            parked.append(child)

    def _see_off(self, child: Supervisor, timeout: float) -> None:
        try:
            if not child.wait_exited(timeout):
                child.kill()
                child.wait_exited(_EXIT_GRACE)
        finally:
            child.close()


def _never_began(
    options: ProcessOptions, child: Supervisor | None, cause: NotBegunError
) -> ChildLostError:
    return ChildLostError(
        f"task {options.name!r}: {MAX_STARTS} children went before they accepted the call; "
        f"the last one: {cause}",
        {
            "task": options.name,
            "pid": child.pid if child else None,
            "exit_code": child.exit_code if child else None,
            "started": False,
            "crash_traceback": "",
        },
    )
