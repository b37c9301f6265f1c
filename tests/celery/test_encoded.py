"""With a result_serializer nothing of a body's is unpickled, and Celery is told all the same."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from celery import chain
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult

from harness.worker import Worker
from isolated_tasks import OutOfMemoryError, ProtocolError, RemoteError, UnpicklableError

TIMEOUT = 30


@pytest.fixture(scope="module", params=["prefork", "threads"])
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        yield workplace.start("encoded", pool=request.param)


def call(running: Worker, task: str, *args: Any) -> AsyncResult:
    return running.call(f"encoded.{task}", *args)


def get(running: Worker, task: str, *args: Any) -> Any:
    return call(running, task, *args).get(timeout=TIMEOUT)


def test_a_result_arrives(running: Worker) -> None:
    result = get(running, "give_back", [1, {"a": None}])

    assert result["value"] == [1, {"a": None}]
    assert result["pid"] not in {process.pid for process in running.tree()[:1]}


def test_a_chain_hands_results_on(running: Worker) -> None:
    give_back = running.app.signature("encoded.give_back")

    result = chain(give_back.clone((1,)), give_back.clone()).apply_async()

    assert result.get(timeout=TIMEOUT)["value"]["value"] == 1


def test_a_result_that_cannot_be_encoded_is_named(running: Worker) -> None:
    with pytest.raises(UnpicklableError, match="result_serializer='json'") as caught:
        get(running, "give_what_json_has_not")

    assert caught.value.type_name == "builtins.object"


def test_a_result_that_nobody_wants_may_be_anything(running: Worker) -> None:
    result = call(running, "ignore_what_json_has_not")

    running.wait_for_log(rf"\[{result.id}\] succeeded in .*<object object at")


def test_an_exception_comes_as_its_name_and_text_with_the_body_s_lines(running: Worker) -> None:
    result = call(running, "fail", "what it says")

    with pytest.raises(RemoteError, match=r"encoded\.LocalError: what it says") as caught:
        result.get(timeout=TIMEOUT)
    assert caught.value.type_name == "encoded.LocalError"
    assert "raise LocalError(text)" in result.traceback


def test_retries_are_retries(running: Worker) -> None:
    assert get(running, "retry") == 2

    with pytest.raises(RemoteError, match=r"encoded\.LocalError: never"):
        get(running, "retry_by_itself")


@pytest.mark.parametrize(
    ("how", "log", "state"),
    [("ignore", "ignored", "CUSTOM"), ("reject", "reject requeue=False: no", "FAILURE|CUSTOM")],
)
def test_what_tells_celery_what_to_do_does(running: Worker, how: str, log: str, state: str) -> None:
    result = call(running, "control", how)

    running.wait_for_log(rf"{result.id}\].* {log}")
    assert result.state in state.split("|")


def test_a_retry_that_sends_nothing_is_one(running: Worker) -> None:
    result = call(running, "control", "retry")

    running.wait_for_log(rf"\[{result.id}\] retry: by hand")
    assert result.state == "RETRY"


def test_subtasks_are_children(running: Worker) -> None:
    result = call(running, "launch")

    ids = result.get(timeout=TIMEOUT)

    assert [child.id for child in result.children] == ids


def test_limits_are_what_they_are(running: Worker) -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        get(running, "take_too_long")
    with pytest.raises(OutOfMemoryError, match="all gone"):
        get(running, "run_out_of_memory")


def test_a_pickle_of_a_body_s_own_making_is_not_loaded(running: Worker, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    with pytest.raises(ProtocolError):
        get(running, "send_pickle", str(trace))

    assert not trace.exists()
