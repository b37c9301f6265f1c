"""Time limits: what Celery's prefork pool does about them is done in every pool.

The other pools of Celery itself have none to compare with (`tests/limits` looks at what is done
there); and a hard limit of a plain task ends its slot.
"""

import time
from typing import NoReturn

from celery.exceptions import SoftTimeLimitExceeded

from contract.recorder import note
from contract.table import Definition, Differs, Row, task
from rows.losses import counted, errback

PREFORK = ("prefork", "prefork-spawn")

LOGGED_BY_THE_SLOT = Differs(
    "That a limit was exceeded is logged where it is kept: by the slot.",
    {"log": "Soft time limit"},
    only=("log",),
)


def go_on() -> NoReturn:
    while True:
        time.sleep(0.01)


@task(soft_time_limit=0.3)
def clean_up_in_time() -> str:
    try:
        go_on()
    except SoftTimeLimitExceeded as exc:
        note(exc.args, str(exc))
        return "cleaned up"


@task(soft_time_limit=0.3)
def go_on_for_ever() -> None:
    go_on()


@task()
def go_on_unless_the_caller_limits_it() -> None:
    go_on()


@task(
    soft_time_limit=0.3,
    autoretry_for=(SoftTimeLimitExceeded,),
    max_retries=1,
    default_retry_delay=0,
)
def go_on_again() -> None:
    go_on()


@task(time_limit=0.3)
def go_on_beyond_all() -> None:
    go_on()


@task(time_limit=0.3, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def go_on_beyond_all_retries() -> None:
    go_on()


@task(time_limit=0.3, acks_late=True)
def go_on_and_acknowledge_late() -> None:
    go_on()


def hard(name: str, definition: Definition) -> Row:
    return Row(
        f"a hard time limit: {name}",
        lambda app: definition.on(app).delay(),
        expects={"state": "a plain one ends its slot, or does not end"},
        plain=False,
        differs=Differs(
            "A hard time limit ends the call alone, in every pool.",
            {
                "state": "FAILURE",
                "error": "TimeLimitExceeded",
                "runs": 1,
                "left": 0,
                "log": r"Hard time limit \(0\.3s\) exceeded for limits\.go_on",
                "check": counted(task_failure=1, on_failure=1, after_return=1, task_retry=0),
            },
        ),
    )


ROWS = [
    Row(
        "a soft time limit: the body cleans up",
        lambda app: clean_up_in_time.on(app).delay(),
        expects={"state": "SUCCESS", "result": "cleaned up", "log": "Soft time limit"},
        pools=PREFORK,
        differs=LOGGED_BY_THE_SLOT,
    ),
    Row(
        "a soft time limit: the body does not listen",
        lambda app: go_on_for_ever.on(app).delay(),
        expects={"state": "FAILURE", "error": "SoftTimeLimitExceeded", "log": "Soft time limit"},
        pools=PREFORK,
        differs=LOGGED_BY_THE_SLOT,
    ),
    Row(
        "a soft time limit: the caller's",
        lambda app: go_on_unless_the_caller_limits_it.on(app).apply_async(soft_time_limit=0.3),
        expects={"state": "FAILURE", "error": "SoftTimeLimitExceeded"},
        pools=PREFORK,
        differs=LOGGED_BY_THE_SLOT,
    ),
    Row(
        "a soft time limit: the task is retried by itself",
        lambda app: go_on_again.on(app).delay(),
        expects={"state": "FAILURE", "error": "SoftTimeLimitExceeded", "runs": 2},
        pools=PREFORK,
        differs=LOGGED_BY_THE_SLOT,
    ),
    hard("one failure", go_on_beyond_all),
    Row(
        "a hard time limit: each errback is called once",
        lambda app: go_on_beyond_all.on(app).apply_async(link_error=errback.on(app).s()),
        expects={"state": "a plain one ends its slot, or does not end"},
        plain=False,
        differs=Differs(
            "Celery's prefork pool calls each twice.",
            {
                "state": "FAILURE",
                "error": "TimeLimitExceeded",
                "notes": ["'TimeLimitExceeded'", "'errback of'"],
            },
        ),
    ),
    hard("the task would be retried by itself", go_on_beyond_all_retries),
    hard("acknowledged late", go_on_and_acknowledge_late),
]
