"""The table of a child's life is complete, and holds."""

import itertools
from pathlib import Path

import pytest

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process.lifecycle import TRANSITIONS, Event, Lifecycle, State


def lifecycle(state: State) -> Lifecycle:
    life = Lifecycle()
    life.state = state
    return life


def reachable(state: State, events: set[Event]) -> set[State]:
    """Where these events can lead from here, the state itself included."""
    found = {state}
    waiting = [state]
    while waiting:
        row = TRANSITIONS[waiting.pop()]
        new = {after for event, after in row.items() if event in events} - found
        found |= new
        waiting.extend(new)
    return found


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_event_occurs() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


def test_a_child_begins_ready() -> None:
    assert Lifecycle().state is State.READY


def test_every_state_can_be_reached() -> None:
    assert reachable(State.READY, set(Event)) == set(State)


@pytest.mark.parametrize("state", State)
def test_the_end_can_be_reached_from_every_state(state: State) -> None:
    assert State.EXITED in reachable(state, set(Event))


def test_nothing_leaves_the_end() -> None:
    assert reachable(State.EXITED, set(Event)) == {State.EXITED}


@pytest.mark.parametrize("state", [state for state in State if state is not State.EXITED])
def test_a_child_may_exit_at_any_time(state: State) -> None:
    assert TRANSITIONS[state][Event.EXITED] is State.EXITED


@pytest.mark.parametrize("state", State)
def test_a_child_may_be_dismissed_at_any_time_and_serves_nothing_afterwards(state: State) -> None:
    assert TRANSITIONS[state][Event.DISMISS] in (State.EXITING, State.EXITED)


def test_an_exiting_child_never_runs_again() -> None:
    assert reachable(State.EXITING, set(Event)) == {State.EXITING, State.EXITED}


def test_only_an_accepted_call_runs() -> None:
    ways = {
        (state, event)
        for state, row in TRANSITIONS.items()
        for event, after in row.items()
        if after is State.RUNNING and state is not State.RUNNING
    }

    assert ways == {(State.CALLED, Event.ACCEPTED)}


@pytest.mark.parametrize("state", State)
def test_that_the_process_was_started_changes_no_state(state: State) -> None:
    assert TRANSITIONS[state].get(Event.STARTED, state) is state


@pytest.mark.parametrize(("state", "event"), [*itertools.product(State, Event)])
def test_an_event_moves_on_as_the_table_says_or_raises_and_names_both(
    state: State, event: Event
) -> None:
    life = lifecycle(state)
    after = TRANSITIONS[state].get(event)

    if after is not None:
        life.handle(event)
        assert life.state is after
    else:
        with pytest.raises(ProtocolError, match=f"{state.value}.*{event.value}"):
            life.handle(event)
        assert life.state is state


def test_a_batch_goes_round_and_ends_with_its_last_outcome() -> None:
    life = Lifecycle()

    for event in (
        *(Event.STARTED, Event.CALL, Event.ACCEPTED, Event.OUTCOME),
        *(Event.CALL, Event.ACCEPTED, Event.LAST_OUTCOME),
        Event.EXITED,
    ):
        life.handle(event)

    assert life.state is State.EXITED


def test_the_page_on_the_design_shows_the_table() -> None:
    lines = [
        f"{state.value:<9}"
        + ", ".join(f"{event.value} → {after.value}" for event, after in row.items())
        for state, row in TRANSITIONS.items()
    ]
    page = Path(__file__).parents[2] / "docs/explanation/design.md"

    assert "```text\n" + "\n".join(lines) + "\n```" in page.read_text()
