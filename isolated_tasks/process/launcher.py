"""Role: main process. Starts forkservers, hears what they loaded, replaces the dead and the worn.

The launcher owns the listening socket, so that requests wait in its queue while a dead forkserver
is being replaced, and several forkservers can take from one queue. One that is to be replaced while
it lives serves until its successor has loaded, and then sees its own children to their end. There
is no thread here; `Launcher.check` is to be called when one of `Launcher.descriptors` becomes
readable, or now and then.
"""

from __future__ import annotations

import collections
import logging
import os
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isolated_tasks.errors import ForkserverError
from isolated_tasks.process import system
from isolated_tasks.process.generation import Generation, wait
from isolated_tasks.process.protocol import Boot, Loaded, Stop
from isolated_tasks.process.transport import own

__all__ = ["Launcher", "Plan"]

logger = logging.getLogger(__name__)

#: Connections that may wait; the kernel cuts this down to net.core.somaxconn (listen(2)).
BACKLOG = 4096

#: Between two starts of a forkserver that dies before it has loaded, in seconds: this, then twice
#: as much each time, up to the last.
FIRST_DELAY = 0.5
LAST_DELAY = 30.0

#: Those that do not last for so long after they have loaded, in seconds, are replaced with pauses,
#: though with shorter ones: each start loads the app, and takes what others may need.
SETTLED_SECONDS = 5.0
LAST_DELAY_LOADED = 5.0

#: What `Launcher.hear` waits for another thread, in seconds.
HEAR_SECONDS = 0.05

#: Requests to stop calls that every new forkserver is told of: what the one before was told is
#: gone with it, and the call may not have come yet.
MAX_STOPS = 1000


@dataclass(frozen=True)
class Plan:
    """What forkservers are to load."""

    #: Modules, in this order, after ``setup``.
    preload: Sequence[str] = ()
    #: ``"module:function"``, called with ``setup_argument`` in each forkserver; may be empty.
    setup: str = ""
    #: The title of what ``setup`` loads, for reports.
    setup_name: str = ""
    setup_argument: bytes = b""
    #: How many forkservers take requests.
    count: int = 1
    #: What the memory limits of all children together may come to, in bytes; None is no bound. For
    #: one forkserver: several do not know of each other's children.
    memory_budget_bytes: int | None = None
    #: A forkserver that has started so many children is replaced; None for never.
    max_starts: int | None = None
    #: One that has not answered for so long, in seconds, is killed, and replaced.
    patience: float = 20.0
    #: One that has not loaded after so long, in seconds, is aborted, and replaced.
    boot_timeout: float = 120.0


class _Place:
    """Where there is to be one forkserver, at all times."""

    def __init__(self) -> None:
        self.current: Generation | None = None
        #: Loads beside the current one, to take its place.
        self.successor: Generation | None = None
        #: The last one has died before it had loaded.
        self.died_loading = False
        #: How many in a row have not lasted, and when to try again.
        self.failures = 0
        self.not_before = 0.0

    def note_end(self, generation: Generation) -> None:
        """One of them has ended, or is to be replaced: how long is the next one to wait?"""
        self.died_loading = generation.loaded is None
        if generation.loaded is None:
            self.postpone()
        elif time.monotonic() - generation.loaded_at >= SETTLED_SECONDS:
            # Nor does it wait for a successor of it that has failed: now there is none at all.
            self.failures, self.not_before = 0, 0.0
        elif self.failures:
            self.postpone(LAST_DELAY_LOADED)
        else:
            # Once is no pattern.
            self.failures = 1

    def postpone(self, last_delay: float = LAST_DELAY) -> float:
        """Another one has failed; in how many seconds to try again."""
        self.failures += 1
        # No more than 10 doublings: after a night of failures the power would not fit a float.
        delay = min(last_delay, FIRST_DELAY * 2.0 ** min(self.failures - 1, 10))
        self.not_before = time.monotonic() + delay
        return delay

    def generations(self) -> list[Generation]:
        """Those that live here."""
        return [one for one in (self.current, self.successor) if one is not None]


