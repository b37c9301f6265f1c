"""A user's tests, with the fixtures of celery.contrib.pytest; test_pytest_fixtures.py runs them.

$BROKER_URL, $RESULT_BACKEND and $POOL say what the fixtures' worker is to be.
"""

import os
from typing import Any

import pytest
from celery import shared_task

from isolated_tasks import IsolatedTask

TIMEOUT = 20


@shared_task
def shared_pid() -> int:
    return os.getpid()


@shared_task(base=IsolatedTask, isolated=False)
def pid_in_place() -> int:
    return os.getpid()


@pytest.fixture(scope="session")
def celery_config() -> dict[str, Any]:
    return {
        "broker_url": os.environ["BROKER_URL"],
        "result_backend": os.environ["RESULT_BACKEND"],
        "task_default_queue": os.environ["TEST_QUEUE"],
        # For the transport in memory, which has no events; its default is a second.
        "broker_transport_options": {"polling_interval": 0.05},
    }


@pytest.fixture(scope="session")
def celery_parameters() -> dict[str, Any]:
    return {"task_cls": "isolated_tasks:IsolatedTask"}


@pytest.fixture(scope="session")
def celery_includes() -> list[str]:
    return ["celery.contrib.testing.tasks"]


@pytest.fixture(scope="session")
def celery_worker_pool() -> str:
    return os.environ["POOL"]


def test_a_task_can_be_called_and_applied(celery_app: Any) -> None:
    @celery_app.task
    def add(x: int, y: int) -> int:
        return x + y

    assert add(1, 2) == 3
    assert add.apply((1, 2)).get() == 3


def test_a_worker_isolates_a_task_of_the_test(celery_app: Any, celery_worker: Any) -> None:
    @celery_app.task
    def pid(factor: int) -> list[int]:
        return [os.getpid(), factor * 2]

    @celery_app.task
    def fail() -> None:
        raise KeyError("of the body")

    celery_worker.reload()

    child, doubled = pid.delay(21).get(timeout=TIMEOUT)
    assert child != os.getpid()
    assert doubled == 42
    with pytest.raises(KeyError):
        fail.delay().get(timeout=TIMEOUT)


def test_a_worker_of_the_session_isolates_shared_tasks(celery_session_worker: Any) -> None:
    first = shared_pid.delay().get(timeout=TIMEOUT)
    second = shared_pid.delay().get(timeout=TIMEOUT)

    assert len({first, second, os.getpid()}) == 3


def test_a_task_that_is_not_isolated_runs_in_the_thread(celery_session_worker: Any) -> None:
    assert pid_in_place.delay().get(timeout=TIMEOUT) == os.getpid()
