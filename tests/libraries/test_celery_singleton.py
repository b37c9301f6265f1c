"""celery-singleton: ``class IsolatedSingleton(IsolatedMixin, Singleton)``."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker
from isolated_tasks.errors import ChildLostError

TIMEOUT = 30


@pytest.fixture(scope="module", params=["prefork", "threads"])
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        conf = {"singleton_key_prefix": f"{workplace.name}-lock-"}
        # Two: one calls while the other waits.
        yield workplace.start("singletons", pool=request.param, concurrency=2, conf=conf)


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


def get(running: Worker, task: str, *args: Any) -> Any:
    return running.call(f"singletons.{task}", *args).get(timeout=TIMEOUT)


@pytest.mark.parametrize("sender", ["send_twice", "send_from_body"])
def test_a_duplicate_is_dropped_while_the_first_runs(
    running: Worker, fifo: str, sender: str
) -> None:
    first, second = get(running, sender, fifo)

    assert first == second
    assert len(get(running, "locks")) == 1
    with open(fifo, "w"):
        pass
    pid = running.app.AsyncResult(first).get(timeout=TIMEOUT)
    assert pid not in {process.pid for process in running.tree()}
    assert running.log().count(f"Task singletons.wait[{first}] received") == 1
    running.wait_for_log(rf"wait\[{first}\] succeeded")


@pytest.mark.parametrize(
    ("how", "error"),
    [("success", None), ("failure", KeyError), ("lost child", ChildLostError)],
    ids=["success", "failure", "lost child"],
)
def test_the_lock_is_released_after(
    running: Worker, how: str, error: type[Exception] | None
) -> None:
    # Through a caller's app the lock is not taken, so a body of the worker's sends.
    result = running.call("singletons.send_end", how)
    task_id = result.get(timeout=TIMEOUT)
    ended = running.app.AsyncResult(task_id)

    if error is None:
        assert ended.get(timeout=TIMEOUT) == how
        running.wait_for_log(rf"end\[{task_id}\] succeeded")
    else:
        with pytest.raises(error):
            ended.get(timeout=TIMEOUT)
        running.wait_for_log(rf"end\[{task_id}\] raised")
    assert get(running, "locks") == []
