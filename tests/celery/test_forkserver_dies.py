"""The forkserver is killed, between calls and during calls: no call is lost."""

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.processes import PATIENCE, Mailbox, Word, survivors
from harness.worker import POOLS, Worker
from isolated_tasks.errors import ChildLostError

StartWorker = Callable[..., Worker]
#: The class is in conftest.py, which nothing can import.
Workplace = Any

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


@pytest.mark.fault(39)
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


@pytest.mark.fault(39)
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


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_child_without_its_forkserver_still_goes_with_its_requester(
    worker: StartWorker, pool: str, workplace: Workplace, mailbox: Mailbox
) -> None:
    running = worker("isolated", pool=pool)
    (forkserver,) = forkservers(running)
    running.call("isolated.run", "hang", mailbox.path, "stuck in C")
    pids = mailbox.read()
    kill(forkserver)
    if pool != "solo":  # whose main process waits for the body, and starts no other meanwhile
        forkservers(running, 2)
    assert survivors(pids, timeout=0) == set(pids)
    everything = [process.pid for process in running.tree()]

    running.kill()

    assert survivors([*pids, *everything]) == set()
    # A forkserver removes its folder after its main process, but without one nobody does. Nor does
    # anybody remove that of billiard.
    for folder in workplace.temporary.glob("isolated_tasks-*" if pool == "solo" else "pymp-*"):
        shutil.rmtree(folder)


@pytest.mark.fault(39)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_child_without_its_forkserver_is_lost_like_any_other(
    worker: StartWorker, pool: str, mailbox: Mailbox, word: Word
) -> None:
    running = worker("isolated", pool=pool)
    (forkserver,) = forkservers(running)
    result = running.call("isolated.run", "report_wait_and_leave", mailbox.path, word.path, -9)
    (pid,) = mailbox.read()
    kill(forkserver)
    word.give()

    with pytest.raises(ChildLostError) as caught:
        result.get(timeout=30)

    assert caught.value.pid == pid
    assert parent(running) != forkserver


@pytest.mark.fault(39)
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_request_that_the_forkserver_has_not_taken_goes_to_the_next(
    worker: StartWorker, pool: str, workplace: Workplace
) -> None:
    running = worker("isolated", pool=pool)
    (forkserver,) = forkservers(running)
    os.kill(forkserver, signal.SIGSTOP)
    result = running.call("isolated.run", "ids")
    wait_connected(workplace.temporary)

    kill(forkserver)

    second = forkservers(running, 2)[1]
    assert result.get(timeout=30)["parent"] == second
    # That one is watched too, also if it was the slot that has started it.
    kill(second)
    assert len(forkservers(running, 3)) == 3


@pytest.mark.fault(43)
def test_a_forkserver_that_stays_stopped_is_replaced(worker: StartWorker) -> None:
    # A third of this, and no less than 10 s, is what a forkserver gets to answer.
    running = worker("isolated", pool="prefork", conf={"isolated_start_timeout": 30})
    (forkserver,) = forkservers(running)
    os.kill(forkserver, signal.SIGSTOP)
    result = running.call("isolated.run", "ids")

    second = forkservers(running, 2)[1]

    assert result.get(timeout=30)["parent"] == second
    assert survivors([forkserver]) == set()


def wait_connected(folder: Path) -> None:
    """Wait until somebody has connected to the forkserver's socket."""
    (path,) = folder.glob("isolated_tasks-*/forkserver.sock")
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        # Besides the listening socket, those of connections that nobody has taken bear its path.
        if Path("/proc/net/unix").read_text().count(str(path)) > 1:
            return
        tick.wait(0.01)
    raise AssertionError("nobody connects")
