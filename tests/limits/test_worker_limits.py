"""Limits that the whole worker was given, and its soft shutdown."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from harness.processes import Mailbox, Word, survivors
from harness.worker import Worker

StartWorker = Callable[..., Worker]

TIMEOUT = 30


def slots(running: Worker) -> set[int]:
    """The processes in which Celery calls tasks."""
    calls = [running.call("limited.plain_run", "ids") for _ in range(3)]
    return {call.get(timeout=TIMEOUT)["pid"] for call in calls}


# The pools that keep limits themselves, each in its way, and one that keeps none.
@pytest.mark.fault(32, 33)
@pytest.mark.parametrize(
    ("pool", "options", "error"),
    [
        ("prefork", {"conf": {"task_time_limit": 0.5}}, TimeLimitExceeded),
        ("gevent", {"conf": {"task_time_limit": 0.5}}, TimeLimitExceeded),
        ("threads", {"args": ["--time-limit=0.5"]}, TimeLimitExceeded),
        ("prefork", {"args": ["--soft-time-limit=0.5"]}, SoftTimeLimitExceeded),
    ],
    ids=["prefork", "gevent", "threads", "soft"],
)
def test_a_limit_of_the_worker_ends_the_body_and_no_slot(
    worker: StartWorker, mailbox: Mailbox, pool: str, options: dict[str, Any], error: type
) -> None:
    running = worker("limited", pool=pool, **options)
    before = slots(running)

    result = running.call("limited.stay_and_clean_up", mailbox.path)

    with pytest.raises(error):
        result.get(timeout=TIMEOUT)
    assert survivors(mailbox.read()) == set()
    assert mailbox.read() == ["cleaned up"]
    assert slots(running) == before


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_the_caller_s_limit_goes_before_the_worker_s(
    worker: StartWorker, mailbox: Mailbox, word: Word, pool: str
) -> None:
    running = worker("limited", pool=pool, conf={"task_time_limit": 0.001})

    result = running.app.send_task(
        "limited.run", ("report_and_wait", mailbox.path, word.path), time_limit=1000
    )
    mailbox.read()
    word.give("well")

    assert result.get(timeout=TIMEOUT)[1] == "well"


def test_the_lower_limit_ends_a_body_wherever_the_other_one_comes_from(
    worker: StartWorker, mailbox: Mailbox
) -> None:
    running = worker("limited", args=["--time-limit=0.5"])

    result = running.app.send_task(
        "limited.stay_and_clean_up", (mailbox.path,), soft_time_limit=1000
    )

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    assert survivors(mailbox.read()) == set()


@pytest.mark.fault(34)
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_soft_shutdown_waits_for_a_body(
    worker: StartWorker, mailbox: Mailbox, word: Word, pool: str
) -> None:
    running = worker("limited", pool=pool, conf={"worker_soft_shutdown_timeout": 3})
    result = running.call("limited.run", "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()

    running.signal(signal.SIGQUIT)
    running.app.control.broadcast("ping")
    running.wait_for_log("Initiating Soft Shutdown")
    assert survivors([pid], timeout=0) == {pid}
    word.give("well")

    assert result.get(timeout=TIMEOUT) == [pid, "well"]
    running.process.wait(timeout=TIMEOUT)
    assert survivors([pid]) == set()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_soft_shutdown_ends_a_body_that_takes_longer(
    worker: StartWorker, mailbox: Mailbox, pool: str
) -> None:
    running = worker("limited", pool=pool, conf={"worker_soft_shutdown_timeout": 1})
    running.call("limited.stay_and_clean_up", mailbox.path)
    pids = mailbox.read()

    running.signal(signal.SIGQUIT)
    running.app.control.broadcast("ping")

    assert mailbox.read() == ["cleaned up"]
    running.process.wait(timeout=TIMEOUT)
    assert survivors(pids) == set()


def test_a_worker_names_the_tasks_that_its_budget_does_nothing_for(worker: StartWorker) -> None:
    running = worker("limited", conf={"isolated_memory_budget": "1GiB"})

    unlimited = running.wait_for_log("tasks without a memory_limit do not count: (.*)")[1]
    too_large = running.wait_for_log(r"budget, 1024 MiB, is below the memory_limit of (.*)")[1]
    assert {"limited.run", "limited.spin"} <= set(unlimited.split(", "))
    assert too_large == "limited.take_more_than_there_is"
