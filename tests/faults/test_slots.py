"""Faults to which it may matter what a slot is: a process, a thread, a greenlet of a real worker.

All tests of one pool share one worker, which has to be as before after each.
"""

import itertools
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from harness.combination import TIMEOUT, Combination
from harness.faults import IN_FULL, fault
from harness.processes import Mailbox, survivors
from isolated_tasks.errors import ChildLostError

POOLS = ("prefork", "threads", "gevent")


@pytest.fixture(scope="module", params=POOLS)
def shared(
    request: pytest.FixtureRequest,
    open_workplace: Callable[[], AbstractContextManager[Any]],
) -> Iterator[Combination]:
    with open_workplace() as workplace:
        # A spare has descriptors, which are counted here, and comes and goes as it likes.
        conf = {"isolated_spares": 0}
        combined = Combination(workplace, "faulty_tasks", pool=request.param, conf=conf)
        yield combined
        assert combined.worker.stop() == 0
        assert not combined.worker.killed


@pytest.fixture
def running(shared: Combination) -> Iterator[Combination]:
    before = shared.settle()
    yield shared
    shared.assert_as_before(before)


# ── data ────────────────────────────────────────────────────────────────────────────────────────


@fault(17)
@pytest.mark.parametrize(
    ("how", "exit_code"), [("an exit", 7), ("a crash", -11), ("SystemExit", 70)]
)
def test_a_result_that_would_end_who_loads_it_ends_its_child(
    running: Combination, how: str, exit_code: int
) -> None:
    result = running.call("run_faulty", "return_trap", "loaded", how)

    with pytest.raises(ChildLostError) as caught:
        result.get(timeout=TIMEOUT)
    assert caught.value.exit_code == exit_code


@fault(22)
def test_progress_comes_as_fast_as_a_body_tells_it(running: Combination) -> None:
    count = 100_000 if IN_FULL else 500
    result = running.call("tell_progress", count)

    assert result.get(timeout=600 if IN_FULL else TIMEOUT) == count
    assert result.state == "SUCCESS"


# ── stops and limits ────────────────────────────────────────────────────────────────────────────


@fault(32, 35)
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL", "SIGUSR1", "SIGQUIT"])
def test_a_revocation_with_any_signal_ends_the_whole_group(
    running: Combination, mailbox: Mailbox, signal: str
) -> None:
    result = running.call("hang_late", mailbox.path)
    pids = mailbox.read()

    result.revoke(terminate=True, signal=signal)

    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    assert survivors(pids) == set()
    # The message is done with: nobody gets it again.
    running.serve_in_each_slot()
    assert mailbox.is_empty
    assert result.state == "REVOKED"


@fault(33)
def test_a_body_hears_of_its_soft_limit_once(running: Combination) -> None:
    result = running.call("count_soft_limits")

    assert result.get(timeout=TIMEOUT) == 1
    assert (
        running.worker.log().count(f"exceeded for faulty_tasks.count_soft_limits[{result.id}]") == 1
    )


# ── no room ─────────────────────────────────────────────────────────────────────────────────────


def slot_processes(running: Combination) -> set[int]:
    """Those in which Celery calls tasks."""
    return set(running.pool_processes) or {running.worker.pid}


@fault(21, 38)
def test_calls_of_slots_without_descriptors_wait_until_there_are_some(running: Combination) -> None:
    limits = {}
    for pid in slot_processes(running):
        open_now = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        lowest = next(number for number in itertools.count() if number not in open_now)
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, hard))
    seen = len(running.worker.log())

    results = [running.call("run", "ids") for _ in range(3)]
    running.worker.wait_for_log(rf"(?s).{{{seen}}}.*is tried in [^\n]*Too many open files")
    for pid, before in limits.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    pids = {result.get(timeout=TIMEOUT)["pid"] for result in results}
    assert len(pids) == 3
    assert not pids & slot_processes(running)
