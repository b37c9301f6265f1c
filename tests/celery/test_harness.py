"""The harness of these tests, shown to work with plain Celery tasks."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import marks
from harness.network import skip_without_namespaces
from harness.processes import program, survivors
from harness.worker import Worker, WorkerError

StartWorker = Callable[..., Worker]


def test_a_result_comes_back_in_each_pool_and_nothing_stays(worker: StartWorker, pool: str) -> None:
    running = worker("plain", pool=pool)

    assert running.call("plain.add", 1, 2).get(timeout=20) == 3

    processes = running.tree()
    assert running.stop() == 0
    assert not running.killed
    assert marks.wait(processes, timeout=5) == []
    assert running.tree() == []


def test_a_result_comes_back_over_rabbitmq(worker: StartWorker) -> None:
    running = worker("plain", broker="amqp", backend="redis")

    assert running.call("plain.echo", {"a": [1, None]}).get(timeout=20) == {"a": [1, None]}
    assert running.stop() == 0


def test_a_result_comes_back_without_redis(worker: StartWorker) -> None:
    running = worker("plain", pool="threads", broker="amqp", backend="rpc")

    assert running.call("plain.add", 1, 2).get(timeout=20) == 3


def test_a_failure_comes_back(worker: StartWorker) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        worker("plain", pool="threads").call("plain.fail", "on purpose").get(timeout=20)


def test_the_tree_of_a_prefork_worker_has_its_pool_processes(worker: StartWorker) -> None:
    running = worker("plain", concurrency=2)

    pid = running.call("plain.pid").get(timeout=20)

    pids = [process.pid for process in running.tree()]
    assert pids[0] == running.pid
    assert pid in pids[1:]
    assert len(pids) == 3


def test_two_workers_of_a_test_share_a_queue(worker: StartWorker) -> None:
    workers = [worker("plain", pool="solo") for _ in range(2)]

    first = workers[0].call("plain.sleep", 1)
    workers[0].call("plain.sleep", 1).get(timeout=20)
    first.get(timeout=20)

    for running in workers:
        running.wait_for_log(r"plain\.sleep\[.*\] succeeded")


def test_workers_do_not_see_the_messages_of_another_name(worker: StartWorker) -> None:
    running = worker("plain", pool="solo")

    assert running.app.conf.task_default_queue in running.log()
    assert list(running.app.control.ping(timeout=1.0)[0].values()) == [{"ok": "pong"}]


def test_waiting_for_a_line_that_never_comes_shows_the_log(worker: StartWorker) -> None:
    running = worker("plain", pool="solo")

    with pytest.raises(WorkerError, match=r"(?s)runs; no 'unheard of' in its log:.*ready\."):
        running.wait_for_log("unheard of", timeout=0.1)


def test_a_worker_that_cannot_start_fails_at_once_with_its_log(worker: StartWorker) -> None:
    with pytest.raises(WorkerError, match=r"(?s)exited with \d.*no_such_app"):
        worker("no_such_app", pool="solo")


def test_a_killed_prefork_worker_takes_its_pool_with_it(worker: StartWorker) -> None:
    running = worker("plain", concurrency=2)
    processes = running.tree()

    assert running.kill() == -9

    assert marks.wait(processes, timeout=5) == []


def test_a_worker_that_does_not_stop_in_time_is_killed(worker: StartWorker) -> None:
    running = worker("plain", concurrency=1)
    running.call("plain.sleep", 600)
    running.wait_for_log(r"plain\.sleep\[.*\] received")
    processes = running.tree()

    assert running.stop(timeout=0.5) == -9

    assert running.killed
    assert marks.wait(processes, timeout=5) == []


def test_settings_reach_the_worker(worker: StartWorker) -> None:
    running = worker("plain", pool="solo", conf={"worker_prefetch_multiplier": 7})

    replies = running.app.control.inspect(timeout=2.0).conf()
    assert [reply["worker_prefetch_multiplier"] for reply in replies.values()] == [7]


def started_by(process: "subprocess.Popen[str]") -> set[int]:
    assert process.stdout is not None
    return {int(pid) for pid in process.stdout.readline().split()}


def test_machines_do_not_touch_this_one_and_go_with_who_made_them(tmp_path: Path) -> None:
    skip_without_namespaces()
    interfaces = psutil.net_if_addrs().keys()
    # Both have machines of the same names.
    with (
        program("harness.networked", str(tmp_path)) as one,
        program("harness.networked", str(tmp_path)) as other,
    ):
        pids = [started_by(one), started_by(other)]
        assert psutil.net_if_addrs().keys() == interfaces
        everything = set.union(*pids)
        # Switch and forwarder; of each machine: who waits for it, its first process, who waits for
        # a command, the command and its child.
        assert len(everything) == 2 * (2 + 2 * 5)

        one.kill()

        assert survivors(pids[0]) == set()
        assert survivors(pids[1], timeout=0) == pids[1]
    assert survivors(everything) == set()
