"""What is due for one call, under a clock that goes as hypothesis wants it to."""

import itertools
import signal
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harness.machines import MACHINE
from isolated_tasks.process import enforcer, memory, stopping
from isolated_tasks.process.enforcer import KILLED_SECONDS, Enforcer
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.stopping import Cause, Rung

MIB = 1 << 20
PID = 77
SECONDS = st.floats(0.01, 100)


class Body(RuleBasedStateMachine):
    """A body with any limits, of which anything happens: it is told, then ended, and only once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.held = 0
        #: All that was sent, and when.
        self.sent: list[tuple[float, Rung]] = []
        self.begun_at: float | None = None
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(monotonic=lambda: self.now)
        self.patch.setattr(enforcer, "time", clock)
        self.patch.setattr(stopping, "time", clock)
        self.patch.setattr(memory, "tree_bytes", self._look)
        self.patch.setattr(memory, "tree_rss_bytes", lambda pid: self.held)

    def _look(self, pid: int, *, above: int) -> int:
        return self.held

    @initialize(
        soft=st.none() | SECONDS,
        hard=st.none() | SECONDS,
        limit=st.none() | st.integers(1, 1000),
        grace=SECONDS,
        begins=st.booleans(),
    )
    def begin(
        self,
        soft: float | None,
        hard: float | None,
        limit: int | None,
        grace: float,
        *,
        begins: bool,
    ) -> None:
        if soft is not None and hard is not None:
            soft = min(soft, hard)
        self.soft, self.hard, self.grace = soft, hard, grace
        self.limit = None if limit is None else limit * MIB
        self.enforcer = Enforcer(
            ProcessOptions("test", memory_limit_bytes=self.limit, term_grace=grace),
            CallOptions("test", "id", soft_time_limit=soft, time_limit=hard),
        )
        self.enforcer.accepted()
        if begins:
            self.begins()

    @precondition(lambda self: self.begun_at is None)
    @rule()
    def begins(self) -> None:
        self.begun_at = self.now
        self.enforcer.begun()

    @rule(number=st.sampled_from(["SIGTERM", "SIGKILL", "SIGINT", "SIGUSR1", "SIGQUIT", "SIGHUP"]))
    def is_to_be_stopped(self, number: str) -> None:
        self.enforcer.stop(stopping.on_request(signal.Signals[number], self.grace, "revoked"))

    @rule(held=st.integers(0, 2000))
    def holds_memory(self, held: int) -> None:
        self.held = held * MIB

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def time_passes_until_something_may_be_due(self) -> None:
        self.now += self.enforcer.wait() or 0

    @rule()
    def what_is_due_is_done(self) -> None:
        self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        # As the supervisor does.
        while (rung := self.enforcer.due(PID)) is not None:
            self.sent.append((self.now, rung))
            assert len(self.sent) <= 4
        # And then it waits. If there were nothing to wait for it would spin.
        assert self.enforcer.wait() != 0 or self.enforcer.is_over

    @invariant()
    def what_was_sent_makes_sense(self) -> None:
        numbers = [rung.signal for _, rung in self.sent]
        for (before, rung), (after, _) in itertools.pairwise(self.sent):
            assert after >= before + rung.patience
        if self.enforcer.soft_signal_sent:
            # It comes first, in time, and the body alone hears it.
            assert self.soft is not None
            assert self.begun_at is not None
            at, rung = self.sent[0]
            assert rung.signal == signal.SIGUSR1
            assert not rung.to_group
            assert at >= self.begun_at + self.soft
            numbers.pop(0)
        ladder = self.enforcer.ladder
        if ladder is None:
            assert not numbers
        elif ladder.cause is Cause.TIME_LIMIT:
            assert self.begun_at is not None
            assert self.now >= self.begun_at + (self.hard or 0)
        elif ladder.cause is Cause.MEMORY_LIMIT:
            assert (self.enforcer.peak_bytes or 0) > (self.limit or 0)
        # After it, nothing.
        assert signal.SIGKILL not in numbers[:-1]

    def teardown(self) -> None:
        try:
            self.held = 0
            self._see_it_end()
        finally:
            self.patch.undo()

    def _see_it_end(self) -> None:
        """It goes on for ever, unless something has ended it or is to end it."""
        is_to_end = self.enforcer.ladder is not None or (
            self.hard is not None and self.begun_at is not None
        )
        latest = self.now + (self.hard or 0) + 2 * self.grace + KILLED_SECONDS + 1
        self._do_what_is_due()
        while (wait := self.enforcer.wait()) and self.now + wait < latest:
            self.now += wait
            self._do_what_is_due()
        assert self.enforcer.is_over == is_to_end
        if is_to_end:
            assert self.sent[-1][1].signal == signal.SIGKILL


TestBody = Body.TestCase
TestBody.settings = settings(MACHINE, max_examples=150)
