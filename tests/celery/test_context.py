"""What code keeps around a task stands around its body too."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker

TIMEOUT = 30

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "keep-context.md"

#: Each has contexts of another kind: of a process, of threads, of greenlets.
POOLS = ("prefork", "threads", "gevent")


@pytest.fixture(scope="module", params=POOLS)
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        yield workplace.start("context_kept", pool=request.param)


def send(running: Worker, task: str, *args: Any, **kwargs: Any) -> Any:
    return running.call(f"context_kept.{task}", *args, **kwargs)


def get(running: Worker, task: str, *args: Any, **kwargs: Any) -> Any:
    return send(running, task, *args, **kwargs).get(timeout=TIMEOUT)


IN_PLACE = {
    "request_id": "request Ada",
    "details": {"user": "Ada", "roles": ["reader"]},
    "class attribute": "tenant Ada",
    "object": "Ada",
    "decimal": "0.33333",
    "set by a body": "nobody",
}


@pytest.mark.parametrize("task", ["look", "look_in_fresh_interpreter", "plain_look"])
def test_variables_that_stand_in_the_slot_stand_in_the_body(running: Worker, task: str) -> None:
    assert get(running, task, user="Ada") == IN_PLACE


def test_a_value_that_cannot_be_pickled_stays_behind_alone(running: Worker) -> None:
    assert get(running, "has_unpicklable", user="Ada") is False
    assert get(running, "look", user="Ada") == IN_PLACE
    assert "context variable" not in running.log()


def test_what_a_body_sets_is_gone_at_the_next_call_of_its_process(running: Worker) -> None:
    first = get(running, "set_and_look", "the first", user="Ada")
    second = get(running, "set_and_look", "the second", user="Bob")

    assert first == IN_PLACE
    assert second["set by a body"] == "nobody"
    assert second["request_id"] == "request Bob"


def test_the_hook_brings_what_variables_do_not(running: Worker) -> None:
    sent = [send(running, "hooked", number) for number in (1, 2)]
    first, second = (result.get(timeout=TIMEOUT) for result in sent)

    tokens = [{"of": result.id, "task": "context_kept.hooked"} for result in sent]
    assert first == {"token": tokens[0], "prerun": [sent[0].id, [1]], "earlier": []}
    assert second == {
        "token": tokens[1],
        "prerun": [sent[1].id, [2]],
        "earlier": [{"task": "context_kept.hooked", "token": tokens[0]}],
    }


def test_the_hook_names_what_it_cannot_bring(running: Worker) -> None:
    result = send(running, "hooked", 1)
    seen = result.get(timeout=TIMEOUT)

    assert "lock" not in seen
    running.wait_for_log(
        rf"WARNING.*context_kept\.hooked\[{re.escape(result.id)}\]: carried\['lock'\], of type "
        r"\w+, does not come to the body: it cannot be pickled"
    )


def test_the_example_of_the_how_to_works_as_printed(
    worker: Callable[..., Worker], tmp_path: Path
) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", HOW_TO.read_text(), re.M | re.S)
    line = re.search(r"^app = Celery\(.*\)$", source, re.M)
    assert line is not None
    app = 'from harness.app import make_app\napp = make_app("proj")'
    (tmp_path / "proj.py").write_text(source.replace(line[0], app))

    running = worker("proj")

    assert running.call("proj.greet", user="Ada").get(timeout=TIMEOUT) == "Hello, Ada"
    assert "WARNING" not in running.log()
