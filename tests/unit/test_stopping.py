"""The stop ladder, and what is due for one call: as if time went as these tests want it to."""

import logging
import math
import signal
import time
from collections.abc import Callable

import pytest

from isolated_tasks.process import enforcer as enforcing
from isolated_tasks.process import memory, stopping
from isolated_tasks.process.enforcer import Enforcer
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.stopping import Cause, Ladder, Rung

MIB = 1 << 20

TERM = (signal.SIGTERM, True)
KILL = (signal.SIGKILL, True)


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    # Looks that are there just to know are not what is due here.
    monkeypatch.setattr(enforcing, "FIRST_LOOK", math.inf)
    return clock


def climb(ladder: Ladder, clock: Clock) -> list[tuple[float, tuple[int, bool]]]:
    """After how many seconds each rung is due, its signal, and whether it is for the group."""
    began, steps = clock.now, []
    while (wait := ladder.wait(clock.now)) is not None:
        if wait:
            # Not a moment earlier.
            assert ladder.due(clock.now + wait * 0.999) is None
        clock.now += wait
        rung = ladder.due(clock.now)
        assert rung is not None
        steps.append((round(clock.now - began, 6), (rung.signal, rung.to_group)))
    assert ladder.due(clock.now + 1e9) is None
    return steps


# ── ladders ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("grace", "patience"), [(5.0, 0.2), (0.2, 0.2), (0.05, 0.05)])
def test_a_hard_time_limit_has_little_patience(clock: Clock, grace: float, patience: float) -> None:
    ladder = stopping.on_time_limit(90, grace)

    assert climb(ladder, clock) == [(0, TERM), (patience, KILL)]
    assert ladder.cause is Cause.TIME_LIMIT
    assert ladder.why == "hard time limit (90 s) exceeded"


def test_a_memory_limit_has_none(clock: Clock) -> None:
    ladder = stopping.on_memory_limit(100 * MIB, 120 * MIB)

    assert climb(ladder, clock) == [(0, KILL)]
    assert ladder.cause is Cause.MEMORY_LIMIT
    assert "100 MiB" in ladder.why
    assert "120 MiB" in ladder.why


@pytest.mark.parametrize(
    ("number", "steps"),
    [
        (signal.SIGKILL, [(0, KILL)]),
        (signal.SIGTERM, [(0, TERM), (3, KILL)]),
        # They end the body, and what it has started gets its SIGTERM at once.
        (signal.SIGQUIT, [(0, (signal.SIGQUIT, False)), (0, TERM), (3, KILL)]),
        (signal.SIGHUP, [(0, (signal.SIGHUP, False)), (0, TERM), (3, KILL)]),
        (signal.SIGUSR1, [(0, (signal.SIGUSR1, False)), (3, TERM), (6, KILL)]),
        (signal.SIGINT, [(0, (signal.SIGINT, False)), (3, TERM), (6, KILL)]),
    ],
)
def test_a_request_begins_with_its_own_signal_and_ends_with_a_kill(
    clock: Clock, number: int, steps: list[tuple[float, tuple[int, bool]]]
) -> None:
    ladder = stopping.on_request(number, 3, "revoked")

    assert climb(ladder, clock) == steps
    assert (ladder.cause, ladder.why) == (Cause.REQUEST, "revoked")


def test_a_rung_that_comes_late_does_not_hurry_the_next(clock: Clock) -> None:
    ladder = stopping.on_request(signal.SIGTERM, 3, "revoked")
    clock.now += 100

    assert ladder.due(clock.now) == Rung(signal.SIGTERM, to_group=True, patience=3)
    assert ladder.due(clock.now) is None
    assert ladder.wait(clock.now) == 3


# ── what is due ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What looks at memory are to find, one after the other."""
    sizes: list[int] = []

    def look(pid: int, *, above: int | None = None) -> int:
        assert (pid, above) == (77, 1000 * MIB)
        return sizes.pop(0)

    monkeypatch.setattr(memory, "tree_bytes", look)
    return sizes


