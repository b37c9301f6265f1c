"""Admission, against a list of who runs and a list of who waits."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harness.machines import MACHINE
from isolated_tasks.process.admission import Admission, Answer

SIZES = st.none() | st.integers(0, 12)


class Budget(RuleBasedStateMachine):
    """Children ask, are adopted, fail to start, go, or lose patience, in any order."""

    @initialize(budget=st.none() | st.just(10))
    def begin(self, budget: int | None) -> None:
        self.budget = budget
        self.admission = Admission(budget)
        self.names = iter(range(1_000_000))
        self.running: dict[int, int] = {}
        self.waiting: list[tuple[int, int]] = []

    @property
    def taken(self) -> int:
        return sum(self.running.values())

    @rule(size=SIZES)
    def asks(self, size: int | None) -> None:
        who = next(self.names)
        answer = self.admission.ask(who, size)
        if self.budget is None or not size:
            assert answer is Answer.START
        elif size > self.budget:
            assert answer is Answer.NEVER
        elif self.waiting or self.taken + size > self.budget:
            assert answer is Answer.WAIT
            self.waiting.append((who, size))
        else:
            assert answer is Answer.START
            self.running[who] = size

    @rule(size=SIZES)
    def is_adopted(self, size: int | None) -> None:
        who = next(self.names)
        self.admission.take(who, size)
        self.running[who] = size or 0

    @rule(which=st.integers(0), fail=st.integers(0, 3))
    def goes(self, which: int, fail: int) -> None:
        """One that runs, one that waits, or one that is not known; those that follow may fail."""
        known = [*self.running, *(who for who, _ in self.waiting), -1]
        self._give_back(known[which % len(known)], fail)

    def _give_back(self, who: int, fail: int) -> None:
        self.admission.give_back(who)
        self.running.pop(who, None)
        self.waiting = [one for one in self.waiting if one[0] != who]
        while (admitted := self.admission.next()) is not None:
            # Nobody is overtaken, and it fits.
            first, size = self.waiting.pop(0)
            assert admitted == first
            assert self.budget is not None
            assert self.taken + size <= self.budget
            self.running[first] = size
            if fail:
                # It could not be forked: while others are started this one gives back.
                fail -= 1
                self._give_back(first, fail)

    @invariant()
    def the_sum_is_that_of_those_who_run(self) -> None:
        if self.budget is not None:
            assert self.admission.taken_bytes == self.taken

    @invariant()
    def nobody_waits_for_whom_there_is_room(self) -> None:
        if self.waiting:
            assert self.budget is not None
            assert self.taken + self.waiting[0][1] > self.budget

    @precondition(lambda self: not self.running)
    @invariant()
    def nobody_waits_for_nobody(self) -> None:
        assert not self.waiting


TestBudget = Budget.TestCase
TestBudget.settings = settings(MACHINE, max_examples=100)
