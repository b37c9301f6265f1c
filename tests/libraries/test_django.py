"""Django: results in its database, connections, and what is activated around a task."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 30

APPS = Path(__file__).parent / "apps"


class Project:
    """A worker whose results go to the database of a Django project."""

    def __init__(self, workplace: Any, pool: str) -> None:
        self.database = workplace.folder / "db.sqlite3"
        self._migrate(workplace)
        # The caller has no Django, and need not read results.
        client = workplace.app(workplace.settings())
        self.worker = workplace.start("django_tasks", pool=pool, backend="django-db", app=client)

    def result(self, task: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a task; return the row of its result."""
        sent = self.worker.app.send_task(f"django_tasks.{task}", args, kwargs)
        self.worker.wait_for_log(rf"{re.escape(sent.id)}\] (succeeded|raised)", TIMEOUT)
        with closing(sqlite3.connect(self.database)) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute(
                "select * from django_celery_results_taskresult where task_id = ?", (sent.id,)
            ).fetchall()
        assert len(rows) == 1
        return dict(rows[0])

    def get(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return json.loads(self.result(task, *args, **kwargs)["result"])

    def _migrate(self, workplace: Any) -> None:
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "-v", "0"],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "django_settings",
                "FOLDER": str(workplace.folder),
                "PYTHONPATH": os.pathsep.join([str(APPS), os.environ.get("PYTHONPATH", "")]),
            },
            check=True,
            timeout=60,
        )


@pytest.fixture(scope="module", params=["prefork", "threads"])
def project(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Project]:
    with open_workplace() as workplace:
        yield Project(workplace, request.param)


def test_a_result_is_stored_with_all_that_is_known_of_the_call(project: Project) -> None:
    row = project.result("add", 2, y=3)

    assert (row["status"], row["result"]) == ("SUCCESS", "5")
    assert row["task_name"] == "django_tasks.add"
    assert json.loads(row["task_args"]) == "(2,)"
    assert json.loads(row["task_kwargs"]) == "{'y': 3}"
    assert row["worker"] == project.worker.name


def test_a_failure_is_stored_with_the_frames_of_the_body(project: Project) -> None:
    row = project.result("fail")

    assert row["status"] == "FAILURE"
    assert json.loads(row["result"])["exc_type"] == "KeyError"
    assert re.search(r'File ".*django_tasks\.py", line \d+, in fail', row["traceback"])


def test_a_body_has_no_connection_of_the_process_that_it_was_forked_from(
    project: Project,
) -> None:
    first, second = project.get("ask"), project.get("ask")

    assert first["pid"] == second["pid"]
    assert first["connected at import in"] not in (None, first["pid"])
    assert first["inherited"] == [False]


def test_an_active_language_and_time_zone_are_those_of_the_slot(project: Project) -> None:
    in_german = ["de", "Europe/Vienna"]
    assert project.get("plain_preferences", user="Ada") == in_german

    first = project.get("preferences", user="Ada")
    project.result("forget")
    second = project.get("preferences")

    assert first[:2] == in_german
    assert second[:2] == ["en", "UTC"]
    assert first[2] == second[2]
