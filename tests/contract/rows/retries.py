"""Retries: by ``self.retry()`` in all its forms, by hand, and by themselves."""

from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

from celery import Celery, Task, chain, chord, current_task, group
from celery.exceptions import Ignore, Reject, Retry

from contract.observation import all_notes
from contract.recorder import Hooks, note
from contract.table import Row, Seen, task


@task(bind=True, max_retries=3)
def retry_with(self: Task, until: int, **options: Any) -> int:
    """Retry with these options until there were so many."""
    request = self.request
    note(f"{request.retries}: {request.headers}, {request.timelimit}, {request.shadow}")
    note(f"{request.retries}: {request.delivery_info}, expires {request.expires}")
    if self.request.retries < until:
        raise self.retry(**{"countdown": 0, **options})
    return int(self.request.retries)


@task(bind=True, max_retries=3)
def retry_at(self: Task) -> int:
    if self.request.retries < 1:
        raise self.retry(eta=datetime.now(timezone.utc) + timedelta(milliseconds=10))
    return int(self.request.retries)


@task(bind=True, max_retries=3)
def retry_elsewhere(self: Task) -> str:
    if self.request.retries < 1:
        raise self.retry(countdown=0, queue=f"{self.app.conf.task_default_queue}-other")
    return str(self.request.delivery_info["routing_key"])


@task(bind=True, max_retries=1)
def retry_for_ever(self: Task, *, reason: str | None = None) -> NoReturn:
    note(self.request.retries)
    raise self.retry(countdown=0, exc=ValueError(reason) if reason else None)


@task(bind=True, max_retries=1)
def retry_while_handling(self: Task) -> None:
    try:
        raise LookupError("the first trouble")
    except LookupError as exc:
        raise self.retry(countdown=0, exc=exc) from None


@task(bind=True, max_retries=1)
def retry_while_handling_without_exc(self: Task) -> None:
    try:
        raise LookupError("the first trouble")
    except LookupError:
        self.retry(countdown=0)


@task(bind=True, max_retries=None)
def retry_without_limit(self: Task) -> int:
    if self.request.retries < 5:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True, max_retries=0)
def never_retry(self: Task) -> NoReturn:
    raise self.retry(countdown=0)


@task(bind=True, max_retries=3)
def retry_and_go_on(self: Task) -> str:
    if self.request.retries < 1:
        retried = self.retry(countdown=0, throw=False)
        note(type(retried), str(retried), retried.when)
        return "after the retry"
    return "retried"


@task(bind=True, max_retries=3)
def retry_with_other_arguments(self: Task, number: int, *, word: str) -> list[Any]:
    if self.request.retries < 1:
        raise self.retry(args=(number + 1,), kwargs={"word": word * 2}, countdown=0)
    return [number, word]


@task(bind=True)
def catch_a_retry(self: Task) -> str:
    try:
        self.retry(countdown=3600, max_retries=0)
    except self.MaxRetriesExceededError as exc:
        note(exc)
    return "caught"


@task()
def raise_retry(message: str | None = None) -> NoReturn:
    raise Retry(message, when=60)


@task()
def raise_retry_for_a_reason() -> NoReturn:
    raise Retry(exc=ValueError("a reason"), when=60)


@task(bind=True, max_retries=3)
def call_itself_and_retry(self: Task, depth: int) -> int:
    if self.request.retries == 0:
        if depth:
            return int(self(depth - 1))
        raise self.retry(countdown=0)
    return int(self.request.retries)


def help_to_retry(task: Task, **options: Any) -> NoReturn:
    task.retry(countdown=0, **options)
    raise AssertionError("retry() came back")


@task(bind=True, max_retries=1)
def retry_in_helper(self: Task) -> int:
    if self.request.retries < 1:
        help_to_retry(self)
    return int(self.request.retries)


@task(max_retries=1)
def retry_current_task() -> int:
    if current_task.request.retries < 1:
        help_to_retry(current_task, exc=LookupError("of the current task"))
    return int(current_task.request.retries)


