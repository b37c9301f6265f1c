"""The audit of plain tasks: measures each call as it runs, and sends what it came to as an event.

Switched on by ``celery worker --memory-audit`` or by ``isolated_memory_audit = True``. It needs a
process that runs one call at a time: a pool process of prefork, or the worker itself in solo. In
other pools several calls share one process and nobody can tell whose memory it is; there the audit
says so, in the log and by events, and measures nothing.

Around each call of a plain task, by Celery's signals ``task_prerun`` and ``task_postrun``:

* before: resident memory, and memory in use; the kernel's high-water mark begins anew;
* after: high-water mark, resident memory; the event is sent;
* before the next call, of whatever task, in the same process: as before, which tells what the call
  has kept. Not sooner, since until then Celery holds its result and its traceback.

Memory in use is what glibc's ``malloc`` has handed out, and Python's allocator, whose blocks are
counted and taken for `BLOCK_BYTES` each. `isolated_tasks.advice` says what both are good for.

`SAMPLED` calls have ``gc.collect()`` before and after them too, whose cost grows with the heap.

The event is ``memory-audit``. Not ``task-…``: Celery's own `State`, and Flower, which stands on it,
take the second word of such an event for the state of the task. It is sent by the process that
runs the task, over the app's own pool of connections, whether or not the worker was started with
``-E``. Its fields, beside those that every event has (``hostname``, ``pid``, ``timestamp``); sizes
are bytes:

======================== ==========================================================================
``uuid``, ``name``       id of the call, name of its task
``number``               which call of the task in this process, from 1 on
``start_bytes``          RSS of the process before the call
``peak_bytes``           the high-water mark above that
``highest_peak_bytes``   the highest ``peak_bytes`` of the task in this process
``retained_bytes``       RSS right after the call above that before it, its result included
``kept_bytes``           what the calls of the task before this one have added to RSS
``used_calls``           for how many of these the memory in use was measured too
``used_bytes``           what these have added to the memory in use; None if there are none
``idle_bytes``           RSS that is not in use, above what that was at the process's first call
``least_idle_bytes``     what that is at the least, if blocks are as large as can be
``run_seconds``          how long the call took
``collected_bytes``      of sampled calls: RSS added, from one ``gc.collect()`` to the next
``blocks``               of sampled calls: blocks of Python's allocator that have stayed likewise
======================== ==========================================================================

Where calls cannot be measured, the event has ``uuid``, ``name`` and ``unmeasurable``, the reason.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals
from celery.concurrency import prefork, solo

from isolated_tasks import settings
from isolated_tasks.process import system
from isolated_tasks.task import IsolatedMixin

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

__all__ = ["EVENT", "MemoryAuditStep", "Meter", "install"]

logger = logging.getLogger(__name__)

#: The type of the events.
EVENT = "memory-audit"

#: Which calls of a task in a process are sampled: these, and then one in `SAMPLED_EVERY`.
SAMPLED = frozenset({2, 4, 8, 16, 32, 64, 128, 256})
SAMPLED_EVERY = 512

#: What a block of Python's allocator is taken for, in bytes: the mean in a worker that has loaded
#: Celery. And what it is at the most (Objects/obmalloc.c).
BLOCK_BYTES, LARGEST_BLOCK_BYTES = 96, 512

#: With as many free pieces in its heap or more ``malloc`` is not asked before each call: to count
#: them takes it half a millisecond.
MANY_HOLES = 20_000

#: After an event that could not be sent, none is tried for so long, in seconds: to connect to a
#: broker that is gone may take seconds itself.
SILENCE_SECONDS = 30.0

#: Of a task that cannot be measured, one event in so many seconds is enough.
REMINDER_SECONDS = 1.0

_BEGIN, _END = "isolated_tasks.audit.begin", "isolated_tasks.audit.end"


def install(app: Celery) -> None:
    """Let the workers of an app audit its plain tasks, if they are asked to.

    ``celery worker`` does this by itself, and so does an app with an isolated task. It is for
    workers that a program of one's own starts (``app.Worker(memory_audit=True)``).
    """
    app.steps["worker"].add("isolated_tasks.audit:MemoryAuditStep")


class MemoryAuditStep(bootsteps.StartStopStep):
    """Has this worker measure the plain tasks that it runs, if it was asked to.

    Args:
        parent: The worker.
        memory_audit: Its option ``--memory-audit``.
        options: Its other options.
    """

    name = "memory-audit"
    label = "Memory audit"

    def __init__(self, parent: WorkController, memory_audit: bool = False, **options: Any) -> None:
        super().__init__(parent, **options)
        self._asked_for = memory_audit

    def include_if(self, parent: WorkController) -> bool:
        """Whether the audit is asked for.

        Raises:
            OptionError: ``isolated_memory_audit`` is neither True nor False.
        """
        return settings.memory_audit_of(parent.app) or bool(self._asked_for)

    def create(self, parent: WorkController) -> MemoryAuditStep:
        """Begin; before the pool, so that its processes are forked with the receivers in place."""
        app = parent.app
        # For pool processes that are spawned: they get the settings and the fixups of the app.
        app.conf.isolated_memory_audit = True
        app.fixups = {*app.fixups, "isolated_tasks.audit:fixup"}
        why_not = _why_not(parent.pool_cls)
        if why_not is None:
            connect(Meter(app, parent.hostname))
            logger.info("memory audit: plain tasks are measured as they run")
        else:
            connect(Refuser(app, parent.hostname, why_not))
            logger.warning("memory audit: plain tasks are unmeasurable: %s", why_not)
        return self

    def start(self, parent: WorkController) -> None:
        """Nothing is left to do."""

    def stop(self, parent: WorkController) -> None:
        """Measure no more: the process may go on without the worker."""
        signals.task_prerun.disconnect(dispatch_uid=_BEGIN)
        signals.task_postrun.disconnect(dispatch_uid=_END)

    terminate = stop


def fixup(app: Celery) -> None:
    """What Celery calls when the app has arrived in a pool process that was spawned."""

    def begin(sender: str, **keywords: Any) -> None:
        if settings.memory_audit_of(app):
            connect(Meter(app, sender))

    # Not at once: here the app is only being made, and its settings cannot be read yet.
    signals.worker_process_init.connect(begin, weak=False, dispatch_uid="isolated_tasks.audit")


def connect(receiver: Meter | Refuser) -> None:
    """Have a receiver, and no other, told of the calls of this process."""
    for signal, method, uid in (
        (signals.task_prerun, receiver.begin, _BEGIN),
        (signals.task_postrun, receiver.end, _END),
    ):
        signal.disconnect(dispatch_uid=uid)
        signal.connect(method, weak=False, dispatch_uid=uid)


def _why_not(pool: type) -> str | None:
    """Why calls in this pool cannot be measured; None if they can."""
    if not issubclass(pool, (prefork.TaskPool, solo.TaskPool)):
        name = pool.__module__.rpartition(".")[2]
        return f"the {name} pool runs several tasks in one process (use prefork or solo)"
    if not system.reset_peak_rss():
        return "the kernel does not let a process reset its peak (/proc/self/clear_refs)"
    return None


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Tally:
    """What the calls of one task have come to in this process."""

    calls: int = 0
    highest_peak_bytes: int = 0
    kept_bytes: int = 0
    used_calls: int = 0
    used_bytes: int = 0


@dataclass(frozen=True)
class _Moment:
    """The memory of this process between two calls."""

    rss_bytes: int
    #: Of Python's allocator.
    blocks: int
    #: None if the allocator does not tell, or was not asked this time.
    malloc_bytes: int | None

    def used_bytes(self, block_bytes: int) -> int | None:
        """What the allocators have handed out, with so much for each of Python's blocks."""
        if self.malloc_bytes is None:
            return None
        return self.malloc_bytes + self.blocks * block_bytes

    def idle_bytes(self, block_bytes: int) -> int | None:
        used = self.used_bytes(block_bytes)
        return None if used is None else self.rss_bytes - used


