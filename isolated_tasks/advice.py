"""What the memory figures of a plain task come to: a verdict, the reason for it, and what to do.

Pure code: figures in, advice out. The figures are those of `isolated_tasks.audit`, from any number
of processes. A pool process runs many tasks in one heap, so all of them are differences: what a
call added, never how large the process was. There are two kinds:

* *resident* memory (RSS), which is what people see. In a shared heap it alone may accuse the wrong
  task: a leak can fill holes that another task has left and needs again, and then it is the other
  one that makes the process grow;
* memory *in use*: what the allocators of C and Python have handed out and not got back. A leak
  adds to it wherever it lies. What is resident and not in use is *idle*: held for nothing.

The rules, in this order; the first that holds is the verdict:

============== ====================================================================================
verdict        when
============== ====================================================================================
unmeasurable   no call could be measured
too few calls  fewer than `ENOUGH_CALLS` after the first `WARM_UP_CALLS` in each process, which
               import, connect and fill caches
grows          the memory in use grows with the calls; or the resident memory does, and the idle
               memory of the process with it (a leak in another allocator, or fragmentation that
               gets worse)
keeps its peak a process holds idle memory of `KEPT_SHARE` of the highest peak of the task, and of
               `KEPT_BYTES` or more
fine           else, however high the peak is
============== ====================================================================================

Something *grows* if each call adds `GROWTH_BYTES_A_CALL` or more, if these come to `GROWTH_BYTES`
or more, and if `GROWTH_LASTS` of that is also added by the later half of the calls, which a cache
that fills up does not do, and from one ``gc.collect()`` to the next, which reference cycles that
wait for the collector do not do.

What each call adds is the median of the slopes between any two calls of one process (Theil and
Sen), so that single leaps, an import or a rehashed dictionary, do not count for growth.
"""

from __future__ import annotations

import enum
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Advice",
    "Call",
    "ProcessFigures",
    "TaskFigures",
    "Verdict",
    "advise",
    "resident_growth_bytes",
    "size",
]

KIB, MIB = 1 << 10, 1 << 20

#: So many calls of a task in each process are left out of its growth.
WARM_UP_CALLS = 3
#: So many further calls, in all processes together, are needed for a verdict.
ENOUGH_CALLS = 5
#: A call that adds less is not said to grow: at 10,000 calls a day this is 80 MiB.
GROWTH_BYTES_A_CALL = 8 * KIB
#: Nor is a task whose calls have together added less: allocators work in steps of up to 1 MiB.
GROWTH_BYTES = 4 * MIB
#: What has to be confirmed of a growth, as a share of it.
GROWTH_LASTS = 0.5
#: Of the highest peak of a task in a process, what that holds idle, to be said to keep it.
KEPT_SHARE = 0.5
#: Less is no reason to do anything; first calls import and connect.
KEPT_BYTES = 16 * MIB

#: What a process of its own costs a call, in seconds, and what share of a call's run it may cost.
PROCESS_SECONDS, PROCESS_SHARE = 0.01, 0.05
#: A batch may grow by what one call of the task needs at its peak, or by this, before it ends.
BATCH_BYTES = 64 * MIB
#: Sizes to suggest: the figures are worth no more digits.
BATCH_SIZES = (1, 2, 5, 10, 20, 50, 100)

#: Only so many calls of a process are looked at for growth: the latest.
MAX_CALLS = 500
#: And only so many of these are compared with one another, evenly spread.
MAX_COMPARED = 60


class Verdict(enum.Enum):
    """What is the matter with a task, the more severe the later."""

    UNMEASURABLE = "unmeasurable"
    TOO_FEW_CALLS = "too few calls"
    FINE = "fine"
    KEEPS_ITS_PEAK = "keeps its peak"
    GROWS = "grows"

    @property
    def severity(self) -> int:
        """0 for the first of them."""
        return list(type(self)).index(self)


