"""isolated_tasks.testing, in the suites of projects: each is a run of pytest of its own."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import marks
from harness.processes import PATIENCE, survivors

pytest_plugins = "pytester"

APPS = Path(__file__).parent / "apps"

#: Not the plugin of pytest-celery, should it be there: its fixtures have the names of Celery's own.
OPTIONS = ("-p", "no:celery", "-p", "no:cacheprovider", "-q")


@pytest.fixture
def project(
    pytester: pytest.Pytester, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.Pytester]:
    """A folder for the suite of a project, of which no process and no file is left."""
    mark = f"suite-{os.urandom(6).hex()}"
    monkeypatch.setenv(marks.VARIABLE, mark)
    monkeypatch.setenv("TMPDIR", str(workplace.temporary))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    yield pytester
    left = [process.pid for process in marks.marked_processes(mark)]
    assert survivors(left, timeout=PATIENCE) == set()
    assert list(workplace.temporary.iterdir()) == []


@pytest.mark.timeout(300)
def test_the_suite_of_a_project(project: pytest.Pytester) -> None:
    shutil.copy(APPS / "suite_of_a_project.py", project.path / "test_suite.py")
    shutil.copy(APPS / "leaky.py", project.path)
    project.makepyfile(ends_at_once="import os\nos._exit(3)")
    project.makeini("[pytest]\nisolated_app = leaky\npythonpath = .")

    ran = project.runpytest_subprocess(*OPTIONS)

    ran.assert_outcomes(passed=28)


def test_a_leak_fails_a_suite_with_all_that_one_has_to_know(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        from celery import Celery

        app = Celery("of_the_test")
        kept = []

        @app.task
        def leaks():
            kept.append(bytearray(1 << 20))

        def test_leaks(assert_no_growth):
            assert_no_growth(leaks, calls=10, warm_up=1, limit="2MB")
        """
    )

    ran = project.runpytest_subprocess(*OPTIONS)

    ran.assert_outcomes(failed=1)
    ran.stdout.fnmatch_lines(
        [
            "E*AssertionError: task '*.leaks': 10 calls, after 1 to warm up, left 10.* MiB behind"
            " in the process that runs the body, 1.* MiB a call; limit='2MB' allows 1.9 MiB.*"
        ]
    )


def test_the_fixtures_work_with_celerys_own_and_with_xdist(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import os
        import pytest

        @pytest.fixture(scope="session")
        def celery_parameters():
            return {"task_cls": "isolated_tasks:IsolatedTask"}

        @pytest.fixture
        def pid(celery_app):
            @celery_app.task
            def pid():
                return os.getpid()

            return pid
        """
    )
    project.makepyfile(
        """
        import os
        import pytest

        def test_isolates(pid, isolated_app, celery_app, isolated_worker):
            assert isolated_app is celery_app
            assert pid.delay().get(timeout=20) != os.getpid()

        @pytest.mark.usefixtures("isolated_in_place")
        def test_in_place(pid, celery_worker):
            celery_worker.reload()
            assert pid.delay().get(timeout=20) == os.getpid()
        """
    )
    ran = project.runpytest_subprocess(
        "-p", "celery.contrib.pytest", "--numprocesses", "2", *OPTIONS[2:]
    )

    ran.assert_outcomes(passed=2)


def test_children_use_the_test_databases_of_django(project: pytest.Pytester) -> None:
    project.makepyfile(
        settings="""
        from pathlib import Path
        HERE = Path(__file__).parent
        SECRET_KEY = "x"
        USE_TZ = True
        INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
        DATABASES = {"default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": str(HERE / "real.sqlite3"),
            "TEST": {"NAME": str(HERE / "test.sqlite3")},
        }}
        """,
        proj="""
        import os
        from celery import Celery
        from isolated_tasks import IsolatedTask
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
        app = Celery("proj")
        app.config_from_object("django.conf:settings", namespace="CELERY")

        @app.task(base=IsolatedTask)
        def add_group(name):
            from django.contrib.auth.models import Group
            Group.objects.create(name=name)
            return os.getpid()
        """,
        conftest="""
        import django
        import proj
        import pytest
        django.setup()

        # What pytest-django does.
        @pytest.fixture(scope="session", autouse=True)
        def databases():
            from django.test.utils import setup_databases, teardown_databases
            before = setup_databases(verbosity=0, interactive=False)
            yield
            teardown_databases(before, verbosity=0)
        """,
        test_it="""
        import os
        import proj
        from isolated_tasks.testing import measure_growth

        def test_a_child_sees_the_test_database(isolated_worker):
            from django.contrib.auth.models import Group
            assert proj.add_group.delay("of the child").get(timeout=20) != os.getpid()
            assert Group.objects.filter(name="of the child").exists()
            assert not os.path.exists("real.sqlite3")

        def test_so_does_what_is_measured():
            from isolated_tasks.errors import RemoteError
            import pytest
            with pytest.raises(RemoteError, match="call 2 .*IntegrityError: UNIQUE"):
                measure_growth(proj.add_group, args=("measured",))
            assert not os.path.exists("real.sqlite3")
        """,
    )
    project.makeini("[pytest]\nisolated_app = proj\npythonpath = .")

    ran = project.runpytest_subprocess(*OPTIONS)

    ran.assert_outcomes(passed=2)


def test_a_suite_that_does_not_use_it_does_not_pay_for_it(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import sys
        import threading

        def test_nothing_is_loaded(pytestconfig):
            assert "isolated_tasks.testing.plugin" in sys.modules
            heavy = {"billiard", "celery", "cloudpickle", "kombu", "psutil"}
            assert heavy & set(sys.modules) == set()
            assert [one for one in sys.modules if one.startswith("isolated_tasks")] == [
                "isolated_tasks",
                "isolated_tasks.testing",
                "isolated_tasks.testing.plugin",
            ]
            assert threading.active_count() == 1
        """
    )

    ran = project.runpytest_subprocess(*OPTIONS, "-p", "no:timeout", "-p", "no:hypothesispytest")

    ran.assert_outcomes(passed=1)


def test_a_worker_without_an_app_is_an_error_that_says_what_to_do(
    project: pytest.Pytester,
) -> None:
    project.makepyfile("def test_it(isolated_worker): ...")

    ran = project.runpytest_subprocess(*OPTIONS)

    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(["*UsageError: isolated_worker: which app? Set isolated_app*"])


def test_it_does_not_mind_having_been_imported_before_pytest_came(
    project: pytest.Pytester,
) -> None:
    project.makepyfile("def test_it(): ...")
    program = f"import isolated_tasks, pytest; pytest.main({['-W', 'error', *OPTIONS]!r})"

    ran = project.run(sys.executable, "-c", program)

    ran.assert_outcomes(passed=1)
    assert "cannot be rewritten" not in ran.stdout.str() + ran.stderr.str()
