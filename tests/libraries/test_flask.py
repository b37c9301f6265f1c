"""Flask's documented recipe: a task class whose ``__call__`` pushes an app context."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from harness.worker import Worker

TIMEOUT = 30


@pytest.fixture(scope="module", params=["prefork", "threads"])
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        yield workplace.start("flask_recipe", pool=request.param)


def get(running: Worker, task: str, *args: Any) -> Any:
    return running.call(f"flask_recipe.{task}", *args).get(timeout=TIMEOUT)


def test_the_body_has_an_app_context_of_its_own_process(running: Worker) -> None:
    greeted = get(running, "greet", "Ada")

    assert greeted["text"] == "Hello, Ada"
    assert greeted["pid"] not in {running.pid, get(running, "in_slot")["pid"]}
    assert greeted["pushed"] == [greeted["pid"]]


def test_each_call_of_a_batch_has_a_context_of_its_own(running: Worker) -> None:
    first, second = get(running, "look"), get(running, "look")

    assert first["pid"] == second["pid"]
    assert (first["name"], second["name"]) == (None, None)
    assert second["torn_down"] == [first["pid"]]


def test_a_failure_is_the_bodys_own(running: Worker) -> None:
    with pytest.raises(KeyError, match="flask_recipe"):
        get(running, "fail")


def test_no_context_is_pushed_in_the_slot_for_an_isolated_task(running: Worker) -> None:
    before = get(running, "in_slot")
    get(running, "greet", "Ada")

    seen = get(running, "in_slot")

    assert set(seen["pushed"]) == {seen["pid"]}
    assert seen["pushed"][len(before["pushed"]) :] == [seen["pid"]]