@dataclass(frozen=True)
class Call:
    """What one call of a task came to. What was added is up to the beginning of the next call."""

    #: Which call of the task in its process, from 1 on.
    number: int
    #: The highest RSS of any call of the task in this process, above that at the call's beginning.
    highest_peak_bytes: int
    #: What the calls of the task before this one have added to the RSS of the process.
    kept_bytes: int
    #: In seconds.
    run_seconds: float
    #: For how many of the calls before this one it was measured what they added to the memory in
    #: use, and how much that was; None where the allocators do not tell.
    used_calls: int = 0
    used_bytes: int | None = None
    #: How much more of the process is idle than when its first call began, whatever task did it: an
    #: estimate, and what it is at the least. None where it was not measured.
    idle_bytes: int | None = None
    least_idle_bytes: int | None = None
    #: What this call has added to RSS, from one ``gc.collect()`` to the next; None unless these
    #: were made.
    collected_bytes: int | None = None
    #: How many blocks of Python's allocator, about one or two an object, it has added likewise.
    blocks: int | None = None


@dataclass
class ProcessFigures:
    """What the calls of one task in one process come to."""

    calls: int = 0
    latest: Call | None = None
    after_warm_up: deque[Call] = field(default_factory=lambda: deque(maxlen=MAX_CALLS))

    def add(self, call: Call) -> None:
        """Take one more call."""
        self.calls += 1
        self.latest = call
        if call.number > WARM_UP_CALLS:
            self.after_warm_up.append(call)

    @property
    def highest_peak_bytes(self) -> int:
        """Of any call in this process."""
        return self.latest.highest_peak_bytes if self.latest else 0

    @property
    def span(self) -> int:
        """How many calls the growth is measured over."""
        calls = self.after_warm_up
        return calls[-1].number - calls[0].number if calls else 0

    @property
    def used_bytes(self) -> int | None:
        """What the calls have added to the memory in use; None if that is not known."""
        call = self.latest
        if call is None or call.used_bytes is None or not call.used_calls:
            return None
        # As if those that were not measured had added as much.
        return round(call.used_bytes * (call.number - 1) / call.used_calls)

    @property
    def idle_bytes(self) -> int:
        """What the process holds idle because of this task.

        No more than the task has needed at its peak, since it is what a peak leaves behind, and no
        more than the process holds idle at all.
        """
        call = self.latest
        if call is None:
            return 0
        bounds = [call.kept_bytes - (self.used_bytes or 0)]
        if self.used_bytes is not None:
            bounds.append(call.highest_peak_bytes)
        bounds += [one.idle_bytes for one in self.after_warm_up if one.idle_bytes is not None][-1:]
        return max(0, min(bounds))

    @property
    def keeps_its_peak(self) -> bool:
        """Whether this process holds, idle, most of what a call once needed."""
        return self.idle_bytes >= max(KEPT_BYTES, KEPT_SHARE * self.highest_peak_bytes)


