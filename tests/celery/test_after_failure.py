"""What follows a failure that is not the body's own: retries, redelivery, errbacks."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery.app.task import Task

from harness.worker import Worker
from isolated_tasks import ChildLostError, OutOfMemoryError

TIMEOUT = 30

COMBINATIONS = [
    ("prefork", "redis"),
    ("threads", "redis"),
    ("gevent", "redis"),
    ("prefork", "amqp"),
]

in_prefork = pytest.mark.parametrize("running", COMBINATIONS[:1], indirect=True, ids="-".join)


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    pool, broker = request.param
    conf = {"task_annotations": {"after_failure.die_always": {"default_retry_delay": 0}}}
    with open_workplace() as workplace:
        worker = workplace.start("after_failure", pool=pool, broker=broker, conf=conf)
        yield worker
        assert worker.stop() == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "begun"


def call(running: Worker, task: str, *args: Any) -> Any:
    return running.call(f"after_failure.{task}", *args)


# ── retries ─────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_child_is_retried_as_autoretry_for_says(running: Worker, path: Path) -> None:
    assert call(running, "die_twice", str(path)).get(timeout=TIMEOUT) == 2
    assert path.read_text() == "0\n1\n2\n"


def test_retries_of_a_lost_child_end(running: Worker, path: Path) -> None:
    with pytest.raises(ChildLostError, match="die_always"):
        call(running, "die_always", str(path)).get(timeout=TIMEOUT)
    assert path.read_text() == "begun\n" * 2


def test_what_the_body_has_raised_itself_is_not_asked_twice(running: Worker, path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="all gone"):
        call(running, "run_out_of_memory", str(path)).get(timeout=TIMEOUT)
    assert path.read_text() == "begun\n"


@pytest.mark.parametrize("task", ["run_out_of_memory_once", "return_a_lock_once"])
def test_an_error_of_ours_can_be_retried(running: Worker, task: str) -> None:
    assert call(running, task).get(timeout=TIMEOUT) == 1


@pytest.mark.skipif(
    not hasattr(Task, "retry_on_worker_lost"), reason="this Celery has no retry_on_worker_lost"
)
def test_a_lost_child_is_retried_as_celerys_own_option_says(running: Worker) -> None:
    assert call(running, "die_once").get(timeout=TIMEOUT) == 1


# ── redelivery ──────────────────────────────────────────────────────────────────────────────────


def test_a_lost_child_goes_back_to_the_broker_where_a_lost_slot_would(
    running: Worker, path: Path
) -> None:
    errors = path.with_name("errors")
    errback = running.app.signature("after_failure.errback", kwargs={"path": str(errors)})
    name = "after_failure.die_unless_redelivered"

    result = running.app.send_task(name, (str(path),), link_error=errback)

    assert result.get(timeout=TIMEOUT) == "done"
    assert path.read_text() == "False\nTrue\n"
    # It has not failed in between: nobody was told so.
    assert not errors.exists()
    assert not re.search(rf"\[{result.id}\] raised unexpected", running.log())


def test_a_lost_child_fails_where_a_lost_slot_would(running: Worker, path: Path) -> None:
    with pytest.raises(ChildLostError):
        call(running, "die_and_stay_dead", str(path)).get(timeout=TIMEOUT)
    call(running, "slot_pid").get(timeout=TIMEOUT)
    assert path.read_text() == "begun\n"


def test_the_loss_of_another_call_s_child_is_an_error_like_any_other(
    running: Worker, path: Path
) -> None:
    with pytest.raises(ChildLostError, match="another call's"):
        call(running, "ask_who_dies", str(path)).get(timeout=TIMEOUT)
    call(running, "slot_pid").get(timeout=TIMEOUT)
    assert path.read_text() == "asked\n"


# ── errbacks ────────────────────────────────────────────────────────────────────────────────────


def test_an_errback_runs_in_a_child(running: Worker, path: Path) -> None:
    slot = call(running, "slot_pid").get(timeout=TIMEOUT)
    errback = running.app.signature("after_failure.errback", kwargs={"path": str(path)})

    result = running.app.send_task("after_failure.fail", link_error=errback)

    with pytest.raises(LookupError):
        result.get(timeout=TIMEOUT)
    running.wait_for_log(rf"\[{result.id}\] raised unexpected", TIMEOUT)
    pid, name, task_id = path.read_text().split()
    assert (name, task_id) == ("LookupError", result.id)
    assert int(pid) not in {slot, running.pid}


@in_prefork
def test_an_errback_of_a_task_that_was_killed_does_not_run_in_the_main_process(
    running: Worker, path: Path
) -> None:
    errback = running.app.signature("after_failure.errback", kwargs={"path": str(path)})

    result = running.app.send_task("after_failure.hang", time_limit=1, link_error=errback)

    with pytest.raises(Exception, match="TimeLimitExceeded"):
        result.get(timeout=TIMEOUT)
    call(running, "slot_pid").get(timeout=TIMEOUT)
    lines = path.read_text().splitlines()
    # Celery itself calls errbacks of a hard time limit twice.
    assert {line.split()[1] for line in lines} == {"TimeLimitExceeded"}
    assert running.pid not in {int(line.split()[0]) for line in lines}
