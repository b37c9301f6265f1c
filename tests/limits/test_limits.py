"""One table: what ends a body, in each pool, over each broker; the worker goes on as before.

All rows of one combination share one worker. After each the fixture `running` holds the worker to
it: the same processes serve the next tasks, and no process, descriptor or file is left.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from harness.combination import TIMEOUT, Combination
from harness.processes import Mailbox, Word, survivors
from isolated_tasks.errors import (
    ChildLostError,
    CPUTimeLimitExceeded,
    MemoryLimitExceeded,
    OpenFilesLimitExceeded,
    OptionError,
    SoftMemoryLimitExceeded,
)
from isolated_tasks.process.cgroup import is_full

MIB = 1 << 20

APP = Path(__file__).parent / "apps" / "limited.py"
CONF = {
    "isolated_memory_budget": "600MiB",
    "isolated_max_redeliveries": 2,
    # How long a spare stays that no call comes for: each test waits until all children are gone.
    "isolated_batch_idle_timeout": 0.2,
}


@pytest.fixture(scope="module")
def shared(
    combination: tuple[str, str], open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Combination]:
    pool, broker = combination
    with open_workplace() as workplace:
        large = f"{workplace.name}-large"
        combined = Combination(
            workplace, "limited", pool=pool, broker=broker, conf=CONF, queues=[large]
        )
        yield combined
        assert combined.worker.stop() == 0
        assert not combined.worker.killed


@pytest.fixture
def running(shared: Combination) -> Iterator[Combination]:
    before = shared.settle()
    yield shared
    shared.assert_as_before(before)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "path")


def source_line(text: str) -> int:
    return APP.read_text().splitlines().index(text) + 1


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


# ── time limits ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(33)
def test_a_body_may_handle_its_soft_time_limit(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("handle_soft_time_limit", mailbox.path)
    pids = mailbox.read()

    assert result.get(timeout=TIMEOUT) == "cleaned up"
    running.worker.wait_for_log(rf"Soft time limit \(0\.3s\) exceeded for \S+\[{result.id}\]")
    assert survivors(pids) == set()


@pytest.mark.fault(33)
def test_a_soft_time_limit_that_is_not_handled_fails_the_call(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.send("stay_and_clean_up", mailbox.path, soft_time_limit=0.3)
    pids = mailbox.read()

    assert mailbox.read() == ["cleaned up"]
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    assert result.state == "FAILURE"
    assert f'"{APP}", line {source_line("        time.sleep(1000)")}, in stay' in result.traceback
    assert survivors(pids) == set()


@pytest.mark.fault(32)
def test_a_hard_time_limit_ends_the_body(running: Combination, mailbox: Mailbox) -> None:
    result = running.send("stay_and_clean_up", mailbox.path, time_limit=0.4)
    pids = mailbox.read()

    assert mailbox.read() == ["cleaned up"]
    with pytest.raises(TimeLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    assert caught.value.args == (0.4,)
    assert result.state == "FAILURE"
    running.worker.wait_for_log(rf"Hard time limit \(0\.4s\) exceeded for \S+\[{result.id}\]")
    assert survivors(pids) == set()


@pytest.mark.fault(6)
def test_a_hard_time_limit_ends_what_is_blocked_in_c(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.call("block_in_c", mailbox.path)
    (pid,) = mailbox.read()

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    running.worker.wait_for_log(rf"\[{result.id}\]: child pid={pid}, with its group, gets SIGKILL")
    assert survivors([pid]) == set()


@pytest.mark.fault(25, 32)
def test_a_hard_time_limit_ends_grandchildren_that_do_not_listen(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.call("leave_stubborn_processes", mailbox.path)
    pids = mailbox.read()
    assert len(pids) == 3

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=TIMEOUT)
    assert survivors(pids) == set()


def test_a_task_may_be_retried_for_its_hard_time_limit(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.call("retry_for_time", mailbox.path)
    pids = [*mailbox.read(), *mailbox.read()]

    assert result.get(timeout=TIMEOUT) == 1
    assert survivors(pids) == set()


# ── memory limits ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(27)
@pytest.mark.parametrize("task", ["hold_too_much", "let_others_hold_too_much"])
def test_a_memory_limit_ends_the_body_and_its_processes(
    running: Combination, mailbox: Mailbox, task: str
) -> None:
    result = running.call(task, mailbox.path)
    pids = mailbox.read()

    with pytest.raises(MemoryLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    error = caught.value
    assert (error.task, error.task_id) == (f"limited.{task}", result.id)
    assert (error.pid, error.limit) == (pids[0], 150 * MIB)
    # A control group, where one can be had, holds not one page more, and may be some short of it:
    # the kernel also kills for what is asked for at once.
    assert is_full(error.peak, error.limit)
    assert survivors(pids) == set()


def test_a_body_may_handle_its_soft_memory_limit(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("handle_soft_memory_limit", mailbox.path)

    assert result.get(timeout=TIMEOUT) == "cleaned up"
    assert survivors(mailbox.read()) == set()


def test_a_soft_memory_limit_that_is_not_handled_fails_the_call(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.call("exceed_soft_memory_limit", mailbox.path)

    with pytest.raises(SoftMemoryLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    assert (caught.value.task, caught.value.limit) == (
        "limited.exceed_soft_memory_limit",
        200 * MIB,
    )
    guilty = "    held.append(bytearray(300 * MIB))"
    where = f'"{APP}", line {source_line(guilty)}, in exceed_soft_memory_limit\n{guilty}'
    assert where in result.traceback
    assert survivors(mailbox.read()) == set()


def test_a_task_may_be_retried_for_its_memory_limit(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("retry_for_memory", mailbox.path)
    pids = [*mailbox.read(), *mailbox.read()]

    assert result.get(timeout=TIMEOUT) == 1
    assert survivors(pids) == set()


@pytest.mark.parametrize("task", ["climb", "climb_elsewhere"])
def test_a_killed_body_goes_up_the_ladder(
    running: Combination, mailbox: Mailbox, path: str, task: str
) -> None:
    result = running.call(task, mailbox.path, path)
    pids = [*mailbox.read(), *mailbox.read()]

    runs, retries, queue = result.get(timeout=TIMEOUT)

    assert (runs, retries) == (2, 0)
    assert queue.endswith("-large") == (task == "climb_elsewhere")
    assert lines(path) == ["0", "0"]
    assert survivors(pids) == set()


def test_after_the_last_step_of_the_ladder_the_call_fails(
    running: Combination, mailbox: Mailbox, path: str
) -> None:
    result = running.call("climb_in_vain", mailbox.path, path)
    pids = [*mailbox.read(), *mailbox.read()]

    with pytest.raises(MemoryLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    assert caught.value.limit == 160 * MIB
    assert lines(path) == ["0", "0"]
    assert survivors(pids) == set()


# ── admission ───────────────────────────────────────────────────────────────────────────────────


def test_a_call_waits_until_its_memory_fits_into_the_budget(
    running: Combination, mailbox: Mailbox, word: Word
) -> None:
    first = running.call("take_most_of_the_budget", mailbox.path, word.path)
    (pid,) = mailbox.read()
    second = running.call("look_for", pid)
    if running.slots > 1:
        running.worker.wait_for_log(rf"limited\.look_for\[{second.id}\] waits for memory")
        # Longer than its time limit, which is not to run meanwhile.
        threading.Event().wait(1.2)
    word.give("well")

    assert first.get(timeout=TIMEOUT) == [pid, "well"]
    assert second.get(timeout=TIMEOUT) is False, "both have run at the same time"


def test_a_call_that_can_never_fit_fails_at_once(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("take_more_than_there_is", mailbox.path)

    with pytest.raises(OptionError, match="can never fit into isolated_memory_budget") as caught:
        result.get(timeout=TIMEOUT)
    assert (caught.value.task, caught.value.option) == (
        "limited.take_more_than_there_is",
        "memory_limit",
    )


# ── CPU and files ───────────────────────────────────────────────────────────────────────────────


def test_a_cpu_time_limit_ends_the_body(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("spin", mailbox.path)
    (pid,) = mailbox.read()

    with pytest.raises(CPUTimeLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    error = caught.value
    assert (error.task, error.task_id) == ("limited.spin", result.id)
    assert (error.pid, error.limit) == (pid, 1)
    assert f'"{APP}", line ' in error.crash_traceback
    assert " in spin" in error.crash_traceback
    assert survivors([pid]) == set()


def test_a_limit_of_open_files_fails_the_call(running: Combination, mailbox: Mailbox) -> None:
    result = running.call("open_many_files", mailbox.path)

    with pytest.raises(OpenFilesLimitExceeded) as caught:
        result.get(timeout=TIMEOUT)
    assert (caught.value.task, caught.value.limit) == ("limited.open_many_files", 40)
    assert survivors(mailbox.read()) == set()


# ── revocation ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(32, 35)
def test_a_revoked_body_is_ended(running: Combination, mailbox: Mailbox, path: str) -> None:
    if running.pool == "solo":
        pytest.skip("a busy solo worker cannot hear of it: see the next test")
    errback = running.worker.app.signature("limited.errback", kwargs={"path": path})
    result = running.send("stay_and_clean_up", mailbox.path, link_error=errback)
    pids = mailbox.read()

    result.revoke(terminate=True)

    assert mailbox.read() == ["cleaned up"]
    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)
    assert result.state == "REVOKED"
    assert survivors(pids) == set()
    # All that the worker does about it is done when it serves the next.
    running.serve_in_each_slot()
    assert lines(path) == []
    assert result.state == "REVOKED"


def test_a_busy_solo_worker_does_not_hear_of_a_revocation(
    running: Combination, mailbox: Mailbox, word: Word
) -> None:
    if running.pool != "solo":
        pytest.skip("all others hear it: see the test before")
    result = running.call("run", "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()

    result.revoke(terminate=True)
    word.give("well")

    assert result.get(timeout=TIMEOUT) == [pid, "well"]
    # It hears of it now, before it can answer this.
    name = running.worker.name
    assert running.worker.app.control.ping(destination=[name], limit=1, timeout=TIMEOUT)
    assert result.state == "SUCCESS"


def test_a_call_that_waits_for_memory_may_be_revoked(
    running: Combination, mailbox: Mailbox, word: Word
) -> None:
    if running.pool == "solo":
        pytest.skip("it has one slot, so no call waits for another's memory")
    first = running.call("take_most_of_the_budget", mailbox.path, word.path)
    (pid,) = mailbox.read()
    second = running.call("take_most_of_the_budget", mailbox.path, word.path)
    waits = rf"limited\.take_most_of_the_budget\[{second.id}\] waits for memory"
    running.worker.wait_for_log(waits)

    second.revoke(terminate=True)

    with pytest.raises(TaskRevokedError):
        second.get(timeout=TIMEOUT)
    # Its slot is free, and the first call goes on.
    assert running.get("run", "ids")["pid"] != pid
    word.give("well")
    assert first.get(timeout=TIMEOUT) == [pid, "well"]
    assert survivors([pid]) == set()


# ── lost children ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(52)
def test_a_message_whose_children_are_lost_is_given_back_so_often(
    running: Combination, mailbox: Mailbox
) -> None:
    result = running.call("be_lost", mailbox.path)
    pids = [mailbox.read()[0] for _ in range(2)]

    with pytest.raises(ChildLostError, match="not tried again: it has lost 2 children") as caught:
        result.get(timeout=TIMEOUT)
    error = caught.value
    assert error.redeliveries == 2
    assert not error.started
    assert len(set(pids)) == 2
    assert error.history is not None
    for pid, loss in zip(pids, error.history, strict=True):
        assert f"child pid={pid} was killed by SIGKILL" in loss
        assert loss in str(error)
    # A third run would be under way by now, or in front of the next task.
    running.serve_in_each_slot()
    assert mailbox.is_empty
