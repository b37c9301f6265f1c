"""Tasks that no other process can import: of a script, of a factory, of a broken module."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery import chain

from harness.processes import Mailbox
from harness.worker import Worker

TIMEOUT = 30

StartWorker = Callable[..., Worker]

#: Things travel between the tasks of the script.
PICKLE = {
    "task_serializer": "pickle",
    "result_serializer": "pickle",
    "accept_content": ["json", "pickle"],
}


@pytest.fixture(scope="module", params=["prefork", "threads"])
def script(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        worker = workplace.start("script.py", pool=request.param, conf=PICKLE)
        yield worker
        assert worker.stop() == 0


def get(worker: Worker, task: str, *args: Any) -> Any:
    return worker.call(task, *args).get(timeout=TIMEOUT)


def forkserver(worker: Worker) -> int:
    return int(worker.wait_for_log(r"forkserver pid=(\d+) loaded")[1])


# ── a script ────────────────────────────────────────────────────────────────────────────────────


def test_a_scripts_app_is_rebuilt_in_the_forkserver(script: Worker) -> None:
    script.wait_for_log(r"forkserver pid=\d+ loaded app script \(rebuilt\)")
    assert "Traceback" not in script.log()


def test_a_body_uses_helpers_and_globals_of_its_script(script: Worker) -> None:
    text, pid, parent = get(script, "script.use_helpers", "en")

    assert text == "hello WORLD"
    assert parent == forkserver(script)
    assert pid not in (parent, script.pid, get(script, "script.slot_pid"))


def test_a_body_of_a_script_is_spawned(script: Worker) -> None:
    text, pid, _ = get(script, "script.use_helpers_when_spawned", "en")

    assert text == "hello WORLD"
    assert pid not in (script.pid, get(script, "script.slot_pid"))


def test_a_batch_process_takes_a_task_in_once(script: Worker) -> None:
    calls = [get(script, "script.use_helpers_in_batch", "en") for _ in range(4)]

    assert [text for text, _, _ in calls] == ["hello WORLD"] * 4
    pids = [pid for _, pid, _ in calls]
    assert pids == [pids[0]] * 3 + [pids[3]]
    assert pids[3] != pids[0]


def test_a_bound_body_sees_its_task_and_app(script: Worker) -> None:
    result = script.call("script.bound")

    seen = result.get(timeout=TIMEOUT)

    assert seen["id"] == result.id
    assert seen["name"] == "script.bound"
    assert seen["same"]
    assert seen["app"] == ["script", True, script.app.conf.task_default_queue]


def test_tasks_that_refer_to_each_other_send_each_other(script: Worker, mailbox: Mailbox) -> None:
    assert get(script, "script.ping", mailbox.path, 3) == "ping"

    heard = sorted(mailbox.read() for _ in range(4))
    assert heard == [["ping", 1], ["ping", 3], ["pong", 0], ["pong", 2]]


def test_a_task_of_a_script_retries_itself(script: Worker, tmp_path: Path) -> None:
    assert get(script, "script.retry_until", 2) == 2
    assert get(script, "script.retried_by_itself", str(tmp_path / "begun")) == 3


def test_a_task_of_a_script_calls_itself_in_place(script: Worker) -> None:
    pids = get(script, "script.recurse", 3)

    assert len(pids) == 4
    assert len(set(pids)) == 1


@pytest.mark.parametrize("last", ["look_at_thing", "look_at_thing_in_the_slot"])
def test_objects_of_a_scripts_class_are_arguments_and_results(script: Worker, last: str) -> None:
    app = script.app
    made = chain(
        app.signature("script.make_thing", (1,)),
        app.signature("script.grow_thing"),
        app.signature(f"script.{last}"),
        app=app,
    ).apply_async()

    assert made.get(timeout=TIMEOUT) == [True, 2, True]


def test_an_exception_of_a_script_is_its_own(script: Worker) -> None:
    result = script.call("script.be_in_trouble")

    # Celery knows it by its class: one of the task's `throws`.
    script.wait_for_log(
        rf"be_in_trouble\[{result.id}\] raised expected: Trouble\('as expected', 3\)", TIMEOUT
    )


def test_a_task_class_calls_super(script: Worker, tmp_path: Path) -> None:
    path = tmp_path / "started"

    text, made, pid = get(script, "script.loud", "Hey", str(path))

    assert text == "HEY!"
    assert made
    # Celery's handlers of a task stay in the worker.
    assert path.read_text() == f"{get(script, 'script.slot_pid')}\n"
    assert pid != int(path.read_text())


# ── a factory ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_tasks_of_a_factory_run_in_children(worker: StartWorker, pool: str) -> None:
    running = worker("factory_made", pool=pool)

    thrice, first = get(running, "factory_made.times_3", 5)
    four_times, second = get(running, "factory_made.times_4", 5)

    assert (thrice, four_times) == ("15 apples", "20 apples")
    assert len({first, second, running.pid, forkserver(running)}) == 4


def test_a_task_of_a_factory_calls_another_one(worker: StartWorker) -> None:
    [inner, inner_pid], outer_pid = get(worker("factory_made"), "factory_made.call_another", 2)

    assert inner == "6 apples"
    assert inner_pid == outer_pid


# ── an app that the forkserver cannot import ────────────────────────────────────────────────────


@pytest.fixture
def imported_once(worker: StartWorker, tmp_path: Path) -> Worker:
    return worker("imported_once", env={"MARKER": str(tmp_path / "marker")})


def test_a_forkserver_that_cannot_import_the_app_says_why(imported_once: Worker) -> None:
    entry = imported_once.wait_for_log(
        r"(?s)forkserver pid=\d+ failed to load app imported_once:app:\n"
        r"Traceback \(most recent call last\):\n.*?\nFileExistsError: [^\n]*marker"
    )

    path = Path(__file__).parent / "apps" / "imported_once.py"
    assert re.search(rf'File "{re.escape(str(path))}", line \d+, in <module>', entry[0])


def test_tasks_run_in_children_though_their_app_was_not_imported(imported_once: Worker) -> None:
    number, pid, parent = get(imported_once, "imported_once.add_one", 1)

    assert number == 2
    assert parent == forkserver(imported_once)
    assert pid != imported_once.pid

    # The body's app is the worker's: what it sends comes to this worker, and so does the result.
    sent = get(imported_once, "imported_once.pass_on", 7)
    assert imported_once.app.AsyncResult(sent).get(timeout=TIMEOUT)[0] == 8


def test_threads_of_a_body_find_its_app_though_that_was_not_imported(imported_once: Worker) -> None:
    queue = get(imported_once, "imported_once.queue_of_a_thread")

    assert queue == imported_once.app.conf.task_default_queue


def test_a_body_that_needs_what_cannot_be_imported_fails_as_the_import_does(
    imported_once: Worker,
) -> None:
    with pytest.raises(FileExistsError):
        get(imported_once, "imported_once.add_one_by_a_helper", 1)
