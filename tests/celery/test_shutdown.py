"""A worker is asked to stop, at any time: bodies end well, and nothing is left.

That no process and no temporary file is left is checked by the fixtures, after each test.
"""

import os
import signal
from collections.abc import Callable, Mapping

import psutil
import pytest

from harness.processes import Mailbox, Word, survivors
from harness.worker import Worker

StartWorker = Callable[..., Worker]

TIMEOUT = 30

#: Celery sorts the steps of a worker by their requirements, and otherwise by chance.
SEEDS = range(4)
CASES: list[tuple[str, str, dict[str, str]]] = [
    *(("prefork", "run", {"PYTHONHASHSEED": str(seed)}) for seed in SEEDS),
    ("prefork", "run_in_batch", {}),
    ("threads", "run", {}),
]

#: What a plain worker exits with, too.
AFTER_SIGTERM, AFTER_SIGINT = 0, 1


def everything(running: Worker) -> set[int]:
    return {process.pid for process in running.tree()}


def assert_ended_well(running: Worker, pids: set[int], exit_code: int = AFTER_SIGTERM) -> None:
    assert running.process.wait(timeout=TIMEOUT) == exit_code
    assert survivors(pids) == set()
    assert "Traceback" not in running.log()
    assert "forkserver pid" not in running.log().partition("ready.")[2], "it says that it died"


@pytest.mark.parametrize(
    ("pool", "task", "env"),
    CASES,
    ids=["-".join([pool, task, *env.values()]) for pool, task, env in CASES],
)
def test_a_warm_shutdown_lets_a_body_finish(
    worker: StartWorker, mailbox: Mailbox, word: Word, pool: str, task: str, env: Mapping[str, str]
) -> None:
    running = worker("isolated", pool=pool, env=env, loglevel="DEBUG")
    result = running.call(f"isolated.{task}", "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()
    pids = everything(running)
    assert pid in pids

    running.signal(signal.SIGTERM)
    # Not before: whatever is to be stopped ahead of the pool has been.
    running.wait_for_log(r"Worker: Stopping Pool\.\.\.")
    assert survivors([pid], timeout=0) == {pid}, "the body is gone too early"
    word.give("well")

    assert result.get(timeout=TIMEOUT) == [pid, "well"]
    assert_ended_well(running, pids)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_interrupt_from_the_terminal_lets_a_body_finish(
    worker: StartWorker, mailbox: Mailbox, word: Word, pool: str
) -> None:
    running = worker("isolated", pool=pool)
    result = running.call("isolated.run", "report_and_wait", mailbox.path, word.path)
    (pid,) = mailbox.read()
    pids = everything(running)

    # As the terminal does: to every process of the foreground group.
    os.killpg(running.pid, signal.SIGINT)
    running.wait_for_log("Warm shutdown")
    word.give("well")

    assert result.get(timeout=TIMEOUT) == [pid, "well"]
    assert_ended_well(running, pids, AFTER_SIGINT)


def test_a_body_that_waits_for_its_turn_is_left_to_the_next_worker(
    worker: StartWorker, mailbox: Mailbox, word: Word
) -> None:
    running = worker("isolated")
    first = running.call("isolated.run", "report_and_wait", mailbox.path, word.path)
    mailbox.read()
    second = running.call("isolated.run", "echo", 2)
    running.wait_for_log(rf"Task isolated\.run\[{second.id}\] received")
    pids = everything(running)

    running.signal(signal.SIGTERM)
    running.wait_for_log("Warm shutdown")
    word.give("well")

    assert first.get(timeout=TIMEOUT)[1] == "well"
    assert_ended_well(running, pids)
    assert not second.ready()
    worker("isolated")
    assert second.get(timeout=TIMEOUT) == [[2], {}]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_idle_batch_process_exits_well_with_its_worker(
    worker: StartWorker, mailbox: Mailbox, pool: str
) -> None:
    running = worker("shutdown", pool=pool)
    idle = running.call("shutdown.report_at_exit", mailbox.path).get(timeout=TIMEOUT)
    pids = everything(running)
    assert idle in pids

    assert running.stop() == 0

    assert not running.killed
    assert mailbox.read() == [idle, "exits"]
    assert_ended_well(running, pids)


@pytest.mark.parametrize("how", ["asleep", "stuck in C"])
def test_a_cold_shutdown_ends_a_body_that_hangs(
    worker: StartWorker, mailbox: Mailbox, how: str
) -> None:
    running = worker("isolated")
    running.call("isolated.run", "hang", mailbox.path, how)
    mailbox.read()
    pids = everything(running)

    running.signal(signal.SIGQUIT)

    running.process.wait(timeout=TIMEOUT)
    assert survivors(pids) == set()


def test_a_pool_process_that_is_replaced_takes_its_idle_batch_process_along(
    worker: StartWorker,
) -> None:
    running = worker("isolated", args=["--max-tasks-per-child", "2"])
    first, second, third = (
        running.call("isolated.run_in_batch", "ids").get(timeout=TIMEOUT)["pid"] for _ in range(3)
    )

    # The third call has come to another pool process, which has its own.
    assert first == second != third
    assert survivors([first]) == set()
    assert psutil.pid_exists(third)
