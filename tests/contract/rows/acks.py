"""Who acknowledges a message, when, and whether the broker delivers it again.

All on Redis and on RabbitMQ: what redelivery is, is theirs.
"""

from typing import Any, NoReturn

from celery import Task, chain, group
from celery.exceptions import Ignore, Reject

from contract.recorder import note
from contract.table import Row, Seen, task

BOTH = ("redis", "amqp")


def redelivered(self: Task) -> bool:
    """Whether the message has been delivered before; noted."""
    was = bool(self.request.delivery_info["redelivered"])
    note("redelivered", was)
    return was


@task(bind=True)
def reject_early(self: Task, *, requeue: bool) -> NoReturn:
    redelivered(self)
    raise Reject("acknowledged before it began", requeue=requeue)


@task(bind=True, acks_late=True)
def reject_late(self: Task, *, requeue: bool) -> str:
    if redelivered(self):
        return "the second time"
    raise Reject("not now", requeue=requeue)


@task(bind=True, acks_late=True)
def reject_because_of_another(self: Task) -> str:
    if redelivered(self):
        return "the second time"
    try:
        raise LookupError("the cause")
    except LookupError as exc:
        raise Reject(exc, requeue=True) from exc


@task(bind=True, acks_late=True)
def launch_and_reject(self: Task) -> str:
    again = redelivered(self)
    succeed_late.on(self.app).delay(again)
    if again:
        return "the second time"
    raise Reject("after launching", requeue=True)


@task(bind=True, acks_late=True)
def ignore_late(self: Task) -> NoReturn:
    redelivered(self)
    raise Ignore("for a reason")


@task(bind=True, acks_late=True)
def succeed_late(self: Task, value: Any = None) -> str:
    redelivered(self)
    return "done"


@task(bind=True, acks_late=True)
def fail_late(self: Task) -> NoReturn:
    redelivered(self)
    raise LookupError("late")


@task(bind=True, acks_late=True, acks_on_failure_or_timeout=False)
def fail_without_acknowledging(self: Task) -> NoReturn:
    redelivered(self)
    raise LookupError("not acknowledged")


@task(bind=True, acks_late=True, acks_on_failure_or_timeout=False)
def succeed_without_acknowledging_failures(self: Task) -> str:
    redelivered(self)
    return "done"


@task(bind=True, acks_late=True, reject_on_worker_lost=True)
def fail_with_requeue_when_lost(self: Task) -> NoReturn:
    redelivered(self)
    raise LookupError("not lost")


@task(bind=True, acks_late=True, max_retries=2)
def retry_late(self: Task) -> int:
    redelivered(self)
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True, acks_late=True, max_retries=2)
def retry_then_reject(self: Task) -> str:
    if redelivered(self):
        return f"retried {self.request.retries} times"
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    raise Reject("in the retry", requeue=True)


@task(bind=True, acks_late=True, autoretry_for=(LookupError,), max_retries=1, default_retry_delay=0)
def autoretry_late(self: Task) -> NoReturn:
    redelivered(self)
    raise LookupError("twice")


@task(bind=True, acks_late=True)
def reject_with_a_result(self: Task) -> str:
    """Reject after a state of its own has been stored."""
    if redelivered(self):
        return "the second time"
    self.update_state(state="REJECTING")
    raise Reject(requeue=True)


@task(bind=True, acks_late=True, ignore_result=True)
def reject_without_result(self: Task) -> None:
    if not redelivered(self):
        raise Reject("not now", requeue=True)


class RejectsBeforeStart:
    """As Celery's documentation has it, from before_start."""

    def before_start(self, *args: Any) -> None:
        super().before_start(*args)  # type: ignore[misc]
        if not redelivered(self):
            raise Reject("in before_start", requeue=True)


@task(bind=True, acks_late=True, mixins=(RejectsBeforeStart,))
def be_rejected_before_start(self: Task) -> str:
    return "the second time"


@task()
def errback(request: Any, exc: BaseException, traceback: Any) -> None:
    note("errback")


FIRST_AND_SECOND = ["'redelivered'", "'redelivered'", "False", "True"]
ONCE = ["'redelivered'", "False"]


def nothing_left(seen: Seen) -> bool:
    return all(task["left"] == 0 for task in seen["tasks"].values())


