"""The same end-to-end tests in each pool, over each broker."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery.canvas import chunks, xmap, xstarmap

from harness.processes import Mailbox, Word
from harness.worker import POOLS, Worker
from isolated_tasks.errors import (
    ChildLostError,
    OutOfMemoryError,
    RemoteError,
    UnpicklableError,
)

TIMEOUT = 30

OVER_REDIS = [(pool, "redis") for pool in POOLS]
OVER_RABBITMQ = [(pool, "amqp") for pool in POOLS]
#: Where several tasks run at a time in one process.
CONCURRENT_POOLS = ("threads", "gevent", "eventlet")

BACKENDS = {"redis": "redis", "amqp": "rpc"}

#: For tests that a broker makes no difference to.
in_each_pool = pytest.mark.parametrize("running", OVER_REDIS, indirect=True, ids="-".join)
in_concurrent_pools = pytest.mark.parametrize(
    "running", [(pool, "redis") for pool in CONCURRENT_POOLS], indirect=True, ids="-".join
)

APP = Path(__file__).parent / "apps" / "isolated.py"


class Combination:
    """A worker that all tests of one pool and one broker share."""

    def __init__(self, worker: Worker, *, pool: str) -> None:
        self.worker = worker
        self.pool = pool
        self.forkserver = int(worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])

    def call(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.worker.call(f"isolated.{task}", *args, **kwargs)

    def get(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.call(task, *args, **kwargs).get(timeout=TIMEOUT)

    def send(self, task: str, *args: Any, **options: Any) -> Any:
        return self.worker.app.send_task(f"isolated.{task}", args, **options)

    def slot(self) -> int:
        """The pid of the process in which Celery calls tasks."""
        pid: int = self.get("plain_run", "ids")["pid"]
        return pid

    def log_entries(self) -> list[str]:
        """The log so far; an entry may have several lines."""
        return re.split(r"(?m)^(?=\[)", self.worker.log())


@pytest.fixture(scope="module", params=[*OVER_REDIS, *OVER_RABBITMQ], ids="-".join)
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Combination]:
    pool, broker = request.param
    concurrency = 2 if pool in CONCURRENT_POOLS else 1
    with open_workplace() as workplace:
        worker = workplace.start(
            "isolated",
            pool=pool,
            concurrency=concurrency,
            broker=broker,
            backend=BACKENDS[broker],
        )
        yield Combination(worker, pool=pool)
        assert worker.stop() == 0
        assert not worker.killed


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


# ── where a body runs ───────────────────────────────────────────────────────────────────────────


def test_a_body_runs_in_a_child_of_the_forkserver(running: Combination) -> None:
    ids = running.get("run", "ids")

    assert ids["parent"] == running.forkserver
    assert ids["pid"] not in {running.worker.pid, running.slot(), running.forkserver}
    assert ids["group"] == ids["pid"]


def test_each_call_has_a_process_of_its_own(running: Combination) -> None:
    assert running.get("leave_something") == 1
    assert running.get("leave_something") == 1
    assert running.get("run", "ids")["pid"] != running.get("run", "ids")["pid"]


def test_plain_tasks_stay_in_the_worker(running: Combination) -> None:
    ids = running.get("plain_run", "ids")

    main = running.worker.pid
    assert main in (ids["parent"], ids["pid"])
    assert (ids["pid"] != main) == running.pool.startswith("prefork")


def test_arguments_and_results_come_through(running: Combination) -> None:
    value = {"list": [1, 2.5, None, True], "text": "ä\n", "nested": {"deep": [[], {}]}}

    assert running.get("run", "echo", value, None, key=value) == [[value, None], {"key": value}]
    assert running.get("run", "wait_for_word", os.devnull) == ""
    assert running.get("run", "say", "", "") is None


def test_a_large_result_comes_through(running: Combination) -> None:
    text = "x" * 3_000_000

    assert running.get("run", "echo", text) == [[text], {}]


# ── exceptions ──────────────────────────────────────────────────────────────────────────────────


def source_line(text: str) -> int:
    return APP.read_text().splitlines().index(text) + 1


def test_an_exception_is_the_bodys_own_with_its_traceback(running: Combination) -> None:
    result = running.call("fail", "key")

    with pytest.raises(LookupError) as caught:
        result.get(timeout=TIMEOUT)
    assert type(caught.value) is LookupError
    assert caught.value.args == ("key", 3)

    for function, source in (
        ("fail", "    helper_that_fails(key)"),
        ("helper_that_fails", "    raise LookupError(key, 3)"),
    ):
        where = f'  File "{APP}", line {source_line(source)}, in {function}\n{source}\n'
        assert where in result.traceback
        running.worker.wait_for_log(re.escape(where))
    headline = f"Task isolated.fail[{result.id}] raised unexpected: LookupError('key', 3) ("
    (entry,) = (entry for entry in running.log_entries() if headline in entry)
    assert where in entry


def test_the_cause_of_an_exception_is_in_its_traceback(running: Combination) -> None:
    result = running.call("fail_because_of_another")

    with pytest.raises(ValueError, match="the effect"):
        result.get(timeout=TIMEOUT)

    cause, also, effect = result.traceback.partition("direct cause of the following exception")
    assert also
    assert "LookupError: ('the cause', 3)" in cause
    assert "in helper_that_fails" in cause
    assert '    raise ValueError("the effect") from exc' in effect


@pytest.mark.fault(16)
def test_an_exception_that_does_not_unpickle_arrives_as_from_a_plain_task(
    running: Combination,
) -> None:
    result, plain = running.call("be_in_trouble"), running.call("plain_be_in_trouble")

    error = result.get(timeout=TIMEOUT, propagate=False)
    plain_error = plain.get(timeout=TIMEOUT, propagate=False)

    assert str(error) == str(plain_error)
    assert "here: badly" in str(error)
    assert repr(error) == repr(plain_error)
    assert '    raise Trouble("here", "badly")' in result.traceback


@pytest.mark.fault(15)
def test_what_cannot_be_pickled_is_named_with_its_path(running: Combination) -> None:
    result = running.call("run", "lock_inside")

    with pytest.raises(UnpicklableError, match=re.escape('result["conn"][0]')) as caught:
        result.get(timeout=TIMEOUT)
    assert caught.value.path == 'result["conn"][0]'
    assert caught.value.type_name == "_thread.lock"


# ── lost children ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize(
    ("how", "exit_code", "signal"),
    [("SIGSEGV", -11, "SIGSEGV"), ("SIGKILL", -9, "SIGKILL"), ("os._exit(0)", 0, None)],
)
def test_a_lost_child_is_an_error_that_says_how(
    running: Combination, mailbox: Mailbox, how: str, exit_code: int, signal: str | None
) -> None:
    result = running.call("die_here", mailbox.path, how)
    (pid,) = mailbox.read()

    title = rf"task 'isolated\.die_here'\[{result.id}\]"
    with pytest.raises(ChildLostError, match=rf"{title}: child pid={pid} ") as caught:
        result.get(timeout=TIMEOUT)

    error = caught.value
    assert (error.pid, error.exit_code, error.signal) == (pid, exit_code, signal)
    assert error.task == "isolated.die_here"
    assert error.started
    assert error.peak_rss_bytes is not None
    assert error.peak_rss_bytes > 1_000_000
    if how == "SIGSEGV":
        assert "Segmentation fault" in error.crash_traceback
        line = source_line("        bodies.crash_in_c()")
        assert f'"{APP}", line {line} in die_here' in str(error)
    else:
        assert error.crash_traceback == ""
    running.worker.wait_for_log(rf"Task isolated\.die_here\[{result.id}\] raised unexpected: Child")


def test_errbacks_hear_of_a_lost_child_once(running: Combination, tmp_path: Path) -> None:
    path = tmp_path / "errbacks"
    errback = running.worker.app.signature("isolated.errback", kwargs={"path": str(path)})
    result = running.send("run", "kill_myself", 9, link_error=errback)

    with pytest.raises(ChildLostError):
        result.get(timeout=TIMEOUT)

    # The main process has dealt with it by the time that it has dealt with the next.
    running.worker.wait_for_log(rf"\[{result.id}\] raised unexpected")
    running.get("run", "ids")
    assert path.read_text() == "ChildLostError\n"


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("MemoryError", OutOfMemoryError),
        ("SystemExit", RemoteError),
        ("KeyboardInterrupt", RemoteError),
    ],
)
def test_what_would_end_the_worker_only_fails_the_call(
    running: Combination, name: str, error: type[Exception]
) -> None:
    slot = running.slot()
    result = running.call("end_with", name)

    with pytest.raises(error, match=name):
        result.get(timeout=TIMEOUT)

    assert "    raise ENDS[name]" in result.traceback
    assert running.slot() == slot
    assert running.get("run", "ids")["parent"] == running.forkserver


# ── self ────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_sees_the_request_that_a_plain_one_sees(running: Combination) -> None:
    result = running.send("describe", headers={"trace": "abc"})
    seen = result.get(timeout=TIMEOUT)
    plain = running.send("plain_describe", headers={"trace": "abc"})
    plain_seen = plain.get(timeout=TIMEOUT)

    assert seen["id"] == seen["root_id"] == result.id
    assert plain_seen["id"] == plain_seen["root_id"] == plain.id
    assert seen["trace"] == "abc"
    assert seen["hostname"] == running.worker.name
    assert seen["routing_key"] == running.worker.app.conf.task_default_queue
    assert seen["app"] == "isolated"
    assert seen["threads"] is True  # also where slots are threads: a child has the main one only
    for of_one in ("id", "root_id", "threads"):
        del seen[of_one], plain_seen[of_one]
    assert seen == plain_seen


def test_a_retry_counts_and_keeps_its_headers(running: Combination) -> None:
    seen = running.send("retry_until", 2, headers={"trace": "abc"}).get(timeout=TIMEOUT)

    assert seen["retries"] == 2
    assert seen["trace"] == "abc"
    assert "isolated_tasks" not in str(seen["headers"])


def test_a_task_is_retried_by_itself(running: Combination, tmp_path: Path) -> None:
    assert running.get("retried_by_itself", str(tmp_path / "begun")) == 3


@pytest.mark.parametrize("and_fail", [False, True])
def test_a_task_that_a_body_sends_is_its_child(
    running: Combination, mailbox: Mailbox, and_fail: bool
) -> None:
    result = running.call("launch", mailbox.path, and_fail=and_fail)

    child, parent, root = mailbox.read()

    assert parent == root == result.id
    assert result.get(timeout=TIMEOUT, propagate=False) is not None
    assert [one.id for one in result.children] == [child]


def test_a_body_may_wait_for_another_task_where_a_plain_one_may(
    running: Combination, mailbox: Mailbox
) -> None:
    refused = running.get("plain_describe")["join_will_block"]
    result = running.call("get_within", mailbox.path)

    if refused:
        with pytest.raises(RuntimeError, match=r"Never call result\.get"):
            result.get(timeout=TIMEOUT)
    else:
        assert result.get(timeout=TIMEOUT) == "the other's result"
    mailbox.read()  # the task that it sent


def test_an_isolated_task_called_in_a_body_runs_there(running: Combination) -> None:
    assert len(set(running.get("recurse", 3))) == 1
    assert len(set(running.get("call_another"))) == 1


# ── logging ─────────────────────────────────────────────────────────────────────────────────────


def test_a_body_logs_as_a_plain_one_does(running: Combination) -> None:
    def entries(task: str) -> list[str]:
        word = f"word-{os.urandom(4).hex()}"
        result = running.call(task, word)
        running.worker.wait_for_log(rf"{task}\[{result.id}\] succeeded", TIMEOUT)
        return [
            re.sub(r"^\[[\d ,:-]+:", "[TIME:", entry)
            .replace(word, "WORD")
            .replace(result.id, "ID")
            .replace(f"isolated.{task}[", "TASK[")
            for entry in running.log_entries()
            if word in entry
        ]

    isolated, plain = entries("talk"), entries("plain_talk")

    assert len(isolated) == 4
    assert all(entry.startswith("[TIME: ") for entry in isolated)
    assert isolated[0].endswith(" TASK[ID]: WORD: by a task logger\n")
    assert isolated == plain


# ── many items, many calls ──────────────────────────────────────────────────────────────────────


def pids(items: list[dict[str, Any]]) -> list[int]:
    return [item["pid"] for item in items]


def assert_in_pairs(pids: list[int]) -> None:
    """The batch size of the task is 2."""
    assert [pids[i] == pids[i + 1] for i in range(0, len(pids), 2)] == [True] * (len(pids) // 2)
    assert len(set(pids)) == len(pids) // 2


@pytest.mark.parametrize("mapper", [xmap, xstarmap])
def test_the_items_of_a_map_run_in_children(running: Combination, mapper: Any) -> None:
    app = running.worker.app
    items = list(range(4)) if mapper is xmap else [(number,) for number in range(4)]

    mapped = mapper(app.signature("isolated.where"), items, app=app).apply_async()
    seen = mapped.get(timeout=TIMEOUT)
    plain = mapper(app.signature("isolated.plain_where"), items, app=app).apply_async()
    plain_seen = plain.get(timeout=TIMEOUT)

    assert_in_pairs(pids(seen))
    assert {item["parent"] for item in seen} == {running.forkserver}
    for of_one in ("pid", "parent"):
        for item in (*seen, *plain_seen):
            del item[of_one]
    assert seen == plain_seen


def test_chunks_run_in_children(running: Combination) -> None:
    app = running.worker.app
    items = [(number,) for number in range(8)]

    group = chunks(app.signature("isolated.where"), items, 4, app=app).apply_async()
    parts = [result.get(timeout=TIMEOUT) for result in group.results]

    assert [item["item"] for part in parts for item in part] == list(range(8))
    for part in parts:
        assert_in_pairs(pids(part))
    assert {item["parent"] for part in parts for item in part} == {running.forkserver}
    assert len({item["pid"] for part in parts for item in part}) == 4


def test_a_batch_process_serves_as_many_calls_as_it_says(running: Combination) -> None:
    pids = [running.get("run_in_batch", "ids")["pid"] for _ in range(7)]

    assert pids == [pids[0]] * 3 + [pids[3]] * 3 + [pids[6]]
    assert len(set(pids)) == 3
    # That the last one is idle now is no reason not to serve others, nor to stay.
    assert running.get("run", "ids")["pid"] not in pids


def test_a_call_that_kills_its_batch_process_fails_alone(running: Combination) -> None:
    first = running.get("run_in_batch", "ids")["pid"]
    with pytest.raises(ChildLostError) as caught:
        running.get("run_in_batch", "kill_myself", 9)

    assert caught.value.pid == first
    assert running.get("run_in_batch", "ids")["pid"] != first


# ── at the same time ────────────────────────────────────────────────────────────────────────────


@in_concurrent_pools
def test_a_plain_task_runs_while_an_isolated_body_is_busy(
    running: Combination, mailbox: Mailbox, word: Word
) -> None:
    busy = running.call("run", "report_and_wait", mailbox.path, word.path)
    mailbox.read()

    assert running.get("plain_run", "echo", 1) == [[1], {}]

    assert not busy.ready()
    word.give("done")
    assert busy.get(timeout=TIMEOUT)[1] == "done"


@in_concurrent_pools
def test_isolated_bodies_run_at_the_same_time(running: Combination, fifo: str) -> None:
    bodies = [running.call("run", "meet", fifo, number) for number in (0, 1)]

    assert len({body.get(timeout=TIMEOUT) for body in bodies}) == 2


WAYS: dict[str, tuple[Any, ...]] = {
    "Pool-fork": ("meet_in_a_pool", "fork"),
    "Pool-spawn": ("meet_in_a_pool", "spawn"),
    "Pool-forkserver": ("meet_in_a_pool", "forkserver"),
    "ProcessPoolExecutor": ("meet_in_an_executor", None),
    "joblib": ("meet_in_joblib",),
}


@in_each_pool
@pytest.mark.parametrize("way", WAYS)
def test_a_body_has_processes_of_its_own_that_run_at_the_same_time(
    running: Combination, fifo: str, way: str
) -> None:
    first, second = running.get("run", *WAYS[way], fifo)

    assert first != second
    assert running.slot() not in (first, second)
