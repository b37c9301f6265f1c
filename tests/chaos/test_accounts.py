"""Each promise that a soak counts can be seen broken, and what may happen is told from it."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from soak import accounts
from soak.book import Book, End

A, B = "soak-a@localhost", "soak-b@localhost"


class Story:
    """Events in order, one every tenth of a second."""

    def __init__(
        self, *, broker: str = "redis", kind: str = "quick", promise: str = "late"
    ) -> None:
        self.book = Book()
        self._clock = itertools.count(1)
        self._id = "an-id"
        for worker in (A, B):
            self._feed("started", worker=worker, broker=broker, pool="prefork")
            self._feed("ready", worker=worker, folder="")
        values = {"kind": kind, "promise": promise, "broker": broker, "token": "t", "parent": None}
        self._feed("sent", id=self._id, **values)

    def _feed(self, event: str, **values: Any) -> None:
        self.book.feed({"t": next(self._clock) / 10, "event": event, **values})

    def call(self, event: str, worker: str = A, **values: Any) -> "Story":
        """Something happens to the call."""
        self._feed(event, id=self._id, worker=worker, **values)
        return self

    def run(self, worker: str = A, *, pid: int = 100, nth: int = 1) -> "Story":
        """The message comes, and a body begins."""
        self.call("received", worker).call("slot", worker, pid=50)
        return self.call("begin", worker, pid=pid, nth=nth)

    def verdict(self, state: str = "SUCCESS", worker: str = A, *, pid: int = 50) -> "Story":
        return self.call("verdict", worker, state=state, pid=pid)

    def ack(self, worker: str = A) -> "Story":
        return self.call("acking", worker).call("acked", worker)

    def kill(self, role: str, worker: str = A, *, pid: int = 1) -> "Story":
        self._feed("killed", worker=worker, role=role, pid=pid)
        return self

    def later(self, seconds: float) -> "Story":
        self._clock = itertools.count(next(self._clock) + int(seconds * 10))
        return self

    def end(self, state: str = "SUCCESS", **values: Any) -> "Story":
        self.book.calls[self._id].end = End(state, **values)
        return self

    def settle(self) -> accounts.Accounts:
        return accounts.settle(self.book, visibility_timeout=10.0)


def broken(story: Story) -> Mapping[str, int]:
    """The rules that were broken, with how often."""
    settled = story.settle()
    return {rule: settled.count(rule) for rule in accounts.RULES if settled.count(rule)}


def test_a_call_that_nobody_disturbs_breaks_nothing() -> None:
    story = Story().run().verdict().ack().end()

    assert broken(story) == {}
    assert story.settle().ends == {"SUCCESS": 1}


# ── verdicts ────────────────────────────────────────────────────────────────────────────────────


def test_a_call_without_an_end_has_no_verdict() -> None:
    assert broken(Story(promise="early").run().ack()) == {accounts.NO_VERDICT: 1}


def test_early_acks_lose_what_their_worker_takes_along() -> None:
    story = Story(promise="early").run().ack().kill("main process")

    assert broken(story) == {}
    assert list(story.settle().ends.values()) == [1]
    # Not what another one takes along, nor what is acknowledged after that.
    other = Story(promise="early").run().ack().kill("main process", B)
    assert broken(other) == {accounts.NO_VERDICT: 1}


def test_late_acks_lose_nothing() -> None:
    assert broken(Story().run().ack().kill("main process")) == {accounts.LOST_LATE: 1}


@pytest.mark.parametrize(("broker", "lost"), [("redis", 0), ("amqp", 1)])
def test_only_kombu_s_redis_may_lose_what_nobody_has_acknowledged(broker: str, lost: int) -> None:
    story = Story(broker=broker).run().kill("main process")

    assert story.settle().count(accounts.LOST_LATE) == lost
    # And only if a worker was killed.
    assert broken(Story(broker=broker).run()) == {accounts.LOST_LATE: 1}


def test_one_delivery_brings_one_verdict() -> None:
    story = Story().run().verdict("FAILURE").verdict("SUCCESS").ack().end()

    assert broken(story) == {accounts.MORE_VERDICTS: 1}


def test_another_delivery_may_bring_another_verdict() -> None:
    assert broken(Story().run().verdict().kill("main process").run(B).verdict(worker=B).end()) == {}


def test_a_pool_process_that_is_killed_late_brings_a_second_verdict() -> None:
    story = Story().run().verdict().kill("pool process", pid=50).verdict("FAILURE", pid=1).ack()
    story.end().book.calls["an-id"].later_end = End("FAILURE", error="WorkerLostError")
    assert broken(story) == {}

    # It may have stored it and not come to say so.
    story = Story().run().kill("pool process", pid=50).verdict("FAILURE", pid=1).ack()
    story.end().book.calls["an-id"].later_end = End("FAILURE", error="WorkerLostError")
    assert broken(story) == {}


def test_an_end_that_changes_is_two() -> None:
    story = Story().run().verdict().ack().end()
    story.book.calls["an-id"].later_end = End("FAILURE", error="ValueError")

    assert broken(story) == {accounts.MORE_VERDICTS: 1}


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────


def test_an_acknowledged_success_is_not_run_again() -> None:
    story = Story().run().verdict().ack().run(B).verdict(worker=B).ack(B).end()

    assert broken(story) == {accounts.RUN_AGAIN: 1}


def test_a_success_that_was_not_acknowledged_may_be_run_again() -> None:
    assert broken(Story().run().verdict().kill("main process").run(B).end()) == {}


@pytest.mark.parametrize(("broker", "count"), [("amqp", 0), ("redis", 1)])
def test_rabbitmq_may_not_have_read_the_last_words_of_a_worker(broker: str, count: int) -> None:
    story = Story(broker=broker).run().verdict().ack().kill("main process").run(B).end()

    assert story.settle().count(accounts.RUN_AGAIN) == count


def test_redis_gives_to_another_what_takes_too_long() -> None:
    story = Story().run().later(11).verdict().ack().run(B).end()

    assert broken(story) == {}


def test_a_body_begins_once_for_each_delivery() -> None:
    story = Story().run().call("begin", pid=101, nth=1).verdict().ack().end()

    assert broken(story) == {accounts.BEGUN_TWICE: 1}


def test_a_process_runs_no_more_bodies_than_its_batch_has() -> None:
    assert broken(Story().run(nth=2).verdict().ack().end()) == {accounts.SHARED_PROCESS: 1}
    assert broken(Story(kind="batch").run(nth=5).verdict().ack().end()) == {}


def test_a_result_is_the_call_s_own() -> None:
    story = Story().run().verdict().ack().end(is_right=False)

    assert broken(story) == {accounts.WRONG_RESULT: 1}


# ── ends ────────────────────────────────────────────────────────────────────────────────────────


def failed(story: Story, error: str, **values: Any) -> Mapping[str, int]:
    return broken(story.verdict("FAILURE").ack().end("FAILURE", error=error, **values))


def test_a_lost_child_was_killed() -> None:
    assert failed(Story().run(), "ChildLostError", pid=100) == {accounts.NO_CAUSE: 1}
    assert failed(Story().run().kill("child", pid=100), "ChildLostError", pid=100) == {}
    # That very one.
    story = Story().run().kill("child", pid=101)
    assert failed(story, "ChildLostError", pid=100) == {accounts.NO_CAUSE: 1}


def test_a_memory_limit_may_look_like_a_loss_where_a_forkserver_was_killed() -> None:
    story = Story(kind="greedy").run(pid=100)
    assert failed(story, "ChildLostError", pid=100) == {accounts.NO_CAUSE: 1}
    story = Story(kind="greedy").kill("forkserver").run(pid=100)
    assert failed(story, "ChildLostError", pid=100) == {}


def test_a_body_that_ends_its_child_is_a_cause() -> None:
    assert failed(Story(kind="leave").run(pid=100), "ChildLostError", pid=100) == {}
    story = Story(kind="leave").run(pid=100)
    assert failed(story, "ChildLostError", pid=101) == {accounts.NO_CAUSE: 1}


def test_a_lost_pool_process_was_killed() -> None:
    assert failed(Story().run(), "WorkerLostError") == {accounts.NO_CAUSE: 1}
    assert failed(Story().run().kill("pool process", pid=50), "WorkerLostError") == {}


def test_a_limit_is_exceeded_by_bodies_that_do_so() -> None:
    assert failed(Story(kind="hard").run(), "TimeLimitExceeded") == {}
    assert failed(Story().run(), "TimeLimitExceeded") == {accounts.NO_CAUSE: 1}
    assert failed(Story().run(), "ForkserverError") == {accounts.NO_CAUSE: 1}


def test_a_body_beyond_its_limit_does_not_succeed() -> None:
    assert broken(Story(kind="hard").run().verdict().ack().end()) == {accounts.WRONG_END: 1}


def test_nothing_is_revoked_that_was_not_asked_for() -> None:
    story = Story().run().verdict("REVOKED").ack().end("REVOKED")

    assert broken(story) == {accounts.WRONG_END: 1}


def test_a_revoked_call_succeeds_only_where_nobody_heard_of_it() -> None:
    story = Story(kind="revoked").run().call("revoking").verdict().ack().end()

    assert broken(story) == {accounts.WRONG_END: 1}
    # Too late.
    assert broken(Story(kind="revoked").run().verdict().call("revoking").ack().end()) == {}


def test_a_revoked_body_does_not_run_on() -> None:
    def revoked() -> Story:
        return Story(kind="revoked").run().call("revoking").verdict("REVOKED").ack()

    assert broken(revoked().verdict().end()) == {accounts.WRONG_END: 2}
    assert broken(revoked().end("REVOKED")) == {}
    # The slot has seen another end in the meantime.
    assert broken(revoked().kill("child", pid=100).verdict("FAILURE").end("REVOKED")) == {}
    # One that is discarded is not received.
    assert broken(Story(kind="revoked").call("revoking").verdict("REVOKED").end("REVOKED")) == {}


def test_a_message_is_given_back_so_often_and_no_more() -> None:
    story = Story(kind="leave", promise="returned").run()

    assert failed(story, "ChildLostError", pid=100, redeliveries=4) == {accounts.WRONG_END: 1}


def test_a_worker_ends_by_itself_only_if_its_first_forkserver_was_killed() -> None:
    story = Story()
    story._feed("started", worker="soak-c", broker="redis", pool="threads")
    story.kill("forkserver", "soak-c")
    story._feed("exited", worker="soak-c", code=1)
    story.run().verdict().ack().end()
    assert broken(story) == {}

    story._feed("exited", worker=A, code=1)

    assert broken(story) == {accounts.ENDED: 1}