def new_enforcer(
    *, soft: float | None = None, hard: float | None = None, limit: int | None = None
) -> Enforcer:
    return Enforcer(
        ProcessOptions("test", memory_limit_bytes=limit, term_grace=5),
        CallOptions("test", "id", soft_time_limit=soft, time_limit=hard),
    )


def due(enforcer: Enforcer) -> int | None:
    rung = enforcer.due(77)
    return None if rung is None else rung.signal


def test_without_limits_nothing_is_ever_due(clock: Clock) -> None:
    enforcer = new_enforcer()
    enforcer.accepted()
    enforcer.begun()
    clock.now += 1e6

    assert due(enforcer) is None
    assert enforcer.wait() == math.inf
    assert not enforcer.is_over


def test_without_a_memory_limit_looks_become_rare(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(time, "monotonic", clock)
    sizes = [3 * MIB, 9 * MIB, *[MIB] * 20]
    monkeypatch.setattr(memory, "tree_rss_bytes", lambda pid: sizes.pop(0))
    enforcer = new_enforcer()
    enforcer.accepted()
    # Bodies of less than that are not looked at.
    assert enforcer.wait() is None
    enforcer.begun()
    waits: list[float] = []
    while len(waits) < 12:
        waits.append(enforcer.wait() or 0.0)
        clock.now += waits[-1]
        assert due(enforcer) is None

    assert waits[0] == pytest.approx(enforcing.FIRST_LOOK)
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(enforcing.LONGEST_PAUSE)
    assert (enforcer.last_bytes, enforcer.peak_bytes) == (MIB, 9 * MIB)


def test_before_the_body_begins_no_clock_runs(clock: Clock) -> None:
    enforcer = new_enforcer(soft=1, hard=2)
    enforcer.accepted()
    clock.now += 1e6

    assert due(enforcer) is None
    assert enforcer.wait() is None


def test_first_comes_the_soft_limit_and_then_the_ladder(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    enforcer = new_enforcer(soft=10, hard=15)
    enforcer.begun()

    assert enforcer.wait() == 10
    clock.now += 9.9
    assert due(enforcer) is None
    clock.now += 0.1
    assert not enforcer.soft_signal_sent
    assert enforcer.due(77) == Rung(signal.SIGUSR1, to_group=False, patience=0)
    # Once, and the body goes on.
    assert due(enforcer) is None
    assert enforcer.soft_signal_sent
    assert enforcer.ladder is None
    assert enforcer.wait() == pytest.approx(5)
    clock.now += 5
    assert due(enforcer) == signal.SIGTERM
    assert enforcer.ladder is not None
    assert enforcer.wait() == pytest.approx(0.2)
    clock.now += 0.2
    assert due(enforcer) == signal.SIGKILL
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "Soft time limit (10s) exceeded for test[id]"),
        (logging.ERROR, "Hard time limit (15s) exceeded for test[id]"),
    ]


def test_limits_that_are_equal_are_both_kept(clock: Clock) -> None:
    enforcer = new_enforcer(soft=10, hard=10)
    enforcer.begun()
    clock.now += 10

    assert [due(enforcer), due(enforcer), due(enforcer)] == [signal.SIGUSR1, signal.SIGTERM, None]


def test_who_was_killed_is_waited_for_and_not_for_ever(clock: Clock) -> None:
    enforcer = new_enforcer()
    enforcer.stop(stopping.on_request(signal.SIGKILL, 5, "revoked"))
    assert due(enforcer) == signal.SIGKILL

    assert not enforcer.is_over
    assert enforcer.wait() == enforcing.KILLED_SECONDS
    clock.now += enforcing.KILLED_SECONDS
    assert enforcer.is_over


STOPS: dict[str, Callable[[], Ladder]] = {
    "time": lambda: stopping.on_time_limit(1, 5),
    "memory": lambda: stopping.on_memory_limit(1, 2),
    "request": lambda: stopping.on_request(signal.SIGTERM, 5, "revoked"),
}