def row(name: str, send: Any, **expects: Any) -> Row:
    return Row(
        f"acks: {name}",
        send,
        expects={"check": nothing_left, **expects},
        brokers=BOTH,
    )


ROWS = [
    row(
        "late, of a task that succeeds",
        lambda app: succeed_late.on(app).delay(),
        state="SUCCESS",
        runs=1,
        notes=ONCE,
    ),
    row(
        "late, of a task that fails",
        lambda app: fail_late.on(app).delay(),
        state="FAILURE",
        runs=1,
        notes=ONCE,
    ),
    row(
        "late, of a task that is ignored",
        lambda app: ignore_late.on(app).delay(),
        runs=1,
        notes=ONCE,
        log="ignored",
    ),
    row(
        "late, of a task that retries",
        lambda app: retry_late.on(app).delay(),
        state="SUCCESS",
        result=1,
        runs=2,
        notes=["'redelivered'", "'redelivered'", "False", "False"],
    ),
    row(
        "late, of a task that is retried by itself",
        lambda app: autoretry_late.on(app).delay(),
        state="FAILURE",
        runs=2,
    ),
    row(
        "none of a failure, where failures are not acknowledged",
        lambda app: fail_without_acknowledging.on(app).delay(),
        state="FAILURE",
        runs=1,
        notes=ONCE,
    ),
    row(
        "of a success, where failures are not acknowledged",
        lambda app: succeed_without_acknowledging_failures.on(app).delay(),
        state="SUCCESS",
        runs=1,
        notes=ONCE,
    ),
    row(
        "of an exception, where the loss of a worker is not acknowledged",
        lambda app: fail_with_requeue_when_lost.on(app).delay(),
        state="FAILURE",
        runs=1,
        notes=ONCE,
    ),
    row(
        "Reject comes too late where tasks are acknowledged early",
        lambda app: reject_early.on(app).delay(requeue=True),
        runs=1,
        notes=ONCE,
    ),
    row(
        "Reject without requeue comes too late where tasks are acknowledged early",
        lambda app: reject_early.on(app).delay(requeue=False),
        runs=1,
        notes=ONCE,
    ),
    row(
        "Reject with requeue",
        lambda app: reject_late.on(app).delay(requeue=True),
        state="SUCCESS",
        result="the second time",
        runs=2,
        notes=FIRST_AND_SECOND,
    ),
    row(
        "Reject without requeue",
        lambda app: reject_late.on(app).delay(requeue=False),
        runs=1,
        notes=ONCE,
    ),
    row(
        "Reject because of another exception",
        lambda app: reject_because_of_another.on(app).delay(),
        state="SUCCESS",
        runs=2,
        log="the cause",
    ),
    row(
        "Reject after a task was launched",
        lambda app: launch_and_reject.on(app).delay(),
        state="SUCCESS",
        runs=2,
        tasks=3,
    ),
    row(
        "Reject after a retry",
        lambda app: retry_then_reject.on(app).delay(),
        state="SUCCESS",
        result="retried 1 times",
        runs=3,
    ),
    row(
        "Reject after a state of its own",
        lambda app: reject_with_a_result.on(app).delay(),
        state="SUCCESS",
        runs=2,
        notes=FIRST_AND_SECOND,
    ),
    row(
        "Reject of a task that ignores its result",
        lambda app: reject_without_result.on(app).delay(),
        state=None,
        runs=2,
        notes=FIRST_AND_SECOND,
    ),
    row(
        "Reject in before_start",
        lambda app: be_rejected_before_start.on(app).delay(),
        state="SUCCESS",
        runs=2,
        notes=FIRST_AND_SECOND,
    ),
    row(
        "Reject in a chain",
        lambda app: chain(
            reject_late.on(app).si(requeue=True), succeed_late.on(app).s(), app=app
        ).apply_async(),
        tasks=2,
        states=["SUCCESS", "SUCCESS"],
    ),
    row(
        "Reject in a group",
        lambda app: group(
            reject_late.on(app).si(requeue=True), succeed_late.on(app).s(2)
        ).apply_async(),
        tasks=2,
        states=["SUCCESS", "SUCCESS"],
    ),
    row(
        "an errback of a failure that is not acknowledged",
        lambda app: fail_without_acknowledging.on(app).apply_async(link_error=errback.on(app).s()),
        state="FAILURE",
        notes=["'errback'", "'redelivered'", "False"],
    ),
]
