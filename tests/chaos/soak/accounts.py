"""Holds what each call has promised against what the ledger says of it.

What Celery promises, and a soak can therefore ask for:

*Exactly one verdict.* A call that was sent ends as SUCCESS, FAILURE or REVOKED, in the result
backend, and each delivery of its message brings one verdict at most. A message that is delivered
again, because its worker was killed before it had acknowledged it, or because it was given back,
may bring another. So may

* a pool process that was killed when it had stored its verdict and its main process did not know:
  the main process then says that it was lost;
* a revocation that comes as the body ends: the slot and the main process each say what they saw.

*Late acks lose nothing.* The message is there until the call has ended. With Redis there is one
hole, in kombu: BRPOP takes the message from its list before the worker notes it as its own, and a
worker that is killed in between (or whose socket still counts as open) takes it along. Such a
message was acknowledged by nobody, which tells it from anything that a worker has lost; with
RabbitMQ nothing of the kind is admitted.

*Early acks lose what their worker takes along*, if it is killed after it has acknowledged: nothing
else.

*An acknowledged success is not run again*: no body of a call begins after a worker has said that
it succeeded and has acknowledged the message. Left out are calls whose message was sent twice (a
retry; a chain whose first call was run twice); with RabbitMQ, workers that were killed within a
second of acknowledging, since the broker may not have read that; and with Redis, messages that
were with a living worker for longer than the visibility timeout.

And what we promise beyond that: a body begins once for each delivery at most; a failure has a
cause, which for a lost child is the pid of a child that was killed; one process runs no more
bodies than its batch has; the result of a call is its own.
"""

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field

from soak.book import Book, Call, Event, Worker
from soak.kinds import KINDS, LOST

#: A broker that was told something has read it after this long, in seconds.
READ_SECONDS = 1.0
#: For how long after a kill things can happen because of it, in seconds.
AFTERMATH_SECONDS = 15.0
#: A worker that was ready before this has begun, in seconds.
BEGINNING_SECONDS = 10.0
#: ``isolated_max_redeliveries``, its default.
MAX_REDELIVERIES = 3


@dataclass(frozen=True)
class Violation:
    """A promise that was not kept."""

    rule: str
    call: str
    text: str


@dataclass
class Accounts:
    """All calls, counted."""

    #: Calls by what has become of them.
    ends: dict[str, int] = field(default_factory=lambda: collections.defaultdict(int))
    #: Things that happened, and may.
    admitted: dict[str, int] = field(default_factory=lambda: collections.defaultdict(int))
    violations: list[Violation] = field(default_factory=list)
    #: Calls that were lost, and may be.
    lost: list[Violation] = field(default_factory=list)

    def count(self, rule: str) -> int:
        """How often a promise was not kept."""
        return sum(violation.rule == rule for violation in self.violations)


#: The rules, by the names that the table has for them.
NO_VERDICT = "calls without a verdict"
MORE_VERDICTS = "calls with more than one verdict"
LOST_LATE = "calls with late acks lost"
RUN_AGAIN = "runs after an acknowledged success"
BEGUN_TWICE = "bodies begun twice for one delivery"
NO_CAUSE = "failures without a cause"
WRONG_END = "ends that cannot be"
WRONG_RESULT = "results of another call"
SHARED_PROCESS = "processes that ran more bodies than their batch has"
ENDED = "workers that ended by themselves"

RULES = (
    NO_VERDICT,
    MORE_VERDICTS,
    LOST_LATE,
    RUN_AGAIN,
    BEGUN_TWICE,
    NO_CAUSE,
    WRONG_END,
    WRONG_RESULT,
    SHARED_PROCESS,
    ENDED,
)


