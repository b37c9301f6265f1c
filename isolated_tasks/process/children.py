"""The children of one requesting process: running, idle in a batch, exiting, or spare.

A slot's next process is not started before its last one has been reaped, so that no slot ever
holds the memory of two calls. Greenlets come and go and threads are not told apart here, so the
rule is kept for the process as a whole: with ``slots`` slots there are never more than that many
children. One that is starting and finds no room ends one that is idle, or waits for one that is
exiting; whichever runs is never touched.

A spare is forked ahead, while a call runs, for the next one like it. It has run no body and holds
nothing but what it was born with, so it is no slot's.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator

from isolated_tasks.errors import (
    ChildLostError,
    CPUTimeLimitExceeded,
    ForkserverError,
    IsolationError,
    MemoryLimitExceeded,
    UnpicklableError,
)
from isolated_tasks.process import protocol, verdicts
from isolated_tasks.process.breaker import Breaker
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.outcome import Outcome
from isolated_tasks.process.pickling import Pickled
from isolated_tasks.process.supervisor import (
    NotBegunError,
    StoppedError,
    Supervisor,
    TimeIsUpError,
)
from isolated_tasks.process.usage import ExitReason, Usage

__all__ = ["Children"]

logger = logging.getLogger(__name__)

#: What the system is short of now and may have again: a child is tried again.
TRANSIENT = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

#: Requests to stop calls that have not come here yet, or never will, that are remembered.
MAX_STOPS = 1000

#: How often to see whether there is a forkserver, while no child is tried, in seconds.
_CHECK_SECONDS = 0.5

#: What an exiting child gets on top of the time that its exit hooks have.
_EXIT_GRACE = 1.0


class Children:
    """Runs calls in children.

    Safe to use from several threads or greenlets; each call blocks only its own.

    Args:
        slots: How many children there may be at a time.
    """

    def __init__(self, slots: int = 1) -> None:
        #: Asked anew each time: Celery's pools may grow and shrink.
        self.count_slots: Callable[[], int] = lambda: slots
        self._lock = threading.Lock()
        self._breaker = Breaker()
        self._renewals = 0
        self._running = 0
        # Oldest first. Never waited for or closed while the lock is held.
        self._idle: collections.deque[Supervisor] = collections.deque()
        self._exiting: collections.deque[Supervisor] = collections.deque()
        self._spares: collections.deque[Supervisor] = collections.deque()
        self._spares_starting = 0
        # What the last call asked for: another one like it is to be expected, if there were two.
        self._last_options: ProcessOptions | None = None
        # An idle child's control socket may bring what another one's call is to hear.
        self._stops: collections.OrderedDict[str, protocol.Stop] = collections.OrderedDict()

    def call(
        self,
        pickled: Pickled,
        options: ProcessOptions,
        address: Callable[[], str],
        call_options: CallOptions | None = None,
        *,
        spares: int = 0,
        on_end: Callable[[Usage], object] = lambda usage: None,
    ) -> Outcome:
        """Run one call, in an idle or spare child with the same options or in a new one.

        Args:
            pickled: A tuple of a callable, its positional and its keyword arguments.
            options: What the child must be.
            address: Finds the forkserver's socket; asked anew for each start.
            call_options: The limits of this call.
            spares: So many children may be there ahead, for all calls of this process.
            on_end: Told what the call used, once it is over and if it had a child.

        Raises:
            StoppedError: Somebody has asked for that.
            TimeIsUpError: The body has run for too long.
            ForkserverError: No child could be started.
            ChildLostError: The child exited without an outcome, or several in a row went before
                they had begun anything.
            IsolationError: A limit was exceeded, see `Supervisor.call`.
        """
        attempts = _Attempts(options)
        try:
            outcome = self._call(
                pickled,
                options,
                address,
                call_options or CallOptions(options.name),
                spares,
                attempts,
            )
        except Exception as exc:
            attempts.tell(on_end, _exit_reason(exc))
            raise
        failed = outcome.failure is not None
        attempts.tell(on_end, ExitReason.RAISED if failed else ExitReason.RETURNED)
        return outcome

    def _call(
        self,
        pickled: Pickled,
        options: ProcessOptions,
        address: Callable[[], str],
        call_options: CallOptions,
        spares: int,
        attempts: _Attempts,
    ) -> Outcome:
        call_id = call_options.call_id
        expects_another = self._expects_another(options, spares)
        with self._running_one():
            while True:
                if options.batch_size == 1:
                    child = self._take_spare(options)
                else:
                    child = self._take(self._idle, options)
                is_new = child is None
                try:
                    if child is None:
                        self._wait_for_turn(attempts, address, call_options)
                        self._make_room()
                        child = self._start(options, address(), call_options)
                    elif call_id in self._stops:
                        raise StoppedError("stopped before it began")
                    if expects_another:
                        child.on_begun = lambda: self._have_spare(options, address, spares)
                    attempts.made(child)
                    outcome = child.call(pickled, call_options, meanwhile=address)
                    # It may have been stopped while its outcome was being loaded.
                    _ = child.has_exited
                    stop = None if call_id is None else self._stops.get(call_id)
                    if stop is not None and not stop.keeps_outcome:
                        raise StoppedError(f"{stop.reason} when it had ended")
                    return outcome
                except NotBegunError as exc:
                    if is_new:
                        self._note_failure(attempts, exc, child)
                except ForkserverError as exc:
                    if child is not None and child.is_late:
                        # Its time is up, so no other one is tried; but those of other calls are.
                        self._breaker.failed(str(exc), is_stillborn=child.pid is not None)
                    if exc.errno not in TRANSIENT:
                        raise
                    self._note_failure(attempts, exc, child)
                finally:
                    if child is not None:
                        self._put_back(child)

    # ── spares ──────────────────────────────────────────────────────────────────────────────────

    def _expects_another(self, options: ProcessOptions, spares: int) -> bool:
        """Whether a child is worth while that is there before the next call."""
        is_like_the_last, self._last_options = options == self._last_options, options
        # One that is asked for memory would hold its part of the budget, and a fresh interpreter
        # all that it imports.
        return (
            spares > 0
            and is_like_the_last
            and options.batch_size == 1
            and options.start_method == "forkserver"
            and options.memory_limit_bytes is None
        )

    def _have_spare(self, options: ProcessOptions, address: Callable[[], str], spares: int) -> None:
        """Ask for a child for the next call with these options, unless there is one."""
        if self._breaker.failures:
            return
        with self._lock:
            others = [one for one in self._spares if one.options != options]
            alike = len(self._spares) - len(others) + self._spares_starting
            if alike >= spares:
                return
            self._spares_starting += 1
            # Nobody has asked for those for the longest time.
            surplus = others[: max(0, alike + len(others) + 1 - spares)]
            for child in surplus:
                self._spares.remove(child)
        try:
            for child in surplus:
                self._end(child)
            # Whatever is in its way: the next call asks for a child of its own. A body runs, and
            # has limits that are to be kept, so nothing is waited for here.
            with contextlib.suppress(ForkserverError, NotBegunError):
                spare = self._start(options, address(), CallOptions(options.name), is_spare=True)
                with self._lock:
                    self._spares.append(spare)
        finally:
            with self._lock:
                self._spares_starting -= 1

    def _take_spare(self, options: ProcessOptions) -> Supervisor | None:
        while (child := self._take(self._spares, options)) is not None and not child.has_forkserver:
            # Nobody would tell how it ends; and the next forkserver is what there is to be used.
            self._end(child)
        if child is not None:
            # No two calls' memory in one slot: the last child may still be exiting.
            self._make_room()
        return child

    def _end(self, child: Supervisor) -> None:
        """Tell an idle child to go, and do not wait for that."""
        if child.is_usable:
            child.dismiss()
        self._put_back(child)

    # ── one child ───────────────────────────────────────────────────────────────────────────────

    def _start(
        self,
        options: ProcessOptions,
        address: str,
        call_options: CallOptions,
        *,
        is_spare: bool = False,
    ) -> Supervisor:
        child = Supervisor(
            address,
            options,
            call_options.call_id,
            self._remember_stop,
            failures=self._breaker.stillborn,
            is_spare=is_spare,
        )
        child.renewal = self._renewals
        child.on_waiting = self._end_idle
        child.on_accepted = self._breaker.succeeded
        return child

    def _wait_for_turn(
        self, attempts: _Attempts, address: Callable[[], str], call_options: CallOptions
    ) -> None:
        """Wait until another child may be tried.

        Raises:
            StoppedError: Somebody has asked for that.
            ForkserverError: It would take longer than a call waits.
        """
        while True:
            if call_options.call_id in self._stops:
                raise StoppedError("stopped before it began")
            wait = self._breaker.claim()
            if not wait:
                return
            if attempts.seconds_left < 0:
                raise attempts.error(self._breaker)
            time.sleep(min(wait, _CHECK_SECONDS))
            # The forkserver may be gone, and this thread the one that would replace it.
            address()

    def _note_failure(
        self, attempts: _Attempts, error: Exception, child: Supervisor | None
    ) -> None:
        """Take note of a child that has not come to its body.

        Raises:
            IsolationError: It was one too many.
        """
        if isinstance(error, NotBegunError) and not error.is_its_own:
            # Its forkserver is gone or was replaced. That is nobody's failure: the launcher has
            # pauses of its own.
            if child is not None and child.has_waited:
                attempts.begin_anew()
            elif attempts.seconds_left < 0:
                raise attempts.error(self._breaker, error, child) from error
            return
        self._breaker.failed(str(error), is_stillborn=isinstance(error, NotBegunError))
        logger.warning(
            "the next child for task %r is tried in %.2g s: %s",
            attempts.name,
            self._breaker.pause,
            error,
        )
        is_lasting = self._breaker.is_open and not isinstance(error, ForkserverError)
        if is_lasting or attempts.seconds_left < 0:
            raise attempts.error(self._breaker, error, child) from error

    def close(self, timeout: float = 5.0) -> None:
        """End idle children and wait for exiting ones; for the end of the process.

        Args:
            timeout: For each, in seconds; what has not exited then is killed.
        """
        with self._lock:
            children = [*self._idle, *self._spares, *self._exiting]
            self._idle.clear()
            self._spares.clear()
            self._exiting.clear()
        for child in children:
            if child.is_usable:
                child.dismiss()
        for child in children:
            self._see_off(child, timeout)

    def renew(self) -> None:
        """Have no call from now on served by a child that is there now."""
        with self._lock:
            self._renewals += 1
            idle = [*self._idle, *self._spares]
            self._idle.clear()
            self._spares.clear()
        for child in idle:
            self._put_back(child)

    def _end_idle(self) -> None:
        """End the idle children that hold part of the memory budget: one that is to start waits."""
        with self._lock:
            idle = [one for one in self._idle if one.options.memory_limit_bytes is not None]
            for child in idle:
                self._idle.remove(child)
        for child in idle:
            self._end(child)

    def _remember_stop(self, stop: protocol.Stop) -> None:
        self._stops[stop.call_id] = stop
        while len(self._stops) > MAX_STOPS:
            self._stops.popitem(last=False)

    @contextlib.contextmanager
    def _running_one(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def _take(
        self, waiting: collections.deque[Supervisor], options: ProcessOptions
    ) -> Supervisor | None:
        """One of the children that wait for a call with these options, if there is one."""
        while waiting:
            with self._lock:
                child = next((one for one in waiting if one.options == options), None)
                if child is None:
                    return None
                waiting.remove(child)
            if child.renewal == self._renewals and child.is_usable:
                return child
            self._put_back(child)
        return None

    def _make_room(self) -> None:
        """See to it that there is one child fewer than slots, as far as that is up to us.

        The caller counts as running and has no child yet, so one that it has taken from the lists
        is still counted.
        """
        self._close_exited()
        while True:
            slots = self.count_slots()
            with self._lock:
                others = len(self._exiting) + len(self._idle)
                if self._running + others <= slots or not others:
                    return
                child = (self._exiting or self._idle).popleft()
            if child.is_usable:
                child.dismiss()
            self._see_off(child, child.options.exit_timeout + _EXIT_GRACE)

    def _close_exited(self) -> None:
        """Give back what exited children hold: their descriptors, here and in the forkserver."""
        for _ in range(len(self._exiting)):
            with self._lock:
                if not self._exiting:
                    return
                child = self._exiting.popleft()
            if child.has_exited:
                child.close()
                continue
            with self._lock:
                self._exiting.append(child)

    def _put_back(self, child: Supervisor) -> None:
        if child.has_exited:
            child.close()
            return
        if child.renewal != self._renewals and child.is_usable:
            child.dismiss()
        # Asked before the lock is taken: a look at sockets may switch greenlets.
        parked = self._idle if child.is_usable else self._exiting
        with self._lock:
            parked.append(child)

    def _see_off(self, child: Supervisor, timeout: float) -> None:
        try:
            if not child.wait_exited(timeout):
                logger.warning("%r has not exited within %g s, and is killed", child, timeout)
                child.kill()
                child.wait_exited(_EXIT_GRACE)
        finally:
            child.close()


def _exit_reason(error: Exception) -> ExitReason:
    """How a call has ended that has no outcome."""
    if isinstance(error, ChildLostError) and error.oom_killed:
        return ExitReason.OUT_OF_MEMORY
    return next((one for cls, one in _EXIT_REASONS.items() if isinstance(error, cls)), _LOST)


_LOST = ExitReason.LOST
_EXIT_REASONS = {
    StoppedError: ExitReason.STOPPED,
    TimeIsUpError: ExitReason.TIME_LIMIT,
    MemoryLimitExceeded: ExitReason.MEMORY_LIMIT,
    CPUTimeLimitExceeded: ExitReason.CPU_TIME_LIMIT,
    # What was sent cannot be loaded here.
    UnpicklableError: ExitReason.RETURNED,
}


class _Attempts:
    """The attempts of one call to get a child that begins its body."""

    def __init__(self, options: ProcessOptions) -> None:
        self.name = options.name
        self._timeout = options.start_timeout
        self._began = time.monotonic()
        self._deadline = 0.0
        self._child: Supervisor | None = None
        self._waited = 0.0
        self.begin_anew()

    def made(self, child: Supervisor) -> None:
        """The call is sent to this child."""
        self._child, self._waited = child, time.monotonic() - self._began

    def tell(self, on_end: Callable[[Usage], object], reason: ExitReason) -> None:
        """Say what the call used in the last of its children, if it had one."""
        if self._child is not None:
            on_end(self._child.call_usage(reason, self._waited))

    def begin_anew(self) -> None:
        """What has passed so far does not count."""
        self._deadline = time.monotonic() + self._timeout

    @property
    def seconds_left(self) -> float:
        """How long it may go on."""
        return self._deadline - time.monotonic()

    def error(
        self,
        breaker: Breaker,
        cause: Exception | None = None,
        child: Supervisor | None = None,
    ) -> IsolationError:
        """What the call fails with."""
        if child is None or child.pid is None:
            return ForkserverError(
                f"task {self.name!r}: no child could be started within {self._timeout:g} s "
                f"(isolated_start_timeout). {breaker.failures} in a row have failed; the next one "
                f"is tried in {breaker.pause:.2g} s. The last one: "
                f"{breaker.reason or 'its forkserver went'}",
                {name: getattr(cause, name, None) for name in ForkserverError.fields},
            )
        return verdicts.stillborn(child.facts(), breaker.failures, breaker.reason, breaker.pause)