@task(bind=True, max_retries=1)
def retry_with_cause(self: Task) -> None:
    try:
        try:
            raise KeyError("the cause")
        except KeyError as exc:
            raise LookupError("the first trouble") from exc
    except LookupError:
        raise self.retry(countdown=0, exc=ValueError("the second trouble"))  # noqa: B904


class TwoArguments(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@task(bind=True, max_retries=1)
def retry_for_what_does_not_unpickle(self: Task) -> int:
    if self.request.retries < 1:
        raise self.retry(countdown=0, exc=TwoArguments("one", "two"))
    return int(self.request.retries)


@task(bind=True, max_retries=1)
def retry_for_a_class(self: Task) -> int:
    if self.request.retries < 1:
        raise self.retry(countdown=0, exc=LookupError)
    return int(self.request.retries)


@task(bind=True, max_retries=1)
def launch_and_retry(self: Task) -> int:
    pass_on.on(self.app).delay(f"of attempt {self.request.retries}")
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True, max_retries=1)
def retry_with_some_arguments(self: Task, number: int = 0, *, word: str = "") -> list[Any]:
    if self.request.retries < 1:
        changed: dict[str, Any] = {"args": (7,)} if number else {"kwargs": {"word": "new"}}
        raise self.retry(countdown=0, **changed)
    return [number, word]


@task(bind=True, max_retries=1, ignore_result=True)
def retry_and_ignore(self: Task) -> int:
    note(self.request.retries, self.request.ignore_result)
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True, max_retries=1, throws=(LookupError,))
def retry_and_be_expected(self: Task) -> None:
    raise self.retry(countdown=0, exc=LookupError("expected"))


@task(bind=True)
def apply_a_retry(self: Task) -> None:
    for name in ("retry_with", "retry_for_ever"):
        result = self.app.tasks[f"retries.{name}"].apply((2,) if name == "retry_with" else ())
        note(result.state, result.result)
    try:
        retry_for_ever.on(self.app)(reason="called directly")
    except ValueError as exc:
        note(exc)