@dataclass
class _Running:
    """The call that is being measured, or was the last to be."""

    task_id: str
    tally: _Tally
    start: _Moment
    began: float
    is_sampled: bool


class Meter:
    """Measures the calls of one process, which come one at a time.

    A signal's receiver that raises is logged by Celery, and the task does not notice. But a
    measurement that failed must not be taken for another's: each part leaves the state sound.

    Args:
        app: Whose calls.
        hostname: The name of the worker.
    """

    def __init__(self, app: Celery, hostname: str) -> None:
        self._events = _Events(app, hostname)
        self._tallies: dict[str, _Tally] = {}
        self._running: _Running | None = None
        #: The call before, until it is known what it has kept.
        self._last: _Running | None = None
        #: When the first call began.
        self._first: _Moment | None = None
        #: So many looks in a row have asked ``malloc``, and so many further ones will not.
        self._asked = self._unasked = 0
        # Not the random numbers of the tasks, which may have been seeded.
        self._random = random.Random()

    def begin(self, task_id: str, task: Any, **keywords: Any) -> None:
        """A call begins: the receiver of ``task_prerun``."""
        if task.request.is_eager:
            # Part of the call that makes it.
            return
        self._running, last, self._last = None, self._last, None
        if _is_isolated(task):
            # It is none of ours, but the call before is over.
            self._settle(last, self._look())
            return
        tally = self._tallies.setdefault(task.name, _Tally())
        tally.calls += 1
        is_sampled = tally.calls in SAMPLED or tally.calls % SAMPLED_EVERY == 0
        if is_sampled:
            gc.collect()
        start = self._look()
        # After the collection: what waited for it has not been kept.
        self._settle(last, start)
        if self._first is None or self._first.malloc_bytes is None:
            self._first = start
        system.reset_peak_rss()
        self._running = _Running(task_id, tally, start, time.monotonic(), is_sampled)

    def end(self, task_id: str, task: Any, **keywords: Any) -> None:
        """A call has ended: the receiver of ``task_postrun``."""
        running = self._running
        if running is None or running.task_id != task_id or task.request.is_eager:
            return
        run_seconds = time.monotonic() - running.began
        self._running, self._last = None, running
        tally, start = running.tally, running.start
        highest, rss = system.peak_and_rss_bytes()
        peak = max(0, highest - start.rss_bytes)
        tally.highest_peak_bytes = max(tally.highest_peak_bytes, peak)
        collected = blocks = None
        if running.is_sampled:
            gc.collect()
            collected = system.rss_bytes() - start.rss_bytes
            blocks = sys.getallocatedblocks() - start.blocks
        self._events.send(
            uuid=task_id,
            name=task.name,
            number=tally.calls,
            start_bytes=start.rss_bytes,
            peak_bytes=peak,
            highest_peak_bytes=tally.highest_peak_bytes,
            retained_bytes=rss - start.rss_bytes,
            kept_bytes=tally.kept_bytes,
            used_calls=tally.used_calls,
            used_bytes=tally.used_bytes if tally.used_calls else None,
            idle_bytes=self._idle_since_first(start, BLOCK_BYTES),
            least_idle_bytes=self._idle_since_first(start, LARGEST_BLOCK_BYTES),
            run_seconds=run_seconds,
            collected_bytes=collected,
            blocks=blocks,
        )

    def _look(self) -> _Moment:
        """The memory of this process, now."""
        rss, blocks = system.rss_bytes(), sys.getallocatedblocks()
        if self._unasked > 0:
            self._unasked -= 1
            self._asked = 0
            return _Moment(rss, blocks, None)
        told = system.malloc_bytes_and_holes()
        if told is None:
            return _Moment(rss, blocks, None)
        malloc_bytes, holes = told
        self._asked += 1
        # It takes two, one after the other, to tell what a call has added.
        if self._asked >= 2 and holes >= MANY_HOLES:
            # Not always as many: tasks that come in turns would be asked for, or not, in turns.
            self._unasked = self._random.randint(1, 2 * holes // MANY_HOLES - 1)
        return _Moment(rss, blocks, malloc_bytes)

    @staticmethod
    def _settle(last: _Running | None, now: _Moment) -> None:
        """Put down what the call before has kept."""
        if last is None:
            return
        last.tally.kept_bytes += now.rss_bytes - last.start.rss_bytes
        before, after = last.start.used_bytes(BLOCK_BYTES), now.used_bytes(BLOCK_BYTES)
        if before is not None and after is not None:
            last.tally.used_calls += 1
            last.tally.used_bytes += after - before

    def _idle_since_first(self, start: _Moment, block_bytes: int) -> int | None:
        assert self._first is not None
        before, after = self._first.idle_bytes(block_bytes), start.idle_bytes(block_bytes)
        return None if before is None or after is None else after - before


class Refuser:
    """Says of each plain task that is called that it cannot be measured.

    Args:
        app: Whose calls.
        hostname: The name of the worker.
        why: It cannot.
    """

    def __init__(self, app: Celery, hostname: str, why: str) -> None:
        self._events = _Events(app, hostname)
        self._why = why
        self._said: dict[str, float] = {}

    def begin(self, **keywords: Any) -> None:
        """A call begins: there is nothing to do."""

    def end(self, task_id: str, task: Any, **keywords: Any) -> None:
        """A call has ended: the receiver of ``task_postrun``."""
        now = time.monotonic()
        if (
            task.request.is_eager
            or _is_isolated(task)
            or now - self._said.get(task.name, -REMINDER_SECONDS) < REMINDER_SECONDS
        ):
            return
        self._said[task.name] = now
        self._events.send(uuid=task_id, name=task.name, unmeasurable=self._why)


class _Events:
    """Sends events, and holds its peace for a while when that fails."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._silent_until = 0.0

    def send(self, **fields: Any) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            with self._app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send(EVENT, **fields)
        except Exception as exc:  # each transport has its own
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            logger.warning(
                "memory audit: an event could not be sent, the next is tried in %.0f s: %r",
                SILENCE_SECONDS,
                exc,
            )


def _is_isolated(task: Any) -> bool:
    return isinstance(task, IsolatedMixin) and settings.is_isolated(task)
