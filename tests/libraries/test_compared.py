"""The README's table: what it says of others, as far as it can be run."""

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import loky
import pebble
import pytest
import redis
import rq
import rq.command

from harness import compared

README = (Path(__file__).parents[2] / "README.md").read_text()

pytest.importorskip("celery_batches", reason="pip install --no-deps celery-batches")


def test_each_row_has_a_cell_for_each_column() -> None:
    table = README.split("\n## Compared\n")[1].strip().split("\n\n")[0].splitlines()

    assert len({line.count("|") for line in table}) == 1
    assert len(table) > 10


# pebble


def test_pebble_has_a_process_for_each_call() -> None:
    run = pebble.concurrent.process(compared.pid)

    assert len({run().result(), run().result(), os.getpid()}) == 3


def test_pebble_s_pool_has_a_process_for_n_calls() -> None:
    with pebble.ProcessPool(max_workers=1, max_tasks=2) as pool:
        pids = [pool.schedule(compared.pid).result() for _ in range(4)]

    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_pebble_has_a_time_limit() -> None:
    run = pebble.concurrent.process(timeout=0.2)(compared.sleep)

    with pytest.raises(TimeoutError):
        run(30).result()


def test_pebble_s_crash_is_an_error_of_one_call_with_the_exit_code() -> None:
    with pebble.ProcessPool(max_workers=1) as pool:
        lost, next_one = pool.schedule(compared.crash), pool.schedule(compared.pid)
        with pytest.raises(pebble.ProcessExpired) as caught:
            lost.result()
        assert next_one.result()

    assert caught.value.exitcode == -signal.SIGSEGV


def test_pebble_s_process_may_start_others_unless_it_is_a_daemon() -> None:
    daemon = pebble.concurrent.process(compared.pid_of_a_child)
    other = pebble.concurrent.process(daemon=False)(compared.pid_of_a_child)

    with pytest.raises(AssertionError, match="daemonic processes"):
        daemon().result()
    assert other().result()
    with pebble.ProcessPool(max_workers=1) as pool:
        assert pool.schedule(compared.pid_of_a_child).result()


def test_pebble_and_loky_have_no_memory_limit_and_no_figures_of_a_call() -> None:
    for function in (
        pebble.concurrent.process,
        pebble.ProcessPool.__init__,
        pebble.ProcessPool.schedule,
        loky.get_reusable_executor,
        loky.ProcessPoolExecutor.submit,
    ):
        assert [name for name in inspect.signature(function).parameters if "mem" in name] == []
    with pebble.ProcessPool(max_workers=1) as pool:
        future = pool.schedule(compared.pid)
        future.result()
    names = compared.attributes(future)
    assert [name for name in names if "usage" in name or "mem" in name] == []


# loky


@pytest.fixture
def executor() -> Any:
    executor = loky.ProcessPoolExecutor(max_workers=1)
    yield executor
    executor.shutdown(kill_workers=True)


def test_loky_s_process_serves_all_calls_and_is_a_new_interpreter(executor: Any) -> None:
    assert len({executor.submit(compared.pid).result() for _ in range(5)}) == 1
    assert executor.submit(compared.pid_of_a_child).result()


def test_loky_s_process_goes_when_it_has_grown_by_300_mb() -> None:
    import loky.process_executor

    assert loky.process_executor._MAX_MEMORY_LEAK_SIZE == 300_000_000


def test_loky_s_crash_is_an_error_of_every_pending_call(executor: Any) -> None:
    futures = [executor.submit(body) for body in (compared.crash, compared.pid, compared.pid)]

    for future in futures:
        assert isinstance(future.exception(), loky.process_executor.TerminatedWorkerError)


def test_loky_s_running_call_is_not_cancelled_alone(
    executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.submit(compared.pid).result()
    future = executor.submit(compared.sleep, 2)
    while not future.running():
        pass

    assert not future.cancel()


# RQ


@pytest.fixture
def queue(redis_url: str) -> Any:
    with redis.Redis.from_url(redis_url, socket_timeout=60) as connection:
        queue = rq.Queue(f"test-{os.urandom(6).hex()}", connection=connection)
        yield queue
        queue.delete(delete_jobs=True)


def _work(queue: Any, redis_url: str, folder: Path) -> subprocess.Popen[bytes]:
    rq_program = Path(sys.executable).with_name("rq")
    return subprocess.Popen(
        [str(rq_program), "worker", "--burst", "--url", redis_url, queue.name],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(compared.__file__).parents[1]),
            "FOLDER": str(folder),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_rq_has_a_process_for_each_job_and_a_crash_fails_one(
    queue: Any, redis_url: str, tmp_path: Path
) -> None:
    pids = [queue.enqueue(compared.pid) for _ in range(2)]
    crash = queue.enqueue(compared.crash)
    child = queue.enqueue(compared.pid_of_a_child)
    late = queue.enqueue(compared.sleep, 30, job_timeout=1)
    worker = _work(queue, redis_url, tmp_path)
    assert worker.wait(60) == 0

    assert len({job.latest_result().return_value for job in pids} | {worker.pid}) == 3
    assert "(signal 11)" in crash.latest_result().exc_string
    assert child.latest_result().return_value
    assert "JobTimeoutException" in late.latest_result().exc_string
    assert [
        name for name in inspect.signature(queue.enqueue_call).parameters if "mem" in name
    ] == []


def test_rq_stops_a_running_job(queue: Any, redis_url: str, tmp_path: Path) -> None:
    job = queue.enqueue(compared.sleep, 60)
    worker = _work(queue, redis_url, tmp_path)
    while not (tmp_path / "runs").exists():
        assert worker.poll() is None
    rq.command.send_stop_job_command(queue.connection, job.id)

    assert worker.wait(60) == 0
    assert job.get_status(refresh=True) == rq.job.JobStatus.STOPPED


# Celery's own options, and celery-batches


def test_max_tasks_per_child_has_a_process_for_each_task_of_the_worker(workplace: Any) -> None:
    worker = workplace.start("compared_app", args=["--max-tasks-per-child=1"])

    assert worker.call("pid").get(timeout=30) != worker.call("pid").get(timeout=30)
    with pytest.raises(AssertionError, match="daemonic processes"):
        worker.call("pid_of_a_child").get(timeout=30)


def test_max_memory_per_child_stops_no_task(workplace: Any) -> None:
    worker = workplace.start("compared_app", args=["--max-memory-per-child=60000"])
    size, pid = worker.call("hold", 300).get(timeout=30)

    assert size == 300 << 20
    assert worker.call("pid").get(timeout=30) != pid


def test_max_tasks_per_child_does_nothing_in_threads(workplace: Any) -> None:
    worker = workplace.start("compared_app", pool="threads", args=["--max-tasks-per-child=1"])

    assert {worker.call("pid").get(timeout=30) for _ in range(3)} == {worker.pid}


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_celery_batches_is_one_call_for_n_messages_and_has_no_time_limit(
    workplace: Any, pool: str
) -> None:
    worker = workplace.start("compared_app", pool=pool)
    results = [worker.call("batch", "sleep") for _ in range(2)]

    assert len({result.get(timeout=30) for result in results}) == 1


def test_celery_batches_loses_the_messages_of_a_crash(workplace: Any) -> None:
    worker = workplace.start("compared_app")
    lost = [worker.call("batch", "crash") for _ in range(2)]
    worker.wait_for_log("signal 11")
    next_ones = [worker.call("batch", "") for _ in range(2)]

    assert all(result.get(timeout=30) for result in next_ones)
    assert [result.state for result in lost] == ["PENDING", "PENDING"]