@dataclass
class TaskFigures:
    """What the calls of one task come to, in all processes that could measure them."""

    name: str
    #: By name of the worker, and pid.
    processes: dict[tuple[str, int], ProcessFigures] = field(default_factory=dict)
    #: The latest calls of any process.
    recent: deque[Call] = field(default_factory=lambda: deque(maxlen=MAX_CALLS))
    #: Why a worker cannot measure its calls, by its name.
    unmeasurable: dict[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """How many were measured."""
        return sum(figures.calls for figures in self.processes.values())

    def add(self, process: tuple[str, int], call: Call) -> None:
        """Take one more call.

        Args:
            process: Name of its worker, and pid.
            call: What it came to.
        """
        self.processes.setdefault(process, ProcessFigures()).add(call)
        self.recent.append(call)


@dataclass(frozen=True)
class Advice:
    """A verdict with the figures that led to it."""

    task: str
    verdict: Verdict
    #: In words, with the figures.
    because: str
    #: How many were measured, in how many processes, and of which workers.
    calls: int
    processes: int
    workers: tuple[str, ...] = ()
    #: The highest peak of a call, above what its process held as it began.
    peak_bytes: int | None = None
    #: What the process that holds most of it holds idle because of this task.
    idle_bytes: int | None = None
    #: What each call adds for good; None where there are too few.
    kept_per_call_bytes: int | None = None
    #: The same as seen in RSS, rightly or wrongly.
    rss_per_call_bytes: int | None = None
    #: RSS that each call has added from one ``gc.collect()`` to the next: the median of those calls
    #: that were made so.
    collected_per_call_bytes: int | None = None
    #: Blocks of Python's allocator that each call has added likewise.
    blocks_per_call: int | None = None
    #: Median, in seconds.
    run_seconds: float | None = None
    #: What to give the task, once it is isolated; None where it need not be.
    batch_size: int | None = None

    @property
    def action(self) -> str:
        """What to do: ``isolate``, ``isolate, batch_size=20``, or nothing."""
        if self.batch_size is None:
            return ""
        return "isolate" if self.batch_size == 1 else f"isolate, batch_size={self.batch_size}"


def advise(task: TaskFigures) -> Advice:
    """Judge a task by its figures; see the module for the rules."""
    if not task.calls:
        reasons = "; ".join(f"{worker}: {why}" for worker, why in task.unmeasurable.items())
        return Advice(task.name, Verdict.UNMEASURABLE, reasons or "no call was seen", 0, 0)
    processes = list(task.processes.values())
    span = sum(figures.span for figures in processes)
    series = [list(figures.after_warm_up) for figures in processes]
    rss, used, idle = _Growth(series, _rss), _Growth(series, _used), _Growth(series, _least_idle)
    each = rss.a_call if used.a_call is None else used.a_call
    run_seconds = statistics.median(call.run_seconds for call in task.recent)
    fullest = max(processes, key=lambda figures: figures.idle_bytes)
    peak = max(figures.highest_peak_bytes for figures in processes)
    of_peak = f"of a peak of {size(peak)} a process holds {size(fullest.idle_bytes)} idle"
    blocks = _median(call.blocks for call in task.recent)
    batch_size = None
    if span < ENOUGH_CALLS or each is None or rss.a_call is None:
        verdict = Verdict.TOO_FEW_CALLS
        because = (
            f"{span} calls after the first {WARM_UP_CALLS} in each of {len(processes)} processes,"
            f" {ENOUGH_CALLS} are needed"
        )
    elif used.goes_on(span) or (rss.goes_on(span) and idle.confirms(rss)):
        verdict = Verdict.GROWS
        each = max(each, rss.a_call)
        batch_size = _batch_size(run_seconds, growth=each, room=max(peak, BATCH_BYTES))
        because = (
            f"each of {span} calls added {size(each)}, and does so in the later half and after"
            f" gc.collect() too; {of_peak}"
        )
        if blocks is not None:
            because += f"; blocks of Python's allocator that a call leaves: {blocks}"
    elif any(figures.keeps_its_peak for figures in processes):
        verdict = Verdict.KEEPS_ITS_PEAK
        batch_size = _batch_size(run_seconds)
        because = f"{of_peak}; each call adds {size(each)}"
    else:
        verdict = Verdict.FINE
        because = f"{of_peak}; each call adds {size(each)}"
        if used.goes_on(span, uncollected=True):
            because += ", reference cycles that gc.collect() gets back"
    for worker, why in sorted(task.unmeasurable.items()):
        because += f"; {worker} could not measure: {why}"
    return Advice(
        task.name,
        verdict,
        because,
        task.calls,
        len(processes),
        tuple(sorted({worker for worker, _ in task.processes})),
        peak_bytes=peak,
        idle_bytes=fullest.idle_bytes,
        kept_per_call_bytes=None if each is None else round(each),
        rss_per_call_bytes=None if rss.a_call is None else round(rss.a_call),
        collected_per_call_bytes=_median(call.collected_bytes for call in task.recent),
        blocks_per_call=blocks,
        run_seconds=run_seconds,
        batch_size=batch_size,
    )


def resident_growth_bytes(figures: ProcessFigures) -> int:
    """What the calls in one process add to what is resident in it and not in use, by these rules.

    That is a leak in an allocator that does not tell what it has handed out, or fragmentation that
    gets worse; where no allocator tells, any growth. 0 where it is none.
    """
    series = [list(figures.after_warm_up)]
    rss, idle = _Growth(series, _rss), _Growth(series, _least_idle)
    if rss.a_call is None or not rss.goes_on(figures.span) or not idle.confirms(rss):
        return 0
    return round(rss.a_call * figures.span)


def size(size_bytes: float) -> str:
    """A number of bytes, for people."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if abs(size_bytes) >= 0.95 * 2**power:
            return f"{size_bytes / 2**power:.1f} {unit}"
    return f"{size_bytes / KIB:.0f} KiB"


# ── growth ──────────────────────────────────────────────────────────────────────────────────────

#: How many calls there had been, and what they had added.
Point = tuple[int, int]


def _rss(call: Call) -> Point | None:
    return call.number - 1, call.kept_bytes


def _used(call: Call) -> Point | None:
    return None if call.used_bytes is None else (call.used_calls, call.used_bytes)


def _least_idle(call: Call) -> Point | None:
    return None if call.least_idle_bytes is None else (call.number - 1, call.least_idle_bytes)


class _Growth:
    """How one figure grows with the calls of a task.

    Args:
        series: The calls in each process.
        figure: The point that a call is.
    """

    def __init__(
        self, series: Sequence[Sequence[Call]], figure: Callable[[Call], Point | None]
    ) -> None:
        def slope(of: Callable[[Sequence[Call]], Iterable[Call]]) -> float | None:
            return _slope([[p for call in of(calls) if (p := figure(call))] for calls in series])

        #: What each call adds; None if it is not known.
        self.a_call = slope(lambda calls: calls)
        #: With one call more than half of them: three make two pairs.
        self._later = slope(lambda calls: calls[(len(calls) - 1) // 2 :])
        #: Those that ``gc.collect()`` came before.
        self._collected = slope(lambda calls: [c for c in calls if c.collected_bytes is not None])

    def goes_on(self, span: int, *, uncollected: bool = False) -> bool:
        """Whether this is growth that goes on.

        Args:
            span: Over how many calls it was measured.
            uncollected: Count what ``gc.collect()`` gets back.
        """
        if self.a_call is None or self._later is None:
            return False
        confirmed = self._later
        if self._collected is not None and not uncollected:
            confirmed = min(confirmed, self._collected)
        return (
            self.a_call >= GROWTH_BYTES_A_CALL
            and self.a_call * span >= GROWTH_BYTES
            and confirmed >= GROWTH_LASTS * self.a_call
        )

    def confirms(self, other: _Growth) -> bool:
        """Whether this grows with another; where it is not known nothing speaks against it."""
        assert other.a_call is not None
        return self.a_call is None or self.a_call >= GROWTH_LASTS * other.a_call


def _slope(series: Iterable[Sequence[Point]]) -> float | None:
    """The median slope between two points of one process; None without any."""
    slopes = [
        (after[1] - before[1]) / (after[0] - before[0])
        for points in series
        for before, after in itertools.combinations(_thinned(points), 2)
        if after[0] != before[0]
    ]
    return statistics.median(slopes) if slopes else None


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most so many of the points, with the first and the last."""
    if len(points) <= MAX_COMPARED:
        return points
    step = (len(points) - 1) / (MAX_COMPARED - 1)
    return [points[round(number * step)] for number in range(MAX_COMPARED)]


def _median(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known)) if known else None


# ── batches ─────────────────────────────────────────────────────────────────────────────────────


def _batch_size(run_seconds: float, *, growth: float = 0.0, room: float = math.inf) -> int:
    """So many calls a process that its own cost is small, and that it does not grow too far."""
    wanted = PROCESS_SECONDS / (PROCESS_SHARE * max(run_seconds, 1e-6))
    enough = next((size for size in BATCH_SIZES if size >= wanted), BATCH_SIZES[-1])
    fitting = room / growth if growth > 0 else math.inf
    return max(size for size in BATCH_SIZES if size <= max(1, min(enough, fitting)))
