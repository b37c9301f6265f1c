"""``celery inspect isolated``: what workers say of their forkservers and children."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.result import AsyncResult

from harness.processes import Mailbox, Word, stopped, survivors
from harness.watching import celery, inspect, inspect_until
from harness.worker import Worker

StartWorker = Callable[..., Worker]
#: The class is in conftest.py, which nothing can import.
Workplace = Any

TIMEOUT = 30
MIB = 1 << 20

#: Whose bodies can be waited for while the worker answers.
POOLS = ("prefork", "threads", "gevent")


class Calls:
    """Calls whose bodies say that they run, and wait for a word."""

    def __init__(self, worker: Worker, mailbox: Mailbox, folder: Path) -> None:
        self.worker = worker
        self._mailbox = mailbox
        self._folder = folder
        self._open: list[tuple[AsyncResult, Word]] = []

    def send(self, task: str) -> AsyncResult:
        """Send one, whose body may have to wait before it begins."""
        word = Word(self._folder)
        arguments = (self._mailbox.path, word.path)
        result = self.worker.call(f"isolated.{task}", "report_and_wait", *arguments)
        self._open.append((result, word))
        return result

    def pid(self) -> int:
        """The process of the next body that begins."""
        pid: int = self._mailbox.read()[0]
        return pid

    def run(self, task: str) -> tuple[AsyncResult, int]:
        """Send one, and wait until its body runs."""
        return self.send(task), self.pid()

    def finish(self) -> None:
        """Have all bodies return, in this order."""
        while self._open:
            result, word = self._open.pop(0)
            word.give("well")
            assert result.get(timeout=TIMEOUT)[1] == "well"


def told_of(answer: dict[str, Any], pid: int) -> dict[str, Any]:
    """What is said of a child."""
    (child,) = (child for child in answer["children"] if child["pid"] == pid)
    return dict(child)


@pytest.fixture
def calls(mailbox: Mailbox, tmp_path: Path) -> Callable[[Worker], Calls]:
    return lambda worker: Calls(worker, mailbox, tmp_path)


@pytest.mark.parametrize("pool", POOLS)
def test_a_child_is_told_with_its_task_id_age_and_memory(
    worker: StartWorker, calls: Callable[[Worker], Calls], pool: str
) -> None:
    running = worker("isolated", pool=pool, concurrency=2)
    forkserver = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    here = calls(running)
    before = time.monotonic()
    result, pid = here.run("run")

    answer = inspect(running)

    child = told_of(answer, pid)
    assert (child["task"], child["id"]) == ("isolated.run", result.id)
    assert (child["state"], child["position"], child["batch_size"]) == ("running", 1, 1)
    assert child["memory_limit_bytes"] is None
    assert child["forkserver"] == forkserver
    assert 0 <= child["call_seconds"] <= child["seconds"] <= time.monotonic() - before
    # It waits, so that nothing changes meanwhile.
    assert abs(child["rss_bytes"] - psutil.Process(pid).memory_info().rss) < MIB
    assert [one["pid"] for one in answer["children"]] == [pid]
    assert (answer["waiting"], answer["problems"]) == ([], [])
    assert answer["pid"] == running.pid
    here.finish()


def test_a_forkserver_is_told_with_what_it_has_loaded_and_done(
    worker: StartWorker, calls: Callable[[Worker], Calls]
) -> None:
    running = worker("isolated", conf={"isolated_preload": ["fractions", "nonesuch"]})
    pid = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    here = calls(running)
    _, child = here.run("run")

    (one,) = inspect(running)["forkservers"]

    assert (one["pid"], one["state"], one["reason"]) == (pid, "serving", None)
    assert one["rss_bytes"] > MIB
    assert [entry["name"] for entry in one["preloaded"]] == [
        "app isolated:app",
        "fractions",
        "nonesuch",
    ]
    app, module, missing = one["preloaded"]
    assert app["seconds"] > 0
    assert module["error"] is None
    assert missing["error"] == "ModuleNotFoundError: No module named 'nonesuch'"
    assert one["load_seconds"] >= app["seconds"]
    assert one["seconds"] > one["load_seconds"]
    assert (one["starts"], one["failures"]) == (1, 0)

    # One that is killed has failed.
    os.kill(child, signal.SIGKILL)
    assert survivors([child]) == set()
    answer = inspect_until(running, lambda answer: answer["forkservers"][0]["failures"])
    assert (answer["forkservers"][0]["starts"], answer["children"]) == (1, [])


@pytest.mark.parametrize("pool", POOLS)
def test_the_position_in_a_batch_and_that_it_is_idle(
    worker: StartWorker, calls: Callable[[Worker], Calls], pool: str
) -> None:
    running = worker("isolated", pool=pool)
    here = calls(running)
    first, pid = here.run("run_in_batch")
    child = told_of(inspect(running), pid)
    assert (child["state"], child["position"], child["batch_size"]) == ("running", 1, 3)
    assert child["id"] == first.id

    here.finish()
    child = told_of(inspect(running), pid)
    assert (child["state"], child["position"], child["batch_size"]) == ("idle", 1, 3)
    assert (child["task"], child["id"]) == ("isolated.run_in_batch", None)
    assert child["call_seconds"] is None

    second, again = here.run("run_in_batch")
    assert again == pid
    child = told_of(inspect(running), pid)
    assert (child["state"], child["position"], child["batch_size"]) == ("running", 2, 3)
    assert child["id"] == second.id
    assert child["call_seconds"] < child["seconds"]
    here.finish()


@pytest.mark.parametrize("pool", POOLS)
def test_a_spare_is_told_from_what_runs(
    worker: StartWorker, calls: Callable[[Worker], Calls], pool: str
) -> None:
    running = worker("isolated", pool=pool, conf={"isolated_spares": 1})
    here = calls(running)
    here.run("run")
    here.finish()
    _, pid = here.run("run")

    def spares(answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [child for child in answer["children"] if child["state"] == "spare"]

    (spare,) = spares(inspect_until(running, spares))
    assert (spare["task"], spare["id"], spare["position"]) == ("isolated.run", None, 0)
    assert spare["pid"] != pid
    here.finish()
    third, pid = here.run("run")
    assert pid == spare["pid"]
    child = told_of(inspect(running), pid)
    assert (child["state"], child["id"]) == ("running", third.id)
    here.finish()


@pytest.mark.parametrize("pool", POOLS)
def test_what_waits_for_memory_is_told_with_what_it_needs(
    worker: StartWorker, calls: Callable[[Worker], Calls], pool: str
) -> None:
    limits = {"isolated_memory_limit": "300MiB", "isolated_memory_budget": "400MiB"}
    running = worker("isolated", pool=pool, concurrency=2, conf=limits)
    here = calls(running)
    _, pid = here.run("run")
    second = here.send("run")
    running.wait_for_log(r"waits for memory")

    answer = inspect(running)

    (waiting,) = answer["waiting"]
    assert (waiting["task"], waiting["id"]) == ("isolated.run", second.id)
    assert waiting["needed_bytes"] == 300 * MIB
    assert waiting["seconds"] >= 0
    (forkserver,) = answer["forkservers"]
    assert (forkserver["taken_bytes"], forkserver["budget_bytes"]) == (300 * MIB, 400 * MIB)
    assert told_of(answer, pid)["memory_limit_bytes"] == 300 * MIB
    here.finish()
    assert inspect(running)["waiting"] == []


def test_of_a_fresh_interpreter_what_is_not_known_is_none(
    worker: StartWorker, calls: Callable[[Worker], Calls]
) -> None:
    running = worker("isolated", conf={"isolated_start_method": "spawn"})
    here = calls(running)
    result, pid = here.run("run")
    child = told_of(inspect(running), pid)
    assert (child["task"], child["id"], child["batch_size"]) == ("isolated.run", result.id, 1)
    assert (child["state"], child["position"], child["call_seconds"]) == (None, None, None)
    here.finish()

    # Which of its calls a batch process serves, nobody says.
    _, pid = here.run("run_in_batch")
    child = told_of(inspect(running), pid)
    assert (child["task"], child["id"], child["batch_size"]) == ("isolated.run_in_batch", None, 3)
    here.finish()


@pytest.mark.parametrize("pool", POOLS)
def test_a_forkserver_that_does_not_answer_holds_nobody_up(
    worker: StartWorker, calls: Callable[[Worker], Calls], pool: str
) -> None:
    running = worker("isolated", pool=pool)
    pid = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    here = calls(running)
    _, child = here.run("run")
    # What it has answered once is not to be told again.
    assert told_of(inspect(running), child)

    with stopped(pid):
        first, second = inspect(running), inspect(running)

        for answer in (first, second):
            (problem,) = answer["problems"]
            assert problem.startswith(f"forkserver pid={pid} has not answered for ")
            assert problem.endswith("its children are not listed")
            assert answer["children"] == []
            (forkserver,) = answer["forkservers"]
            assert (forkserver["pid"], forkserver["starts"]) == (pid, None)
            assert forkserver["rss_bytes"] > MIB
        # The body goes on, and the worker takes the next task.
        here.finish()
        assert running.call("isolated.plain_run", "ids").get(timeout=TIMEOUT)["pid"]

    # The one that has ended meanwhile goes as soon as it can be reaped.
    inspect_until(running, lambda answer: not (answer["problems"] or answer["children"]))
    _, child = here.run("run")
    assert told_of(inspect(running), child)["state"] == "running"
    here.finish()


def test_a_forkserver_that_sees_its_children_to_their_end_is_told_too(
    worker: StartWorker, calls: Callable[[Worker], Calls]
) -> None:
    running = worker("isolated", conf={"isolated_forkserver_max_calls": 1})
    first = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    here = calls(running)
    result, pid = here.run("run")

    def is_replaced(answer: dict[str, Any]) -> bool:
        return "retired" in [one["state"] for one in answer["forkservers"]]

    answer = inspect_until(running, is_replaced)

    states = {one["pid"]: one["state"] for one in answer["forkservers"]}
    assert states.pop(first) == "retired"
    assert list(states.values()) == ["serving"]
    (reason,) = (one["reason"] for one in answer["forkservers"] if one["pid"] == first)
    assert reason == "it has started 1 children (isolated_forkserver_max_calls)"
    child = told_of(answer, pid)
    assert (child["forkserver"], child["id"]) == (first, result.id)
    here.finish()


def test_a_child_that_has_outlived_its_forkserver_is_told_as_far_as_it_is_known(
    worker: StartWorker, calls: Callable[[Worker], Calls]
) -> None:
    running = worker("isolated")
    forkserver = int(running.wait_for_log(r"forkserver pid=(\d+) loaded")[1])
    here = calls(running)
    _, pid = here.run("run")

    os.kill(forkserver, signal.SIGKILL)

    answer = inspect_until(running, lambda answer: answer["children"])
    child = told_of(answer, pid)
    assert child["forkserver"] != forkserver
    assert child["rss_bytes"] > MIB
    assert (child["task"], child["id"], child["state"]) == (None, None, None)
    here.finish()


def test_the_program_asks_two_workers_on_one_redis(
    worker: StartWorker, workplace: Workplace, calls: Callable[[Worker], Calls]
) -> None:
    workers = {pool: worker("isolated", pool=pool) for pool in ("prefork", "threads")}
    here = calls(workers["prefork"])
    # One slot each: the second goes to the other one.
    pids = {here.run("run")[1], here.run("run")[1]}

    run = celery(workplace, "isolated", "inspect", "isolated", "--json")

    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert answers.keys() == {one.name for one in workers.values()}
    children = [child for answer in answers.values() for child in answer["children"]]
    assert {child["pid"] for child in children} == pids
    # For people.
    run = celery(workplace, "isolated", "inspect", "isolated")
    assert run.returncode == 0, run.stderr
    assert "2 nodes online." in run.stdout
    assert all(str(pid) in run.stdout for pid in pids)
    here.finish()


def test_a_worker_answers_over_rabbitmq_too(
    worker: StartWorker, workplace: Workplace, calls: Callable[[Worker], Calls]
) -> None:
    running = worker("isolated", broker="amqp", backend="rpc")
    here = calls(running)
    result, pid = here.run("run")

    run = celery(
        workplace, "isolated", "inspect", "isolated", "--json", broker="amqp", backend="rpc"
    )

    assert run.returncode == 0, run.stderr
    child = told_of(json.loads(run.stdout)[running.name], pid)
    assert (child["task"], child["id"]) == ("isolated.run", result.id)
    here.finish()


def test_a_worker_without_isolated_tasks_says_so(worker: StartWorker) -> None:
    answer = inspect(worker("plain"))

    assert (answer["forkservers"], answer["children"], answer["problems"]) == ([], [], [])