@pytest.mark.parametrize("first", STOPS)
@pytest.mark.parametrize("second", STOPS)
def test_the_first_reason_stands(first: str, second: str) -> None:
    enforcer = new_enforcer()
    ladder = STOPS[first]()
    enforcer.stop(ladder)
    enforcer.stop(STOPS[second]())

    assert enforcer.ladder is ladder


def test_a_body_that_is_being_stopped_has_no_other_limits(clock: Clock, held: list[int]) -> None:
    enforcer = new_enforcer(soft=1, hard=2, limit=1000 * MIB)
    enforcer.accepted()
    enforcer.begun()
    enforcer.stop(stopping.on_request(signal.SIGTERM, 5, "revoked"))
    assert due(enforcer) == signal.SIGTERM
    clock.now += 4.9

    # Nobody has looked at its memory either: there would be nothing to find.
    assert held == []
    assert due(enforcer) is None
    assert not enforcer.soft_signal_sent
    assert enforcer.wait() == pytest.approx(0.1)


def test_memory_is_looked_at_the_sooner_the_less_is_left(clock: Clock, held: list[int]) -> None:
    enforcer = new_enforcer(limit=1000 * MIB)
    assert enforcer.wait() is None
    enforcer.accepted()
    assert enforcer.wait() == 0
    held[:] = [10 * MIB, 900 * MIB, 500 * MIB, 1000 * MIB]

    waits = []
    for _ in range(4):
        assert due(enforcer) is None
        # Not again before it is time.
        assert due(enforcer) is None
        wait = enforcer.wait()
        assert wait is not None
        waits.append(wait)
        clock.now += wait

    assert held == []
    assert waits == pytest.approx([memory.next_look(n * MIB) for n in (990, 100, 500, 0)])
    assert waits[1] < waits[2] < waits[0]
    assert (enforcer.last_bytes, enforcer.peak_bytes) == (1000 * MIB, 1000 * MIB)


def test_more_than_the_limit_is_the_end(clock: Clock, held: list[int]) -> None:
    enforcer = new_enforcer(soft=1000, hard=2000, limit=1000 * MIB)
    enforcer.accepted()
    enforcer.begun()
    held[:] = [900 * MIB, 1000 * MIB + 1]

    assert due(enforcer) is None
    clock.now += 1
    assert due(enforcer) == signal.SIGKILL
    assert enforcer.ladder is not None
    assert enforcer.ladder.cause is Cause.MEMORY_LIMIT
    assert enforcer.peak_bytes == 1000 * MIB + 1


def test_what_a_look_has_found_is_acted_upon_at_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Until the next step it might be the kernel that kills, and nothing would say why.
    def look(pid: int, *, above: int | None = None) -> int:
        clock.now += 0.01
        return 1001 * MIB

    monkeypatch.setattr(memory, "tree_bytes", look)
    enforcer = Enforcer(ProcessOptions("test", memory_limit_bytes=1000 * MIB), CallOptions())
    enforcer.accepted()

    rung = enforcer.due(77)

    assert rung is not None
    assert rung.signal == signal.SIGKILL


def test_the_peak_is_the_most_that_was_seen(clock: Clock, held: list[int]) -> None:
    enforcer = new_enforcer(limit=1000 * MIB)
    enforcer.accepted()
    held[:] = [700 * MIB, 100 * MIB]
    for _ in range(2):
        assert due(enforcer) is None
        clock.now += 1

    assert (enforcer.last_bytes, enforcer.peak_bytes) == (100 * MIB, 700 * MIB)


def test_a_child_whose_pid_nobody_knows_is_not_looked_at() -> None:
    enforcer = new_enforcer(limit=1000 * MIB)
    enforcer.accepted()

    assert enforcer.due(None) is None
    assert enforcer.last_bytes is None
