"""Where a body runs if no worker calls it, or if it is not to be isolated."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.canvas import xmap

from harness import marks
from harness.processes import PATIENCE, survivors
from harness.worker import Worker
from isolated_tasks import IsolatedTask

StartWorker = Callable[..., Worker]
#: The class is in conftest.py, which nothing can import.
Workplace = Any

APPS = Path(__file__).parent / "apps"
SUPPORT = Path(__file__).parent.parent / "support"

TIMEOUT = 30


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("test", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        yield app


# ── without a worker ────────────────────────────────────────────────────────────────────────────


def test_without_a_worker_a_task_runs_where_it_is_called(app: Celery) -> None:
    @app.task(base=IsolatedTask, batch_size=3)
    def pid() -> int:
        return os.getpid()

    assert pid() == os.getpid()
    assert pid.apply().get() == os.getpid()
    app.conf.task_always_eager = True
    assert pid.delay().get() == os.getpid()


def run_script(name: str, *args: str, workplace: Workplace) -> tuple[int, Any, str]:
    """Run a script of apps/; return its exit code, what it says, and its stderr.

    Nothing that it has started may be left.
    """
    settings = workplace.settings(broker="redis", backend="redis", conf={})
    mark = f"script-{os.urandom(6).hex()}"
    path = [str(APPS), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **settings.environ(),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TMPDIR": str(workplace.temporary),
        marks.VARIABLE: mark,
    }
    ran = subprocess.run(
        [sys.executable, str(APPS / name), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert marks.wait(marks.marked_processes(mark), timeout=PATIENCE) == []
    assert ran.stdout, ran.stderr
    return ran.returncode, json.loads(ran.stdout), ran.stderr


@pytest.mark.fault(36)
@pytest.mark.parametrize(("end", "exit_code"), [("returning", 0), ("raising", 1), ("killed", -9)])
def test_eager_calls_are_isolated_if_they_shall_be(
    workplace: Workplace, end: str, exit_code: int
) -> None:
    ended, seen, _ = run_script("eager.py", end, workplace=workplace)

    assert ended == exit_code
    own = seen["self"]
    assert seen["function"]["pid"] == own
    assert seen["never"]["pid"] == own
    forkserver = seen["apply"]["parent"]
    assert forkserver not in (own, seen["function"]["parent"])
    for how in ("apply", "always eager"):
        assert seen[how]["pid"] not in (own, forkserver)
        assert seen[how]["parent"] == forkserver
    assert len(set(seen["nested"])) == 1
    assert own not in seen["nested"]
    assert seen["retry"][0] == 2
    assert seen["retry"][1] != own
    assert len({*seen["map"], own}) == 3
    assert seen["script"][0] == 21
    assert seen["script"][1] != own
    # A forkserver of its own, which nothing has outlived; the fixture looks for its files.
    assert survivors([forkserver]) == set()


def test_failures_of_isolated_eager_calls_are_those_of_a_worker(workplace: Workplace) -> None:
    _, seen, _ = run_script("eager.py", "returning", workplace=workplace)

    error, traceback = seen["failure"]
    assert error == "LookupError('in vain')"
    assert '    raise LookupError("in vain")' in traceback
    name, text = seen["refused"]
    assert name == "UnpicklableError"
    assert 'args[1]["conn"][0] of type _thread.lock cannot be pickled' in text


def test_a_worker_of_celerys_own_test_tools_isolates(workplace: Workplace) -> None:
    exit_code, seen, stderr = run_script("contrib.py", workplace=workplace)

    assert exit_code == 0, stderr
    assert len(seen) == 2
    for own, plain, isolated in seen:
        assert plain["pid"] == own
        assert isolated["pid"] != own
        assert isolated["parent"] not in (own, plain["parent"])


# ── in a worker ─────────────────────────────────────────────────────────────────────────────────


def where(running: Worker, task: str) -> str:
    """In which process a task runs."""
    ids = running.call(f"in_place.{task}").get(timeout=TIMEOUT)
    slot = running.call("in_place.plain").get(timeout=TIMEOUT)
    return "slot" if ids["pid"] == slot["pid"] else "child"


def test_a_task_can_be_excepted(worker: StartWorker) -> None:
    running = worker("in_place")

    places = {task: where(running, task) for task in ("unsaid", "never", "always")}

    assert places == {"unsaid": "child", "never": "slot", "always": "child"}


def test_isolation_can_be_off_for_all_that_do_not_ask_for_it(worker: StartWorker) -> None:
    running = worker("in_place", conf={"isolated_enabled": False})

    places = {task: where(running, task) for task in ("unsaid", "never", "always")}

    assert places == {"unsaid": "slot", "never": "slot", "always": "child"}


def test_where_nothing_is_isolated_there_is_no_forkserver(worker: StartWorker) -> None:
    conf = {
        "isolated_enabled": False,
        "task_annotations": {"in_place.always": {"isolated": False}},
    }
    running = worker("in_place", conf=conf)

    assert where(running, "always") == "slot"
    assert len(running.tree()) == 2
    assert "forkserver" not in running.log()


def test_a_task_in_place_behaves_as_a_plain_one(worker: StartWorker) -> None:
    running = worker("in_place", conf={"isolated_enabled": False})
    slot = running.call("in_place.plain").get(timeout=TIMEOUT)["pid"]

    assert running.call("in_place.retry_until", 2).get(timeout=TIMEOUT) == [2, slot]


def test_celerys_own_tasks_are_not_isolated_with_the_others(worker: StartWorker) -> None:
    running = worker("task_cls")
    app = running.app
    slot = running.call("task_cls.pid_of_the_slot").get(timeout=TIMEOUT)

    assert running.call("task_cls.pid").get(timeout=TIMEOUT) != slot
    # celery.map itself calls what is not isolated.
    mapped = xmap(app.signature("task_cls.pid_of_the_slot"), [1, 2], app=app).apply_async()
    assert mapped.get(timeout=TIMEOUT) == [slot, slot]
    mapped = xmap(app.signature("task_cls.pid"), [1, 2], app=app).apply_async()
    assert slot not in mapped.get(timeout=TIMEOUT)
