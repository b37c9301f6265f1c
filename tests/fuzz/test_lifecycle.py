"""The table of a child's life against those who live it, in every order that there is.

The model knows of no table: a child and a forkserver say what they say when they may, on two
sockets, and a requester reads these when it likes, and does what it wants. All that can come of a
few calls is gone through, with nothing left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process.lifecycle import TRANSITIONS, Event, Lifecycle, State

CALLS = 3

Events = tuple[Event, ...]


@dataclass(frozen=True)
class World:
    """One child, its forkserver, its requester, and what is on its way to the requester."""

    control: Events = ()
    call: Events = ()

    # The forkserver: is there; has forked or refused; has told of the child; and of its exit.
    is_serving: bool = True
    has_answered: bool = False
    has_told: bool = False
    has_reaped: bool = False

    # The child: its calls, the body that runs, the end.
    is_alive: bool = False
    to_read: int = 0
    has_accepted: bool = False
    has_begun: bool = False
    is_leaving: bool = False

    # What the requester has done and seen.
    calls: int = 0
    accepted: int = 0
    outcomes: int = 0
    knows_pid: bool = False
    is_dismissed: bool = False
    is_last: bool = False
    is_over: bool = False

    @property
    def state(self) -> State:
        """What the requester has to take the child for."""
        if self.is_over:
            return State.EXITED
        if self.is_dismissed or self.is_last:
            return State.EXITING
        if self.outcomes == self.calls:
            return State.READY
        return State.RUNNING if self.accepted == self.calls else State.CALLED

    def steps(self) -> Iterator[tuple[Events, World]]:
        """All that may happen next: what the requester sees of it, and the world after it."""
        if not self.is_over:
            for after in (*self.forkserver(), *self.child()):
                yield (), after
        for events in self.requester():
            after = self
            for event in events:
                after = after.seen(event)
            yield events, after

    def forkserver(self) -> Iterator[World]:
        if not self.is_serving:
            return
        yield replace(self, is_serving=False)
        if not self.has_answered:
            yield replace(self, has_answered=True, is_alive=True)
            # Refused: nothing will ever be told or reaped.
            refused = replace(self, has_answered=True, has_told=True, has_reaped=True)
            yield replace(refused, control=(*self.control, Event.EXITED))
        elif not self.has_told:
            yield replace(self, has_told=True, control=(*self.control, Event.STARTED))
        elif not self.is_alive and not self.has_reaped:
            yield replace(self, has_reaped=True, control=(*self.control, Event.EXITED))

    def child(self) -> Iterator[World]:
        if not self.is_alive:
            return
        # It may crash, or be killed, at any time.
        yield replace(self, is_alive=False)
        if self.is_leaving:
            return
        if self.has_accepted:
            done = replace(self, has_accepted=False, has_begun=False)
            yield replace(done, call=(*self.call, Event.OUTCOME))
            yield replace(done, call=(*self.call, Event.LAST_OUTCOME), is_leaving=True)
            if not self.has_begun:
                yield replace(self, call=(*self.call, Event.BEGUN), has_begun=True)
        elif self.to_read:
            accepting = replace(self, to_read=self.to_read - 1, has_accepted=True)
            yield replace(accepting, call=(*self.call, Event.ACCEPTED))

    def requester(self) -> Iterator[Events]:
        yield (Event.DISMISS,)
        if self.is_over:
            return
        if self.state is State.READY and self.calls < CALLS:
            yield (Event.CALL,)
        # Once the exit is known, what can be read from the call socket is all that there will be.
        end = (*self.call, Event.EXITED)
        if self.control:
            yield end if self.control[0] is Event.EXITED else self.control[:1]
        elif not self.is_serving and not self.is_alive:
            # Nobody will tell; the kernel does.
            yield end
        if self.call:
            yield self.call[:1]
        if not self.knows_pid:
            # It was never heard of, and is not waited for.
            yield (Event.DISMISS, *end)

    def seen(self, event: Event) -> World:
        """The world after the requester has seen, or done, this."""
        if event is Event.CALL:
            return replace(self, calls=self.calls + 1, to_read=self.to_read + 1)
        if event is Event.DISMISS:
            return replace(self, is_dismissed=True)
        if event is Event.STARTED:
            return replace(self, control=self.control[1:], knows_pid=True)
        if event is Event.EXITED:
            return replace(self, control=(), is_over=True)
        after = replace(self, call=self.call[1:])
        if event is Event.ACCEPTED:
            return replace(after, accepted=self.accepted + 1, knows_pid=True)
        if event is Event.BEGUN:
            return after
        is_last = event is Event.LAST_OUTCOME
        return replace(after, outcomes=self.outcomes + 1, is_last=self.is_last or is_last)


@cache
def seen_events() -> set[tuple[State, Event]]:
    """Go through all worlds; return each state with each event that the requester sees in it."""
    seen = set()
    worlds = {World()}
    to_visit = [World()]
    while to_visit:
        world = to_visit.pop()
        for events, after in world.steps():
            life = Lifecycle()
            life.state = world.state
            for event in events:
                seen.add((life.state, event))
                life.handle(event)
            assert life.state is after.state, f"{events} in {world}"
            if after not in worlds:
                worlds.add(after)
                to_visit.append(after)
    assert len(worlds) > 1000
    return seen


def test_whatever_happens_in_whatever_order_is_in_the_table_and_leads_where_it_says() -> None:
    assert {state for state, _ in seen_events()} == set(State)


def test_nothing_is_in_the_table_that_cannot_happen() -> None:
    table = {(state, event) for state, row in TRANSITIONS.items() for event in row}

    assert table - seen_events() == set()


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_what_cannot_happen_raises_and_names_state_and_event(state: State, event: Event) -> None:
    life = Lifecycle()
    life.state = state

    if (state, event) in seen_events():
        life.handle(event)
    else:
        with pytest.raises(ProtocolError, match=f"{state.value!r}.*{event.value!r}"):
            life.handle(event)
        assert life.state is state