class Launcher:
    """The forkservers of one main process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        #: Where requesters connect; empty until `start`.
        self.address = ""
        self._owner = os.getpid()
        self._directory = ""
        self._listener: socket.socket | None = None
        self._places = [_Place() for _ in range(plan.count)]
        # Those that have been replaced, and still have children.
        self._retired: list[Generation] = []
        #: Called when a forkserver has been started: `descriptors` has changed.
        self.on_launch: Callable[[], object] = lambda: None
        #: Forkservers that were started so far, and how many have died, or were killed because
        #: they did not answer. A start that failed is a failure too.
        self.starts = self.failures = 0
        self._stopped = False
        self._told_of_limits = False
        #: Called when a stop could not be sent yet: `check` is to be called soon.
        self.on_backlog: Callable[[], object] = lambda: None
        self._stops: collections.deque[Stop] = collections.deque(maxlen=MAX_STOPS)
        self._sending = threading.Lock()
        self._lock = threading.RLock()

    def start(self) -> None:
        """Open the socket and start the forkservers; does not wait until they have loaded.

        Raises:
            OSError: No directory, no socket or no process could be made.
        """
        self._directory = _private_directory()
        self.address = os.path.join(self._directory, "forkserver.sock")
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(self.address)
            self._listener.listen(BACKLOG)
            own(self)
            for lack in system.lacking():
                logger.info("this kernel has %s", lack)
            for place in self._places:
                place.current = self._launch()
        except BaseException:
            self.stop()
            raise

    def descriptors(self) -> list[int]:
        """What becomes readable when `check` has something to do."""
        found = (generation.descriptor for generation in self._generations())
        return [descriptor for descriptor in found if descriptor is not None]

    def loaded(self) -> list[Loaded]:
        """What the forkservers that are ready have loaded."""
        return [one.loaded for one in self._current() if one.loaded is not None]

    def pids(self) -> list[int]:
        """The forkservers that take requests, or will, as far as is known."""
        return [generation.pid for generation in self._current()]

    def every_pid(self) -> list[int]:
        """The forkservers that live: those too that were replaced and still have children."""
        return [generation.pid for generation in self._generations()]

    def wait_loaded(self, timeout: float) -> None:
        """Wait until every forkserver has loaded.

        Args:
            timeout: In seconds.

        Raises:
            ForkserverError: One died over it, or the time was not enough.
        """
        deadline = time.monotonic() + timeout
        pause = self.check()
        while any(place.current is None or not place.current.loaded for place in self._places):
            if any(place.died_loading for place in self._places):
                raise ForkserverError(
                    "the forkserver died while it loaded the app and isolated_preload; "
                    "its own output says why",
                    {"address": self.address},
                )
            left = deadline - time.monotonic()
            if left <= 0:
                for generation in self._current():
                    if generation.loaded is None:
                        generation.abort()
                raise ForkserverError(
                    f"the forkserver has not loaded the app and isolated_preload within "
                    f"{timeout:g} s (isolated_boot_timeout); its own output says where it is",
                    {"address": self.address},
                )
            wait(
                self.descriptors(),
                selectors.EVENT_READ,
                left if pause is None else min(left, pause),
            )
            pause = self.check()

    def check(self) -> float | None:
        """Hear what the forkservers say; replace those that have died, or want to be replaced.

        Returns:
            In how many seconds to call again because a replacement has to wait; None if none has.
        """
        with self._lock:
            if self._stopped or self._owner != os.getpid():
                return None
            waits = [self._check_place(place) for place in self._places]
            self._retired = [one for one in self._retired if one.hear() or self._bury_retired(one)]
            self._share_budget()
            if self._end_stuck():
                # Their ends are still to be seen.
                waits.append(0.0)
        self._flush()
        return min((wait for wait in waits if wait is not None), default=None)

    def replace(self, reason: str, *, at_once: bool = False) -> float | None:
        """Have all forkservers replaced. No call is lost: one serves until the next has loaded.

        Args:
            reason: For the log.
            at_once: Not even that: no call from now on runs what is loaded now, and those that come
                wait for what is loaded next.

        Returns:
            As `check`.
        """
        with self._lock:
            if self._stopped or self._owner != os.getpid():
                return None
            for place in self._places:
                if place.current is None:
                    continue
                place.current.worn = reason
                if not at_once:
                    continue
                logger.info("forkserver pid=%d is replaced: %s", place.current.pid, reason)
                for generation in place.generations():
                    self._retire(generation)
                place.current = place.successor = None
                # Whoever wants it so has mended, or thinks so, what a successor has failed of.
                place.not_before = 0.0
        return self.check()

    def stop(self) -> None:
        """Stop the forkservers, which ends their children, and remove everything."""
        with self._lock:
            if self._stopped or self._owner != os.getpid():
                return
            self._stopped = True
            generations = self._generations()
            for generation in generations:
                self._hang_up(generation)
            for generation in generations:
                generation.wait_or_kill()
            self._places, self._retired = [], []
            if self._listener is not None:
                self._listener.close()
            if self._directory:
                shutil.rmtree(self._directory, ignore_errors=True)

    def stop_call(self, stop: Stop) -> None:
        """Have a call stopped, whichever process it was made by.

        The forkservers tell the requesters of their children. Never waits: it may be called by a
        signal handler, in gevent's hub too.
        """
        # In this order: one that is started meanwhile is told by `_launch`, or here, or twice.
        self._stops.append(stop)
        for generation in self._generations():
            generation.outbox.append(stop)
        self._flush()

    def ask(self) -> list[tuple[Generation, bool]]:
        """Ask all forkservers which children there are, and wait for nothing.

        Returns:
            The forkservers, and of each whether its answer is to be expected at once.
        """
        asked = [(generation, generation.ask()) for generation in self._generations()]
        self._flush()
        return asked

    def hear(self) -> None:
        """Take note of what the forkservers say; what follows from it is for `check`."""
        # Not for long: whoever has it may be at a start or an end of a forkserver.
        if self._lock.acquire(timeout=HEAR_SECONDS):
            try:
                for generation in self._generations():
                    generation.hear()
            finally:
                self._lock.release()

    def is_retired(self, generation: Generation) -> bool:
        """Whether it starts no more children."""
        return generation in self._retired

    def _flush(self) -> None:
        """Send what there is to be sent, from whichever thread comes first.

        Who finds another one at it, or a signal handler that has interrupted itself, leaves it to
        that one, which looks again when it has let go.
        """
        while self._sending.acquire(blocking=False):
            try:
                for generation in self._generations():
                    generation.flush()
            finally:
                self._sending.release()
            if not any(generation.can_send for generation in self._generations()):
                break
        if any(generation.has_backlog for generation in self._generations()):
            self.on_backlog()

    # ── generations ─────────────────────────────────────────────────────────────────────────────

    def _current(self) -> list[Generation]:
        return [place.current for place in self._places if place.current is not None]

    def _generations(self) -> list[Generation]:
        return [*(one for place in self._places for one in place.generations()), *self._retired]

    def _launch(self, *, beside: Generation | None = None) -> Generation:
        assert self._listener is not None
        generation = Generation(self._listener, self._boot(shares=bool(beside or self._retired)))
        self.starts += 1
        logger.debug("forkserver pid=%d started at %s", generation.pid, self.address)
        return generation

    def _boot(self, *, shares: bool) -> Boot:
        budget = self.plan.memory_budget_bytes
        return Boot(
            sys_path=[os.path.abspath(path) for path in sys.path],
            argv=list(sys.argv),
            python_path=os.environ.get("PYTHONPATH"),
            directory=self._directory,
            preload=list(self.plan.preload),
            memory_budget_bytes=budget,
            # All of it, until those before have told what they still need.
            reserved_bytes=(budget or 0) if shares else 0,
            max_starts=self.plan.max_starts,
            setup=self.plan.setup,
            setup_name=self.plan.setup_name,
            setup_argument=self.plan.setup_argument,
        )

    def _put(self, place: _Place, *, beside: Generation | None = None) -> float | None:
        """Start one more; in how many seconds to try again if that fails."""
        wait_seconds = place.not_before - time.monotonic()
        if wait_seconds > 0:
            return wait_seconds
        if beside is not None:
            logger.info("forkserver pid=%d is to be replaced: %s", beside.pid, beside.worn)
        try:
            generation = self._launch(beside=beside)
        except OSError as exc:
            # The owner's event loop, which asks, must not end of it.
            self.failures += 1
            logger.error("no forkserver can be started: %s; calls wait for it", exc)
            return place.postpone()
        if beside is None:
            place.current = generation
        else:
            place.successor = generation
        generation.outbox.extend(self._stops)
        self.on_launch()
        return None

    def _check_place(self, place: _Place) -> float | None:
        self._hear(place)
        if place.successor is not None and place.successor.loaded is not None:
            if place.current is not None and place.successor.failed - place.current.failed:
                return self._turn_down(place, place.successor)
            if place.current is not None:
                self._retire(place.current)
            place.current, place.successor = place.successor, None
        if place.current is None:
            # It may still be loading: calls wait for it, as for any other one.
            place.current, place.successor = place.successor, None
        if place.current is None:
            return self._put(place)
        if place.current.worn is None or place.successor is not None:
            return None
        return self._put(place, beside=place.current)

    def _end_stuck(self) -> bool:
        """End those that do not answer: stopped, swapped out for good, caught in a lock.

        Returns:
            Whether there was any; the next `check` sees its end.
        """
        found = False
        # What they have said has been read: it may be this process that was not there to listen.
        for generation in self._generations():
            if not generation.is_stuck(self.plan.patience, self.plan.boot_timeout):
                continue
            found = True
            if generation.loaded is None:
                logger.error(
                    "forkserver pid=%d has not loaded within %g s; its own output says where it is",
                    generation.pid,
                    self.plan.boot_timeout,
                )
                generation.abort()
            else:
                logger.error(
                    "forkserver pid=%d has not answered for %g s, and is killed",
                    generation.pid,
                    self.plan.patience,
                )
                generation.kill()
        return found

    def _hear(self, place: _Place) -> None:
        for generation in place.generations():
            was_worn = generation.worn
            is_there = generation.hear()
            if generation.loaded is not None:
                place.died_loading = False
                if not self._told_of_limits:
                    self._told_of_limits = True
                    logger.info("memory limits: %s", generation.loaded.memory_limits)
            if is_there:
                if generation.worn and not was_worn:
                    place.note_end(generation)
                continue
            self._bury(place, generation)
            if generation is place.successor:
                place.successor = None
            else:
                place.current = None

    def _bury(self, place: _Place, generation: Generation) -> None:
        self._hang_up(generation)
        exit_code = generation.wait_or_kill()
        self.failures += 1
        place.note_end(generation)
        logger.error(
            "forkserver pid=%d %s while it was %s; %s",
            generation.pid,
            system.describe_exit(exit_code),
            "loading" if generation.loaded is None else "serving",
            "the one that it was to replace goes on"
            if generation is place.successor
            else "calls under way carry on, new ones wait for the next forkserver",
        )

    def _turn_down(self, place: _Place, successor: Generation) -> float:
        """Keep what works: what replaces it has failed to load a part of it."""
        logger.error(
            "forkserver pid=%d has failed to load %s, so the one that it was to replace goes on",
            successor.pid,
            " and ".join(sorted(successor.failed)),
        )
        # Not stopped: it may have taken calls meanwhile, and would remove the socket of all.
        self._retire(successor)
        place.successor = None
        return place.postpone()

    def _hang_up(self, generation: Generation) -> None:
        # Not while another thread sends by it: what is closed under its hands could be somebody
        # else's socket a moment later. It does not wait as it sends, so neither does this.
        with self._sending:
            generation.hang_up()

    def _retire(self, generation: Generation) -> None:
        generation.retire()
        self._retired.append(generation)

    def _bury_retired(self, generation: Generation) -> bool:
        self._hang_up(generation)
        generation.wait_or_kill()
        logger.info("forkserver pid=%d, which was replaced, has ended", generation.pid)
        return False

    def _share_budget(self) -> None:
        """Have those that start children leave to those that do not what they still need."""
        if self.plan.memory_budget_bytes is None:
            return
        held = [generation.held_bytes for generation in self._retired]
        if any(one is None for one in held):
            return
        for generation in self._current():
            if generation.loaded is not None:
                generation.reserve(sum(one or 0 for one in held))

    def abandon(self) -> None:
        """Close the listening socket, in a fork of this process: it is not a launcher."""
        if self._listener is not None and (descriptor := self._listener.detach()) >= 0:
            os.close(descriptor)


def _private_directory() -> str:
    """A new directory of mode 0700, with a name short enough for a socket's address (unix(7))."""
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(
        prefix="isolated_tasks-", dir=parent if len(os.fsencode(parent)) < 60 else "/tmp"
    )
