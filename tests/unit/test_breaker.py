"""Pauses between children that fail to begin."""

import pytest

from isolated_tasks.process.breaker import FIRST_PAUSE, LAST_PAUSE, OPEN_FROM, Breaker


class Clock:
    """A time that goes on when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("isolated_tasks.process.breaker.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failed("it went")


def test_while_all_is_well_nobody_waits() -> None:
    breaker = Breaker()

    assert [breaker.claim() for _ in range(3)] == [0, 0, 0]
    assert not breaker.is_open


@pytest.mark.usefixtures("clock")
def test_after_one_failure_the_next_try_comes_at_once() -> None:
    breaker = Breaker()
    fail(breaker, 1)

    assert breaker.claim() == 0


@pytest.mark.usefixtures("clock")
def test_pauses_double_up_to_the_last() -> None:
    breaker = Breaker()
    pauses = []
    for _ in range(20):
        fail(breaker, 1)
        pauses.append(breaker.pause)

    assert pauses[:4] == [0, FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == LAST_PAUSE
    # After a night of it the number still is one.
    fail(breaker, 5000)
    assert breaker.pause == LAST_PAUSE


def test_after_a_pause_one_tries_for_all(clock: Clock) -> None:
    breaker = Breaker()
    fail(breaker, OPEN_FROM)
    pause = breaker.pause
    assert breaker.claim() == pytest.approx(pause)

    clock.now += pause

    assert breaker.claim() == 0
    assert breaker.claim() == pytest.approx(pause)


@pytest.mark.usefixtures("clock")
def test_failures_without_a_child_count_but_not_as_stillborn() -> None:
    breaker = Breaker()
    for is_stillborn in (True, False, False, True):
        breaker.failed("it went", is_stillborn=is_stillborn)

    assert (breaker.failures, breaker.stillborn) == (4, 2)

    breaker.succeeded()

    assert (breaker.failures, breaker.stillborn) == (0, 0)


@pytest.mark.fault(44)
@pytest.mark.usefixtures("clock")
def test_it_opens_after_several_failures_in_a_row_and_the_first_success_closes_it() -> None:
    breaker = Breaker()
    fail(breaker, OPEN_FROM - 1)
    assert not breaker.is_open
    fail(breaker, 1)
    assert breaker.is_open
    assert breaker.reason == "it went"

    breaker.succeeded()

    assert not breaker.is_open
    assert breaker.claim() == 0
    assert breaker.pause == 0
