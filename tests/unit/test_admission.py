"""Which children may start."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolated_tasks.process.admission import Admission, Answer


def released(admission: Admission, who: object) -> Iterator[object]:
    """Who starts when this one is gone."""
    admission.give_back(who)
    while (admitted := admission.next()) is not None:
        yield admitted


def test_without_a_budget_everything_starts() -> None:
    admission = Admission(None)

    assert [admission.ask(number, 1 << 50) for number in range(9)] == [Answer.START] * 9


def test_children_start_as_long_as_their_limits_fit() -> None:
    admission = Admission(10)

    assert admission.ask("a", 6) is Answer.START
    assert admission.ask("b", 4) is Answer.START
    assert admission.ask("c", 1) is Answer.WAIT
    assert admission.taken_bytes == 10
    assert list(released(admission, "a")) == ["c"]
    assert admission.taken_bytes == 5


def test_what_can_never_fit_is_told_at_once() -> None:
    admission = Admission(10)

    assert admission.ask("a", 11) is Answer.NEVER
    assert admission.ask("b", 10) is Answer.START


def test_nobody_is_overtaken() -> None:
    admission = Admission(10)
    admission.ask("runs", 6)

    assert admission.ask("large", 10) is Answer.WAIT
    assert admission.ask("small", 1) is Answer.WAIT
    assert list(released(admission, "runs")) == ["large"]
    assert list(released(admission, "large")) == ["small"]


def test_several_may_start_when_one_is_gone() -> None:
    admission = Admission(10)
    admission.ask("runs", 10)
    for who in "abc":
        assert admission.ask(who, 4) is Answer.WAIT

    assert list(released(admission, "runs")) == ["a", "b"]


def test_one_without_a_limit_counts_nothing_and_never_waits() -> None:
    admission = Admission(10)
    admission.ask("runs", 10)
    admission.ask("waits", 10)

    assert admission.ask("unlimited", None) is Answer.START
    assert list(released(admission, "unlimited")) == []


def test_who_waits_and_goes_makes_way() -> None:
    admission = Admission(10)
    admission.ask("runs", 6)
    admission.ask("large", 10)
    admission.ask("small", 4)

    assert list(released(admission, "large")) == ["small"]


def test_a_child_of_a_dead_forkserver_counts_though_there_is_no_room() -> None:
    admission = Admission(10)
    admission.ask("runs", 10)

    admission.take("adopted", 5)
    assert admission.ask("new", 1) is Answer.WAIT
    assert list(released(admission, "runs")) == ["new"]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_what_runs_never_comes_to_more_than_the_budget(steps: list[tuple[bool, int]]) -> None:
    admission = Admission(10)
    running: dict[int, int] = {}
    waiting: dict[int, int] = {}
    for number, (asks, size) in enumerate(steps):
        if asks:
            answer = admission.ask(number, size)
            assert (answer is Answer.NEVER) == (size > 10)
            if answer is not Answer.NEVER:
                (running if answer is Answer.START else waiting)[number] = size
        elif running:
            gone = sorted(running)[size % len(running)]
            del running[gone]
            for who in released(admission, gone):
                assert who == min(waiting)
                running[who] = waiting.pop(who)
        assert sum(running.values()) == admission.taken_bytes <= 10
        # Somebody waits only for want of room.
        assert not waiting or sum(running.values()) + waiting[min(waiting)] > 10


@pytest.mark.parametrize("who", ["never asked", "runs"])
def test_giving_back_twice_is_harmless(who: str) -> None:
    admission = Admission(10)
    admission.ask("runs", 6)
    admission.give_back("runs")

    admission.give_back(who)
    assert admission.taken_bytes == 0