def settle(book: Book, *, visibility_timeout: float, plain: bool = False) -> Accounts:
    """Judge every call.

    Args:
        book: All that is known.
        visibility_timeout: Of Redis, in seconds.
        plain: The tasks were Celery's own, whose bodies share their process.
    """
    accounts = Accounts()
    for call in book.calls.values():
        if not call.kind or not call.was_sent:
            accounts.ends["never sent: the first of the chain has failed"] += 1
            continue
        _Judge(accounts, book, call, visibility_timeout, plain).judge()
    for worker in book.workers.values():
        if worker.exited_at is None:
            continue
        if worker.ready_at is None and worker.killed("forkserver"):
            accounts.admitted["worker not started: its forkserver was killed as it loaded"] += 1
        elif worker.killed("pool process") and _has_just_begun(worker):
            accounts.admitted["worker not started: a pool process was killed as it began"] += 1
        else:
            name = f"{worker.broker}-{worker.pool} {worker.name}"
            text = f"with {worker.exit_code}, {worker.kills}"
            accounts.violations.append(Violation(ENDED, name, text))
    return accounts


def _has_just_begun(worker: Worker) -> bool:
    """Whether it has ended as it began: Celery gives up then if a pool process has ended."""
    if worker.ready_at is None or worker.exited_at is None:
        return True
    return worker.exited_at - worker.ready_at < BEGINNING_SECONDS


