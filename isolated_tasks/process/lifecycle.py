"""The life of one child, as its requester sees it: every state, event and transition.

This table is the one place to argue about races. An event that is not in it cannot happen in that
state; `Lifecycle.handle` raises then and names both. The events come from four sources that are
not ordered among each other: the *call* socket (accepted, outcome), the *control* socket (started,
refused, exited), the forkserver's own end (orphaned) and the requester itself (the rest).

Two orders are certain. The child writes to the call socket before it exits, and the forkserver
reports an exit after it happened: so once *exited* is known, what can be read from the call socket
is all that there will ever be. And *started* is sent after the fork: the child may well accept its
call, or be done with it, before *started* arrives, so *started* changes no state.
"""

from __future__ import annotations

import enum

from isolated_tasks.errors import ProtocolError

__all__ = ["TRANSITIONS", "Event", "Lifecycle", "State"]


class State(enum.Enum):
    """Where a child is in its life."""

    #: Asked for, or living without a call; nothing of a body has run since the last outcome.
    READY = "ready"
    #: A call has been sent and not been accepted: its body has not begun.
    CALLED = "called"
    #: The body runs.
    RUNNING = "running"
    #: The last outcome is here, or the child was told to go; it has not been reaped.
    EXITING = "exiting"
    #: Reaped. Nothing follows.
    EXITED = "exited"


class Event(enum.Enum):
    """What can happen to a child."""

    #: The forkserver has started the process and told its pid.
    STARTED = "started"
    #: The requester has begun to send a call.
    CALL = "call"
    #: The child has read the whole call and is about to begin the body.
    ACCEPTED = "accepted"
    #: The child has begun the body.
    BEGUN = "begun"
    #: An outcome, whole; the child waits for another call.
    OUTCOME = "outcome"
    #: An outcome, whole, and the child's last: it exits now.
    LAST_OUTCOME = "last outcome"
    #: The requester wants no more of this child.
    DISMISS = "dismiss"
    #: The process has ended: the forkserver reaped it, refused to start it, or is dead itself
    #: and the process with it.
    EXITED = "exited"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.READY: {
        Event.STARTED: State.READY,
        Event.CALL: State.CALLED,
        Event.DISMISS: State.EXITING,
        Event.EXITED: State.EXITED,
    },
    State.CALLED: {
        Event.STARTED: State.CALLED,
        Event.ACCEPTED: State.RUNNING,
        Event.DISMISS: State.EXITING,
        Event.EXITED: State.EXITED,
    },
    State.RUNNING: {
        Event.STARTED: State.RUNNING,
        Event.BEGUN: State.RUNNING,
        Event.OUTCOME: State.READY,
        Event.LAST_OUTCOME: State.EXITING,
        Event.DISMISS: State.EXITING,
        Event.EXITED: State.EXITED,
    },
    State.EXITING: {
        Event.STARTED: State.EXITING,
        # The call socket may hold these when the requester dismisses the child.
        Event.ACCEPTED: State.EXITING,
        Event.BEGUN: State.EXITING,
        Event.OUTCOME: State.EXITING,
        Event.LAST_OUTCOME: State.EXITING,
        Event.DISMISS: State.EXITING,
        Event.EXITED: State.EXITED,
    },
    State.EXITED: {
        Event.DISMISS: State.EXITED,
    },
}


class Lifecycle:
    """The state of one child."""

    def __init__(self) -> None:
        self.state = State.READY

    def handle(self, event: Event) -> None:
        """Move on.

        Raises:
            ProtocolError: The event cannot happen in this state.
        """
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise ProtocolError(
                f"a child that is {self.state.value!r} cannot see the event {event.value!r}"
            ) from None
