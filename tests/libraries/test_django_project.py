"""The project in examples/django_project, on a real database: models, transactions, connections.

The database is a new one on the PostgreSQL of $DATABASE_URL, else of this machine; where there is
none it is SQLite, and what only a server can tell is skipped.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.postgresql import Database, new_database
from harness.worker import Worker

TIMEOUT = 30

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "django_project"
APPS = Path(__file__).parent / "apps"
SUPPORT = Path(__file__).parents[1] / "support"

#: In prefork, and in the other pools, whose children come from the same forkserver.
CALLS = {"prefork": 500, "threads": 100, "gevent": 100}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """An empty one, with the project's tables."""
    with new_database(tmp_path_factory.mktemp("database")) as database:
        manage(database, "project.settings", "migrate", "-v", "0")
        yield database


@pytest.fixture
def server(database: Database) -> Database:
    """A database that has a server, to ask it who is connected."""
    if not database.has_server:
        pytest.skip("no PostgreSQL, and SQLite has no connections to count")
    return database


def manage(
    database: Database, settings: str, *arguments: str, env: Mapping[str, str] | None = None
) -> str:
    ran = subprocess.run(
        [sys.executable, str(PROJECT / "manage.py"), *arguments],
        env={
            **os.environ,
            **variables(database),
            "DJANGO_SETTINGS_MODULE": settings,
            **(env or {}),
        },
        # Celery puts the current directory first in the path: in the repository's root that is not
        # the installed wheel.
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return ran.stdout


def variables(database: Database) -> dict[str, str]:
    return {
        "DATABASE_URL": database.url,
        "PYTHONPATH": os.pathsep.join(
            [str(one) for one in (PROJECT, APPS, SUPPORT)]
            + list(filter(None, [os.environ.get("PYTHONPATH")]))
        ),
    }


class Project:
    """A worker of the project."""

    def __init__(
        self, workplace: Any, database: Database, pool: str, module: str = "project"
    ) -> None:
        self.database = database
        self.workplace = workplace
        workplace.path = [APPS, PROJECT, SUPPORT]
        self.worker: Worker = workplace.start(
            module,
            pool=pool,
            concurrency=3,
            env={"DATABASE_URL": database.url, "DJANGO_SETTINGS_MODULE": "probed_settings"},
        )

    def get(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.worker.call(task, *args, **kwargs).get(timeout=TIMEOUT)

    def manage(self, *arguments: str) -> str:
        env = {**self.workplace.settings().environ(), "FOLDER": str(self.workplace.folder)}
        return manage(self.database, "probed_settings", *arguments, env=env)


OpenWorkplace = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module", params=["prefork", "threads", "gevent"])
def project(
    request: pytest.FixtureRequest, open_workplace: OpenWorkplace, database: Database
) -> Iterator[Project]:
    with open_workplace() as workplace:
        yield Project(workplace, database, request.param)


def eventually(look: Callable[[], Any]) -> Any:
    """A server ends what serves a connection some time after that is closed, and tells nobody."""
    deadline = time.monotonic() + TIMEOUT
    tick = threading.Event()
    while not (found := look()) and time.monotonic() < deadline:
        tick.wait(0.02)
    return found


# ── connections ─────────────────────────────────────────────────────────────────────────────────


def test_what_is_connected_at_import_is_closed_in_worker_and_forkserver(
    project: Project, server: Database
) -> None:
    project.worker.wait_for_log(r"forkserver pid=\d+ loaded app project")

    assert server.connections() == []
    assert "thread(s) running" not in project.worker.log()
    assert "socket(s) open" not in project.worker.log()


@pytest.mark.timeout(180)
def test_many_calls_leave_no_connection_and_no_two_processes_share_one(
    project: Project, server: Database
) -> None:
    calls = CALLS[project.worker.pool]
    sent = [
        project.worker.call("probes.tasks.connect", look=number % 25 == 0)
        for number in range(calls)
    ]
    told = [one.get(timeout=120) for one in sent]

    assert len({one["pid"] for one in told}) == calls
    # The server has given each process a connection of its own, and so has the kernel.
    assert len({tuple(one["at server"]) for one in told}) == calls
    assert len({one["socket"] for one in told}) == calls
    assert all(one["holders"] == [one["pid"]] for one in told)
    assert eventually(lambda: server.connections() == []), server.connections()


@pytest.mark.parametrize(
    ("alias", "connections"), [("default", 3), ("a minute", 1), ("for ever", 1), ("pooled", 1)]
)
def test_a_connection_lives_as_long_as_conn_max_age_says(
    project: Project, server: Database, alias: str, connections: int
) -> None:
    told = in_a_batch(project, "probes.tasks.connect_in_batch", alias)

    assert len({tuple(one["at server"]) for one in told}) == connections
    assert all(one["holders"] == [one["pid"]] for one in told)
    # The batch is over, and its process has closed what it had.
    assert eventually(lambda: server.connections() == []), server.connections()
    assert "serves no further call" not in project.worker.log()


@pytest.mark.parametrize("alias", ["default", "a minute", "for ever"])
def test_a_transaction_that_a_body_leaves_open_does_not_meet_the_next_of_the_batch(
    project: Project, server: Database, alias: str
) -> None:
    told = in_a_batch(project, "probes.tasks.leave_open", alias, pid=lambda one: one[0])

    assert [before for _, before in told] == [0, 0, 0]
    assert eventually(lambda: server.connections() == []), server.connections()


def in_a_batch(
    project: Project, task: str, *args: Any, pid: Callable[[Any], int] = lambda one: one["pid"]
) -> list[Any]:
    """Three calls that one process has served, which is its whole batch.

    Each of three slots may have a process that waits for its next call.
    """
    served: dict[int, list[Any]] = {}
    unfinished = True
    while unfinished:
        one = project.get(task, *args)
        served.setdefault(pid(one), []).append(one)
        unfinished = any(len(calls) < 3 for calls in served.values())
    return next(iter(served.values()))


# ── models, transactions ────────────────────────────────────────────────────────────────────────


def test_a_command_sends_its_tasks_when_it_commits(project: Project, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.txt", "two.txt")]
    for length, file in enumerate(files, 1):
        file.write_text("word " * length)

    printed = project.manage("add_documents", *map(str, files))

    assert "one.txt: 1 words\ntwo.txt: 2 words\n" in printed


def test_a_body_changes_what_is_stored(project: Project) -> None:
    document, _, _ = project.get("probes.tasks.add", "some text", True)

    assert project.get("probes.tasks.change", document) == "ADDED"


def test_a_body_sends_tasks_when_it_commits_and_none_if_it_does_not(project: Project) -> None:
    lost, waiting, _ = project.get("probes.tasks.add", "rolled back", False)
    assert waiting == [True]
    found, waiting, still_waiting = project.get("probes.tasks.add", "three words here", True)
    assert (waiting, still_waiting) == ([True], False)

    project.worker.wait_for_log(r"documents\.tasks\.count_words\[\S+\] succeeded.*: 3", TIMEOUT)
    project.worker.wait_for_log(r"probes\.tasks\.again\[\S+\] succeeded.*: 3", TIMEOUT)
    assert (lost, found) != (None, None)
    # Had one been sent for what was rolled back, it would have found no such document.
    assert "DoesNotExist" not in project.worker.log()


# ── set-up ──────────────────────────────────────────────────────────────────────────────────────


def test_tasks_are_found_by_autodiscovery_in_worker_and_child(project: Project) -> None:
    registered = project.worker.app.control.inspect(
        destination=[project.worker.name], timeout=TIMEOUT
    ).registered()

    assert {"documents.tasks.count_words", "probes.tasks.change"} <= {
        name.partition(" ")[0] for name in registered[project.worker.name]
    }
    assert "unknown" not in project.worker.log()


def test_settings_and_logging_have_the_effect_that_they_have_in_the_worker(
    project: Project,
) -> None:
    log = project.workplace.folder / "documents.log"
    before = lines(log)
    in_the_worker = project.get("probes.tasks.say_plain")
    of_the_worker = lines(log)[len(before) :]
    in_a_child = project.get("probes.tasks.say_isolated")
    of_a_child = lines(log)[len(before) + len(of_the_worker) :]

    assert in_a_child == in_the_worker
    assert of_a_child == of_the_worker == ["INFO documents.probes: a body: to be seen"]
    # The logger does not propagate, so Celery's log has none of it.
    assert "to be seen" not in project.worker.log()


def lines(path: Path) -> list[str]:
    """Of the probes alone: tasks of tests before this one may still be at it."""
    return [line for line in path.read_text().splitlines() if "probes" in line]


def test_models_are_ready_in_a_spawned_process(project: Project) -> None:
    ready, count, pid = project.get("probes.tasks.count_when_spawned")

    assert ready is True
    assert count == project.get("probes.tasks.count_plainly")
    assert pid != project.worker.pid


@pytest.mark.parametrize("module", ["django_script.py", "django_broken"])
def test_models_are_ready_for_tasks_that_come_by_value(
    workplace: Any, database: Database, module: str
) -> None:
    project = Project(workplace, database, "threads", module)
    name = module.removesuffix(".py")

    ready, count, pid = project.get(f"{name}.count")

    assert (ready, pid == project.worker.pid) == (True, False)
    if module == "django_script.py":
        assert project.get(f"{name}.count_when_spawned")[:2] == [True, count]
    assert "AppRegistryNotReady" not in project.worker.log()


# ── without a worker ────────────────────────────────────────────────────────────────────────────


def test_an_isolated_task_has_what_django_adds_without_a_class_of_the_project_s_own(
    database: Database,
) -> None:
    script = """
import json
from documents.tasks import count_words, most_common
from celery.contrib.django.task import DjangoTask
print(json.dumps([hasattr(task, name) for task in (count_words, most_common)
                  for name in ("delay_on_commit", "apply_async_on_commit")]))
"""
    ran = manage(database, "project.settings", "shell", "-v", "0", "-c", script)

    assert json.loads(re.findall(r"\[.*\]", ran)[0]) == [True] * 4


def test_a_view_sends_its_task_when_its_transaction_commits(project: Project) -> None:
    script = """
from django.test import Client
answer = Client().post("/documents/", {"title": "posted", "text": "a b c d e f g"})
print(answer.status_code)
"""

    assert "200" in project.manage("shell", "-v", "0", "-c", script)
    project.worker.wait_for_log(r"documents\.tasks\.count_words\[\S+\] succeeded.*: 7", TIMEOUT)