class _Judge:
    """Judges one call."""

    def __init__(
        self, accounts: Accounts, book: Book, call: Call, visibility_timeout: float, plain: bool
    ) -> None:
        self._accounts = accounts
        self._book = book
        self._call = call
        self._visibility_timeout = visibility_timeout
        self._plain = plain

    def judge(self) -> None:
        if self._call.end is None:
            self._judge_lost()
        else:
            self._accounts.ends[self._call.end.state] += 1
            self._judge_end()
        self._judge_verdicts()
        self._judge_begins()
        self._judge_runs_after_success()

    def _blame(self, rule: str, text: str) -> None:
        call = self._call
        name = f"{call.broker} {call.kind}.{call.promise} {call.id}"
        self._accounts.violations.append(Violation(rule, name, text))

    def _worker(self, event: Event) -> Worker:
        return self._book.workers[event["worker"]]

    # ── lost ────────────────────────────────────────────────────────────────────────────────────

    def _judge_lost(self) -> None:
        call = self._call
        taken = [
            *call.all("acking"),
            *(event for event in call.all("rejecting") if not event["requeue"]),
        ]
        if call.promise == "early" and any(self._had_ended_after(event) for event in taken):
            self._admit_loss("lost with its worker, which had acknowledged early")
        elif call.broker == "redis" and not taken and self._could_vanish():
            self._admit_loss("lost by kombu between Redis and a killed worker")
        else:
            self._accounts.ends["lost"] += 1
            rule = NO_VERDICT if call.promise == "early" else LOST_LATE
            self._blame(rule, f"it has no end; {_history(call)}")

    def _admit_loss(self, why: str) -> None:
        call = self._call
        self._accounts.ends[why] += 1
        name = f"{call.broker} {call.kind}.{call.promise} {call.id}"
        self._accounts.lost.append(Violation(why, name, _history(call)))

    def _had_ended_after(self, event: Event) -> bool:
        ended_at = self._worker(event).ended_at
        return ended_at is not None and ended_at > event["t"]

    def _could_vanish(self) -> bool:
        """Whether a worker was killed that could have taken it along, at once or a little later."""
        sent_at = next(self._call.all("sent", "published"))["t"]
        ends = [one.ended_at for one in self._book.workers.values() if one.broker == "redis"]
        return any(at is not None and at > sent_at - READ_SECONDS for at in ends)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def _judge_end(self) -> None:
        call, end = self._call, self._call.end
        assert end is not None
        if end.state == "SUCCESS":
            if not end.is_right:
                self._blame(WRONG_RESULT, "its result is not its own")
            if "SUCCESS" not in KINDS[call.kind].ends:
                self._blame(WRONG_END, f"SUCCESS of a body that cannot succeed; {_history(call)}")
            elif call.kind == "revoked" and not self._may_outlive_revocation():
                self._blame(WRONG_END, f"SUCCESS of a revoked call; {_history(call)}")
        elif end.state == "REVOKED":
            if call.kind != "revoked":
                self._blame(WRONG_END, f"REVOKED, and nobody has asked for it; {_history(call)}")
        else:
            self._accounts.admitted[f"failed with {end.error}"] += 1
            if not self._has_cause():
                text = f"{end.error}: {end.text} (pid {end.pid}); {_history(call)}"
                self._blame(NO_CAUSE, text)
        if end.redeliveries is not None and end.redeliveries > MAX_REDELIVERIES:
            self._blame(WRONG_END, f"it was given back {end.redeliveries} times")

    def _may_outlive_revocation(self) -> bool:
        """Whether the worker that ran it did not hear of the revocation, or too late."""
        asked = next(self._call.all("revoking"), None)
        if asked is None:
            return True
        for verdict in self._call.all("verdict"):
            if verdict["state"] == "SUCCESS":
                ready_at = self._worker(verdict).ready_at
                if verdict["t"] < asked["t"] or ready_at is None or ready_at > asked["t"]:
                    return True
        return False

    def _has_cause(self) -> bool:
        call, end = self._call, self._call.end
        assert end is not None
        if end.error == LOST:
            if end.pid is None and "is not tried again" in end.text:
                # Each loss was noted by a slot, also where the main process did not live to give
                # the message back. This delivery makes one more.
                return len(list(call.all("slot"))) > MAX_REDELIVERIES
            begun = {event["pid"] for event in call.all("begin")}
            if LOST in KINDS[call.kind].ends and end.pid in begun:
                return True
            # One that was killed as it was born did not lead a group yet, and was taken for less.
            roles = ("child", "grandchild")
            workers = [self._book.workers[name] for name in _workers(call)]
            if any(end.pid in worker.killed(role) for worker in workers for role in roles):
                return True
            return call.kind == "greedy" and self._was_swept()
        if end.error in KINDS[call.kind].ends:
            return True
        if end.error == "WorkerLostError":
            return bool(self._lost_slots())
        return False

    def _was_swept(self) -> bool:
        """Whether nobody could tell any more that the kernel has killed the child for its memory.

        A forkserver that starts removes the empty control groups of those that are dead. Where a
        slot is stopped meanwhile, it finds its child killed and the group gone.
        """
        begun = list(self._call.all("begin"))
        swept = any(
            role == "forkserver" and -AFTERMATH_SECONDS < at - event["t"] < AFTERMATH_SECONDS
            for event in begun
            for at, role, _ in self._worker(event).kills
        )
        if swept:
            self._accounts.admitted["memory limit taken for a loss: its group was swept"] += 1
        return swept

    def _lost_slots(self) -> list[Event]:
        """Where the call was in a pool process that was killed, or may have been about to be."""
        call = self._call
        lost = [
            event
            for event in call.all("slot")
            if event["pid"] in self._worker(event).killed("pool process")
        ]
        in_slots = {event["worker"] for event in call.all("slot")}
        return lost + [
            event
            for event in call.all("received")
            if event["worker"] not in in_slots
            and any(
                role == "pool process" and -1.0 < at - event["t"] < AFTERMATH_SECONDS
                for at, role, _ in self._worker(event).kills
            )
        ]

    # ── verdicts ────────────────────────────────────────────────────────────────────────────────

    def _judge_verdicts(self) -> None:
        call = self._call
        for name in _workers(call):
            verdicts = [event for event in call.all("verdict") if event["worker"] == name]
            received = call.count("received", worker=name)
            states = [event["state"] for event in verdicts]
            killed = self._book.workers[name].killed("pool process")
            if call.kind == "revoked" and len(states) - states.count("REVOKED") <= received:
                # Nobody is told that it was received where it is discarded at once.
                self._judge_revoked(states)
            elif len(verdicts) <= received:
                continue
            elif any(event["pid"] in killed for event in verdicts):
                self._accounts.admitted["verdict of a pool process, then of its loss"] += 1
            else:
                self._blame(MORE_VERDICTS, _history(call))
        end, later = call.end, call.later_end
        if end is not None and later is not None and call.kind != "revoked":
            # More verdicts than deliveries have been judged above; a slot that was killed when it
            # had stored its own may not have come to say so.
            if max(call.count("received"), call.count("verdict")) > 1 or self._lost_slots():
                self._accounts.admitted["another end after another delivery or verdict"] += 1
            else:
                self._blame(MORE_VERDICTS, f"{end.state}, later {later.state}; {_history(call)}")

    def _judge_revoked(self, states: list[str]) -> None:
        """Judge the verdicts of one worker on a call that was to be revoked."""
        if "REVOKED" in states and "SUCCESS" in states[states.index("REVOKED") :]:
            self._blame(WRONG_END, f"it ran on when it was revoked; {_history(self._call)}")
        elif len(states) > 1:
            self._accounts.admitted["verdict of a slot, and of a revocation"] += 1

    # ── bodies ──────────────────────────────────────────────────────────────────────────────────

    def _judge_begins(self) -> None:
        call = self._call
        for name in _workers(call):
            begun, received = call.count("begin", worker=name), call.count("received", worker=name)
            if begun > received:
                self._blame(BEGUN_TWICE, f"{begun} times for {received}; {_history(call)}")
        size = KINDS[call.kind].options.get("batch_size", 1)
        for event in call.all("begin"):
            if event["nth"] > size and not self._plain:
                self._blame(SHARED_PROCESS, f"pid {event['pid']} has begun {event['nth']}")

    def _judge_runs_after_success(self) -> None:
        call = self._call
        if sum(1 for _ in call.all("sent", "published")) > 1:
            return
        for acked in call.all("acked"):
            said = [
                event
                for event in call.all("verdict")
                if event["worker"] == acked["worker"] and event["t"] < acked["t"]
            ]
            again = [event for event in call.all("begin") if event["t"] > acked["t"]]
            if not again or not said or said[-1]["state"] != "SUCCESS":
                continue
            if self._may_not_have_arrived(acked):
                self._accounts.admitted["run again: killed as it acknowledged"] += 1
            elif self._was_too_long(acked):
                self._accounts.admitted["run again: after the visibility timeout"] += 1
            else:
                self._blame(RUN_AGAIN, _history(call))

    def _may_not_have_arrived(self, acked: Event) -> bool:
        killed_at = self._worker(acked).killed_at
        return (
            self._call.broker == "amqp"
            and killed_at is not None
            and killed_at - acked["t"] < READ_SECONDS
        )

    def _was_too_long(self, acked: Event) -> bool:
        """Whether any worker had the message for so long that Redis gave it to another."""
        received = [event["t"] for event in self._call.all("received")]
        return self._call.broker == "redis" and any(
            acked["t"] - at > self._visibility_timeout for at in received
        )


def _workers(call: Call) -> Iterator[str]:
    """Each worker that has had to do with a call, once."""
    yield from dict.fromkeys(event["worker"] for event in call.events if "worker" in event)


def _history(call: Call) -> str:
    """What the ledger says of a call, for whoever looks for the reason."""
    began = call.events[0]["t"] if call.events else 0.0
    parts = []
    for event in call.events:
        shown = {
            key: value
            for key, value in event.items()
            if key not in ("t", "event", "id", "kind", "promise", "broker", "token", "parent")
        }
        if "worker" in shown:
            shown["worker"] = str(shown["worker"])[5:9]
        values = " ".join(f"{key}={value}" for key, value in shown.items())
        parts.append(f"+{event['t'] - began:.2f} {event['event']} {values}".strip())
    return "; ".join(parts)
