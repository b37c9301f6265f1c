"""What IsolatedTask decides before any process is asked for."""

import threading
from collections.abc import Iterator

import psutil
import pytest
from celery import Celery

from isolated_tasks import IsolatedTask, UnpicklableError


@pytest.fixture
def app() -> Iterator[Celery]:
    before = psutil.Process().children()
    with Celery("task", set_as_current=False) as app:
        app.conf.isolated_eager = True
        yield app
    # What the tests below are about: nobody has started a forkserver.
    assert psutil.Process().children() == before


@pytest.mark.fault(14)
def test_an_argument_that_cannot_be_pickled_starts_no_process(app: Celery) -> None:
    @app.task(name="tasks.render", shared=False, base=IsolatedTask)
    def render(document: object, options: dict[str, object]) -> None: ...

    with pytest.raises(UnpicklableError) as caught:
        app.tasks["tasks.render"].apply(args=(1, {"conn": threading.Lock()})).get()

    assert caught.value.path == 'args[1]["conn"]'
    assert "tasks.render" in str(caught.value)


def test_a_plain_call_runs_in_place(app: Celery) -> None:
    @app.task(name="tasks.thread", shared=False, base=IsolatedTask)
    def thread() -> threading.Thread:
        return threading.current_thread()

    assert app.tasks["tasks.thread"]() is threading.current_thread()


def test_an_eager_task_runs_in_place_where_nobody_asked_for_more(app: Celery) -> None:
    app.conf.isolated_eager = False

    @app.task(name="tasks.thread", shared=False, base=IsolatedTask)
    def thread() -> threading.Thread:
        return threading.current_thread()

    assert app.tasks["tasks.thread"].apply().get() is threading.current_thread()


def test_a_task_that_is_not_isolated_runs_in_place(app: Celery) -> None:
    @app.task(name="tasks.thread", shared=False, base=IsolatedTask, isolated=False)
    def thread() -> threading.Thread:
        return threading.current_thread()

    assert app.tasks["tasks.thread"].apply().get() is threading.current_thread()
