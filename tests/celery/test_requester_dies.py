"""A pool process or a whole worker is killed: its bodies go too, and no start is tripped up.

The process wing's own tests are in tests/process/test_lifeline.py; these say that Celery's
processes are requesters like any other.
"""

import signal
from typing import Any

import psutil
import pytest

from harness import bodies
from harness.processes import Mailbox, survivors, wait_status
from harness.worker import POOLS, Worker

#: The class is in conftest.py, which nothing can import.
Workplace = Any

STATUS = {
    "asleep": psutil.STATUS_SLEEPING,
    "spinning": psutil.STATUS_RUNNING,
    "stuck in C": psutil.STATUS_SLEEPING,
    "stopped": psutil.STATUS_STOPPED,
}

#: Every pool once, and every way to hang where the requester is a pool process and where it is the
#: main process, as it is in all others.
CASES = [
    *((pool, "asleep") for pool in POOLS),
    *((pool, how) for pool in ("prefork", "threads") for how in bodies.HANGING if how != "asleep"),
]


def hang(worker: Worker, mailbox: Mailbox, how: str) -> list[int]:
    """Have a body hang; return its pid and those of its grandchildren."""
    worker.call("isolated.run", "hang", mailbox.path, how)
    pids: list[int] = mailbox.read()
    wait_status(pids[0], STATUS[how])
    assert survivors(pids, timeout=0) == set(pids)
    return pids


def forkserver_pid(worker: Worker) -> int:
    return int(worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])


@pytest.mark.fault(29)
@pytest.mark.parametrize(("pool", "how"), CASES)
def test_a_killed_worker_takes_its_bodies_along(
    workplace: Workplace, mailbox: Mailbox, pool: str, how: str
) -> None:
    running = workplace.start("isolated", pool=pool)
    forkserver = forkserver_pid(running)
    pids = hang(running, mailbox, how)
    everything = {process.pid for process in running.tree()}
    assert everything >= {*pids, forkserver}

    running.kill()

    assert survivors(pids) == set()
    # The forkserver goes too, and takes its socket along: the fixture looks for files.
    assert survivors([forkserver]) == set()


@pytest.mark.fault(29)
def test_killed_pool_processes_take_their_bodies_along(
    workplace: Workplace, mailbox: Mailbox
) -> None:
    running = workplace.start("isolated", pool="prefork", concurrency=len(bodies.HANGING))
    main = psutil.Process(running.pid)
    forkserver = forkserver_pid(running)
    pool = [child for child in main.children() if child.pid != forkserver]
    assert len(pool) == len(bodies.HANGING)
    pids = [pid for how in bodies.HANGING for pid in hang(running, mailbox, how)]

    for process in pool:
        process.kill()

    assert survivors(pids) == set()
    # The worker replaces its pool processes, and the next call is well.
    assert running.call("isolated.run", "echo", 1).get(timeout=30) == [[1], {}]


def test_a_worker_of_the_same_name_starts_where_one_was_killed(
    workplace: Workplace, mailbox: Mailbox
) -> None:
    first = workplace.start("isolated", args=["-n", "twin@localhost"], ready=False)
    pids = hang(first, mailbox, "asleep")
    first.kill()
    assert survivors(pids) == set()

    second = workplace.start("isolated", args=["-n", "twin@localhost"], ready=False)

    assert second.call("isolated.run", "echo", 2).get(timeout=30) == [[2], {}]


@pytest.mark.fault(34)
def test_a_pool_process_that_is_told_to_end_ends_its_body(
    workplace: Workplace, mailbox: Mailbox
) -> None:
    running = workplace.start("isolated", pool="prefork")
    pool_pid = running.call("isolated.plain_run", "ids").get(timeout=10)["pid"]
    pids = hang(running, mailbox, "stuck in C")

    # Celery's handler raises SystemExit in the middle of our wait.
    psutil.Process(pool_pid).send_signal(signal.SIGTERM)

    assert survivors(pids) == set()