class FailsOnRetry(Hooks):
    def on_retry(self: Any, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        super().on_retry(exc, task_id, args, kwargs, einfo)
        raise LookupError("on_retry fails")


@task(bind=True, max_retries=1, mixins=(FailsOnRetry,))
def on_retry_fails(self: Task) -> int:
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return int(self.request.retries)


# ── acknowledged late ───────────────────────────────────────────────────────────────────────────


@task(bind=True, acks_late=True, acks_on_failure_or_timeout=False, max_retries=1)
def retry_without_ack(self: Task) -> NoReturn:
    raise self.retry(countdown=0, exc=LookupError("in the end"))


@task(bind=True)
def pass_on(self: Task, value: Any, *more: Any) -> Any:
    return value


# ── by themselves ───────────────────────────────────────────────────────────────────────────────


@task(bind=True, autoretry_for=(ZeroDivisionError,), default_retry_delay=0)
def succeed_at_third(self: Task) -> int:
    note(self.request.retries)
    return int(self.request.retries) if self.request.retries == 2 else 1 // 0


@task(autoretry_for=(ZeroDivisionError,), retry_kwargs={"max_retries": 2, "countdown": 0})
def divide(number: int) -> float:
    return number / 0


@task(autoretry_for=(ArithmeticError,), max_retries=1, retry_backoff=True, retry_backoff_max=0)
def divide_with_backoff(number: int) -> float:
    return number / 0


@task(
    autoretry_for=(ArithmeticError,),
    max_retries=1,
    retry_backoff=1,
    retry_backoff_max=0,
    retry_jitter=False,
)
def divide_without_jitter(number: int) -> float:
    return number / 0


@task(
    autoretry_for=(Exception,),
    dont_autoretry_for=(ZeroDivisionError,),
    max_retries=1,
    default_retry_delay=0,
)
def divide_and_give_up(number: int) -> float:
    note("divide", number)
    if number < 0:
        raise ValueError(number)
    return number / 0


@task(autoretry_for=(ValueError,), max_retries=2, default_retry_delay=0)
def fail_otherwise() -> NoReturn:
    raise LookupError("not a ValueError")


@task(autoretry_for=(Exception,), max_retries=2, default_retry_delay=0)
def end_with(what: str) -> NoReturn:
    raise {"ignore": Ignore, "reject": Reject, "retry": Retry}[what](what)


@task(bind=True, autoretry_for=(Exception,), max_retries=2, default_retry_delay=0)
def retry_both_ways(self: Task) -> str:
    note(self.request.retries)
    if self.request.retries == 0:
        raise ValueError("by itself")
    if self.request.retries == 1:
        raise self.retry(countdown=0)
    return "done"


@task(
    autoretry_for=(ZeroDivisionError,),
    max_retries=1,
    retry_backoff=True,
    retry_backoff_max=1,
    retry_jitter=False,
)
def divide_after_a_second(number: int) -> float:
    return number / 0


@task(autoretry_for=(Exception,), max_retries=0)
def divide_once(number: int) -> float:
    return number / 0


@task(bind=True, autoretry_for=(Exception,), max_retries=None, default_retry_delay=0)
def divide_in_the_end(self: Task, number: int) -> float:
    retries: int = self.request.retries
    note(retries)
    return number / (retries // 5)


@task(bind=True, autoretry_for=(Exception,), default_retry_delay=0, max_retries=9)
def override_max_retries(self: Task) -> None:
    """`retry` says how often, and the exception that it raises then is caught by autoretry."""
    note(self.request.retries)
    raise self.retry(max_retries=1, countdown=0)


@task(autoretry_for=(LookupError,), max_retries=1, default_retry_delay=0)
def fail_with_cause() -> None:
    try:
        raise ValueError("the cause")
    except ValueError as exc:
        raise KeyError("a LookupError") from exc


@task(bind=True, acks_late=True, autoretry_for=(LookupError,), default_retry_delay=0)
def reject_while_retrying(self: Task) -> str:
    redelivered = self.request.delivery_info["redelivered"]
    note(self.request.retries, redelivered)
    if self.request.retries == 0:
        raise LookupError("retried")
    if not redelivered:
        raise Reject("delivered again", requeue=True)
    return "in the end"


class Flaky:
    autoretry_for = (ZeroDivisionError,)
    max_retries = 1
    default_retry_delay = 0


@task(mixins=(Flaky,))
def divide_by_base(number: int) -> float:
    return number / 0


@task(autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def return_something_unserialisable() -> object:
    return {1: object}


def retried(name: str, shows: str, **options: Any) -> Row:
    """A task that is retried once, and what else was said when it was sent or retried.

    Its second attempt notes something in which `shows` occurs.
    """
    call = options.pop("call", {})

    def check(seen: Seen) -> bool:
        return any(shows in note for note in all_notes(seen) if note[1:].startswith("1: "))

    return Row(
        f"retry: {name}",
        lambda app: retry_with.on(app).apply_async((1,), options, **call),
        expects={"state": "SUCCESS", "result": 1, "runs": 2, "tasks": 1, "check": check},
    )


def stamped(app: Celery) -> Any:
    signature = retry_with.on(app).s(1)
    signature.stamp(reason="audit")
    return signature.apply_async()


ROWS = [
    retried("with a countdown", "1: ", countdown=0.01),
    retried("with an expiry", "expires <time>", expires=3600),
    retried("with a priority", "'priority': 4", priority=4),
    retried("with time limits", "[300, 200]", time_limit=300, soft_time_limit=200),
    retried("with headers", "'too'", headers={"later": "too"}),
    retried("keeps its headers", "'abc'", call={"headers": {"trace": "abc"}}),
    retried("keeps its priority", "'priority': 6", call={"priority": 6}),
    retried("keeps its shadow", "alias", call={"shadow": "alias"}),
    retried("keeps its limits", "[200, 100]", call={"time_limit": 200, "soft_time_limit": 100}),
    retried("keeps its expiry", "expires <time>", call={"expires": 3600}),
    Row(
        "retry: nothing of ours is in the headers",
        lambda app: retry_with.on(app).apply_async((1,), headers={"trace": "abc"}),
        expects={
            "state": "SUCCESS",
            "check": lambda seen: any("1: {'trace': 'abc'}," in note for note in all_notes(seen)),
        },
        trap=21,
    ),
    Row(
        "retry: three times",
        lambda app: retry_with.on(app).delay(3),
        expects={"state": "SUCCESS", "result": 3, "runs": 4},
    ),
    Row(
        "retry: an eta",
        lambda app: retry_at.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2},
        scrub=((r"Retry in [\d.]+s", "Retry in <time>s"),),
    ),
    Row(
        "retry: another queue",
        lambda app: retry_elsewhere.on(app).delay(),
        expects={"state": "SUCCESS", "result": "<queue>-other", "runs": 2},
    ),
    Row(
        "retry: too often",
        lambda app: retry_for_ever.on(app).delay(),
        expects={"state": "FAILURE", "error": "MaxRetriesExceededError", "runs": 2},
    ),
    Row(
        "retry: too often, for a reason",
        lambda app: retry_for_ever.on(app).delay(reason="a reason"),
        expects={"state": "FAILURE", "error": "ValueError", "runs": 2, "log": "a reason"},
    ),
    Row(
        "retry: more often than the task, by the call of retry()",
        lambda app: retry_with.on(app).delay(4, max_retries=5),
        expects={"state": "SUCCESS", "result": 4, "runs": 5},
    ),
    Row(
        "retry: less often than the task, by the call of retry()",
        lambda app: retry_with.on(app).delay(3, max_retries=1),
        expects={"state": "FAILURE", "error": "MaxRetriesExceededError", "runs": 2},
    ),
    Row(
        "retry: while an exception is handled, with it",
        lambda app: retry_while_handling.on(app).delay(),
        expects={"state": "FAILURE", "error": "LookupError", "runs": 2},
    ),
    Row(
        "retry: while an exception is handled, without it",
        lambda app: retry_while_handling_without_exc.on(app).delay(),
        expects={"state": "FAILURE", "error": "MaxRetriesExceededError", "runs": 2},
    ),
    Row(
        "retry: without limit",
        lambda app: retry_without_limit.on(app).delay(),
        expects={"state": "SUCCESS", "result": 5, "runs": 6},
    ),
    Row(
        "retry: never",
        lambda app: never_retry.on(app).delay(),
        expects={"state": "FAILURE", "error": "MaxRetriesExceededError", "runs": 1},
    ),
    Row(
        "retry: throw=False",
        lambda app: retry_and_go_on.on(app).delay(),
        expects={"state": "SUCCESS", "result": "after the retry", "runs": 2},
    ),
    Row(
        "retry: with other arguments",
        lambda app: retry_with_other_arguments.on(app).delay(1, word="a"),
        expects={"state": "SUCCESS", "result": [2, "aa"], "runs": 2},
    ),
    Row(
        "retry: the body catches what it raises",
        lambda app: catch_a_retry.on(app).delay(),
        expects={"state": "SUCCESS", "result": "caught", "runs": 1},
    ),
    Row(
        "retry: raised by hand",
        lambda app: raise_retry.on(app).delay("by hand"),
        expects={"state": "RETRY", "runs": 1, "log": "by hand"},
    ),
    Row(
        "retry: raised by hand, without a message",
        lambda app: raise_retry.on(app).delay(),
        expects={"state": "RETRY", "runs": 1},
    ),
    Row(
        "retry: raised by hand, with an exception",
        lambda app: raise_retry_for_a_reason.on(app).delay(),
        expects={"state": "RETRY", "runs": 1, "log": "a reason"},
    ),
    Row(
        "retry: in a call of itself",
        lambda app: call_itself_and_retry.on(app).delay(1),
        expects={"state": "SUCCESS", "result": 1, "runs": 2},
    ),
    Row(
        "retry: with a link",
        lambda app: retry_with.on(app).apply_async((1,), link=pass_on.on(app).s("linked")),
        expects={"state": "SUCCESS", "tasks": 2, "states": ["SUCCESS"] * 2},
    ),
    Row(
        "retry: with an errback",
        lambda app: retry_for_ever.on(app).apply_async(link_error=pass_on.on(app).s("error")),
        expects={"state": "FAILURE", "tasks": 2},
    ),
    Row(
        "retry: in a chain",
        lambda app: chain(retry_with.on(app).s(1), pass_on.on(app).s("next"), app=app)(),
        expects={"tasks": 2, "states": ["SUCCESS"] * 2},
    ),
    Row(
        "retry: in a group",
        lambda app: group(retry_with.on(app).s(n) for n in range(2)).apply_async(),
        expects={"tasks": 2, "states": ["SUCCESS"] * 2},
    ),
    Row(
        "retry: in a chord",
        lambda app: chord([retry_with.on(app).s(n) for n in range(2)], pass_on.on(app).s())(),
        expects={"tasks": 3, "states": ["SUCCESS"] * 3},
    ),
    Row(
        "retry: in a stamped call",
        stamped,
        expects={"state": "SUCCESS", "runs": 2, "check": lambda seen: "audit" in str(seen)},
    ),
    Row(
        "autoretry: succeeds at the third attempt",
        lambda app: succeed_at_third.on(app).delay(),
        expects={"state": "SUCCESS", "result": 2, "runs": 3, "notes": ["0", "1", "2"]},
        trap=11,
    ),
    Row(
        "autoretry: gives up",
        lambda app: divide.on(app).delay(1),
        expects={"state": "FAILURE", "error": "ZeroDivisionError", "runs": 3},
    ),
    Row(
        "autoretry: with backoff and jitter",
        lambda app: divide_with_backoff.on(app).delay(1),
        expects={"state": "FAILURE", "error": "ZeroDivisionError", "runs": 2},
    ),
    Row(
        "autoretry: with backoff, without jitter",
        lambda app: divide_without_jitter.on(app).delay(1),
        expects={"state": "FAILURE", "error": "ZeroDivisionError", "runs": 2},
    ),
    Row(
        "autoretry: not for an exception that is excepted",
        lambda app: divide_and_give_up.on(app).delay(1),
        expects={"state": "FAILURE", "error": "ZeroDivisionError", "runs": 1},
    ),
    Row(
        "autoretry: for one that is not excepted",
        lambda app: divide_and_give_up.on(app).delay(-1),
        expects={"state": "FAILURE", "error": "ValueError", "runs": 2},
    ),
    Row(
        "autoretry: not for other exceptions",
        lambda app: fail_otherwise.on(app).delay(),
        expects={"state": "FAILURE", "error": "LookupError", "runs": 1},
    ),
    Row(
        "autoretry: by the attributes of a base class",
        lambda app: divide_by_base.on(app).delay(1),
        expects={"state": "FAILURE", "error": "ZeroDivisionError", "runs": 2},
    ),
    Row(
        "autoretry: not for Ignore",
        lambda app: end_with.on(app).delay("ignore"),
        expects={"state": "STARTED", "runs": 1},
    ),
    Row(
        "autoretry: for Reject, which is an exception like others here",
        lambda app: end_with.on(app).delay("reject"),
        expects={"runs": 3, "log": "reject"},
    ),
    Row(
        "autoretry: not for Retry",
        lambda app: end_with.on(app).delay("retry"),
        expects={"state": "RETRY", "runs": 1},
    ),
    Row(
        "autoretry: and retry() in the same task",
        lambda app: retry_both_ways.on(app).delay(),
        expects={"state": "SUCCESS", "result": "done", "runs": 3},
    ),
    Row(
        "autoretry: not for a result that the backend cannot store",
        lambda app: return_something_unserialisable.on(app).delay(),
        expects={"state": "FAILURE", "runs": 1},
    ),
    Row(
        "retry: in a helper",
        lambda app: retry_in_helper.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2},
    ),
    Row(
        "retry: of the current task",
        lambda app: retry_current_task.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2, "log": "of the current task"},
    ),
    Row(
        "retry: for an exception with causes",
        lambda app: retry_with_cause.on(app).delay(),
        expects={
            "state": "FAILURE",
            "error": "ValueError",
            "runs": 2,
            "trace": r"(?s)the cause.*the first trouble.*the second trouble",
        },
        trap=22,
    ),
    Row(
        "retry: for an exception that does not unpickle",
        lambda app: retry_for_what_does_not_unpickle.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2, "log": "one and two"},
        trap=22,
    ),
    Row(
        "retry: for a class of exceptions",
        lambda app: retry_for_a_class.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2, "log": "LookupError"},
    ),
    Row(
        "retry: after launching a task",
        lambda app: launch_and_retry.on(app).delay(),
        expects={"state": "SUCCESS", "result": 1, "runs": 2, "tasks": 3},
        trap=7,
    ),
    Row(
        "retry: with other positional arguments",
        lambda app: retry_with_some_arguments.on(app).delay(1, word="a"),
        expects={"state": "SUCCESS", "result": [7, "a"], "runs": 2},
    ),
    Row(
        "retry: with other keyword arguments",
        lambda app: retry_with_some_arguments.on(app).delay(word="a"),
        expects={"state": "SUCCESS", "result": [0, "new"], "runs": 2},
    ),
    Row(
        "retry: of a task whose result is ignored",
        lambda app: retry_and_ignore.on(app).delay(),
        expects={"state": None, "runs": 2, "log": "succeeded in"},
    ),
    Row(
        "retry: of a call whose result is ignored",
        lambda app: retry_with.on(app).apply_async((1,), ignore_result=True),
        expects={"runs": 2, "log": "succeeded in"},
    ),
    Row(
        "retry: too often, for an exception that is expected",
        lambda app: retry_and_be_expected.on(app).delay(),
        expects={"state": "FAILURE", "error": "LookupError", "runs": 2, "log": "raised expected"},
    ),
    Row(
        "retry: in what a body applies, and calls",
        lambda app: apply_a_retry.on(app).delay(),
        expects={"state": "SUCCESS", "check": lambda seen: "called directly" in str(seen)},
        trap=9,
    ),
    Row(
        "retry: in the client",
        lambda app: retry_with.on(app).apply((2,)).get(),
        expects={"sent": "^2$"},
    ),
    Row(
        "retry: in a direct call in the client",
        lambda app: retry_for_ever.on(app)(reason="in the client"),
        expects={"sent": "ValueError.*in the client", "tasks": 0},
    ),
    Row(
        "retry: on_retry fails",
        lambda app: on_retry_fails.on(app).delay(),
        expects={"runs": 2, "check": lambda seen: "on_retry" in str(seen)},
    ),
    Row(
        "late: a retry that ends in a failure that is not acknowledged",
        lambda app: retry_without_ack.on(app).delay(),
        expects={"state": "FAILURE", "error": "LookupError", "runs": 2, "left": 0},
        brokers=("redis", "amqp"),
    ),
    Row(
        "autoretry: after a second",
        lambda app: divide_after_a_second.on(app).delay(1),
        expects={"error": "ZeroDivisionError", "runs": 2, "log": "Retry in 1s"},
    ),
    Row(
        "autoretry: with max_retries=0",
        lambda app: divide_once.on(app).delay(1),
        expects={"error": "ZeroDivisionError", "runs": 1},
    ),
    Row(
        "autoretry: without limit",
        lambda app: divide_in_the_end.on(app).delay(1),
        expects={"state": "SUCCESS", "result": 1.0, "runs": 6},
    ),
    Row(
        "autoretry: and retry() with max_retries",
        lambda app: override_max_retries.on(app).delay(),
        expects={"state": "FAILURE", "error": "MaxRetriesExceededError", "runs": 2},
    ),
    Row(
        "autoretry: for an exception with a cause",
        lambda app: fail_with_cause.on(app).delay(),
        expects={"error": "KeyError", "runs": 2, "trace": "(?s)the cause.*a LookupError"},
    ),
    Row(
        "autoretry: and Reject in a later attempt",
        lambda app: reject_while_retrying.on(app).delay(),
        expects={"state": "SUCCESS", "result": "in the end", "runs": 3},
        brokers=("redis", "amqp"),
    ),
]
