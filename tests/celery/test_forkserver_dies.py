"""The forkserver is killed, between calls and during calls: no call is lost."""

import re
from collections.abc import Callable

import psutil
import pytest

from harness.processes import Mailbox, Word, survivors
from harness.worker import POOLS, Worker

StartWorker = Callable[..., Worker]

CASES = [*((pool, False) for pool in POOLS), ("prefork", True), ("threads", True)]

LOADED = r"forkserver pid=(\d+) loaded"


def forkservers(worker: Worker, number: int = 1) -> list[int]:
    """The pids of the first so many forkservers that this worker has ever had."""
    worker.wait_for_log(rf"(?s)(?:{LOADED}.*){{{number}}}", timeout=30)
    return [int(pid) for pid in re.findall(LOADED, worker.log())]


def kill(pid: int) -> None:
    psutil.Process(pid).kill()
    assert survivors([pid]) == set()


def parent(worker: Worker) -> int:
    """The forkserver that serves a call now."""
    pid: int = worker.call("isolated.run", "ids").get(timeout=30)["parent"]
    return pid


def test_calls_run_on_the_next_forkserver(worker: StartWorker, pool: str) -> None:
    running = worker("isolated", pool=pool)
    (first,) = forkservers(running)
    assert parent(running) == first

    kill(first)

    second = parent(running)
    assert second != first
    assert second in forkservers(running, 2)
    # The log says so too, for whoever looks for the reason of a slow call.
    running.wait_for_log(rf"forkserver pid={first} was killed by SIGKILL")
    # Again, and at once.
    kill(second)
    assert parent(running) not in (first, second)


@pytest.mark.parametrize(("pool", "batch"), CASES)
def test_a_call_under_way_returns(
    worker: StartWorker, mailbox: Mailbox, word: Word, *, pool: str, batch: bool
) -> None:
    running = worker("isolated", pool=pool)
    (forkserver,) = forkservers(running)
    task = "isolated.run_in_batch" if batch else "isolated.run"
    result = running.call(task, "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()

    kill(forkserver)
    word.give("well")

    assert result.get(timeout=30) == [pid, "well"]
    # The process that has lost its parent goes, and the slot takes the next call.
    assert parent(running) != forkserver
    if not batch:
        assert survivors([pid]) == set()


def test_a_call_that_waits_behind_one_under_way_is_not_lost(
    worker: StartWorker, mailbox: Mailbox, word: Word
) -> None:
    running = worker("isolated", pool="prefork", concurrency=1)
    (forkserver,) = forkservers(running)
    first = running.call("isolated.run", "report_and_wait", mailbox.path, word.path)
    second = running.call("isolated.run", "echo", 2)
    third = running.call("isolated.run_in_batch", "echo", 3)
    (pid,) = mailbox.read()

    kill(forkserver)
    word.give("well")

    assert first.get(timeout=30) == [pid, "well"]
    assert second.get(timeout=30) == [[2], {}]
    assert third.get(timeout=30) == [[3], {}]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_one_of_two_forkservers_is_replaced_while_the_other_serves(
    worker: StartWorker, pool: str
) -> None:
    running = worker("isolated", pool=pool, concurrency=2, conf={"isolated_forkservers": 2})
    first, second = forkservers(running, 2)
    results = [running.call("isolated.run", "ids") for _ in range(20)]
    assert {result.get(timeout=30)["parent"] for result in results} <= {first, second}

    kill(first)

    results = [running.call("isolated.run", "ids") for _ in range(20)]
    third = forkservers(running, 3)[2]
    assert {result.get(timeout=30)["parent"] for result in results} <= {second, third}
    kill(second)
    assert parent(running) in (third, *forkservers(running, 4))
