"""The differences that docs/explanation/differences.md lists, where no other test has them."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker

TIMEOUT = 30


@pytest.fixture(scope="module")
def locals_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("differences") / "locals"


@pytest.fixture(scope="module", params=["prefork", "threads"])
def running(
    request: pytest.FixtureRequest,
    open_workplace: Callable[[], AbstractContextManager[Any]],
    locals_file: Path,
) -> Iterator[Worker]:
    with open_workplace() as workplace:
        worker = workplace.start(
            "differences", pool=request.param, env={"TEST_LOCALS": str(locals_file)}
        )
        yield worker
        assert worker.stop() == 0


def get(running: Worker, task: str, *args: Any) -> Any:
    return running.call(f"differences.{task}", *args).get(timeout=TIMEOUT)


@pytest.mark.parametrize(("task", "by_memory"), [("plain_tell", True), ("tell", False)])
def test_hooks_and_body_share_the_request_and_no_other_memory(
    running: Worker, tmp_path: Path, task: str, by_memory: bool
) -> None:
    path = tmp_path / "told"

    told_the_body = get(running, task, str(path), [])

    assert told_the_body == {"by_self": by_memory, "by_request": True}
    # The hook runs before the next task of the slot, not before the result is there.
    get(running, "plain_count")
    told_the_hook = json.loads(path.read_text())
    assert told_the_hook == {
        "by_self": by_memory,
        "by_request": True,
        "by_argument": by_memory,
    }


def test_what_a_body_leaves_in_memory_is_gone(running: Worker) -> None:
    plain = [get(running, "plain_count") for _ in range(2)]
    isolated = [get(running, "count") for _ in range(2)]

    assert plain[1] == plain[0] + 1
    assert isolated == [1, 1]


def test_the_frames_of_a_traceback_have_no_local_variables(
    running: Worker, locals_file: Path
) -> None:
    for task in ("plain_fail", "fail"):
        with pytest.raises(LookupError):
            get(running, task)
    get(running, "plain_count")

    seen = {name: rest for name, *rest in map(json.loads, locals_file.read_text().splitlines())}
    assert seen["differences.plain_fail"] == ["_fail", ["local"]]
    function, names = seen["differences.fail"]
    assert function == "_fail"
    assert "local" not in names


def test_a_body_has_the_main_thread_of_its_process(running: Worker) -> None:
    assert get(running, "plain_is_main_thread") == running.pool.startswith("prefork")
    assert get(running, "is_main_thread")


def test_a_thread_may_stay_for_a_whole_batch_if_the_process_had_it_before(running: Worker) -> None:
    (first, found), (second, left) = (get(running, "threads_in_batch") for _ in range(2))

    assert first == second
    assert "the service" in found
    assert left == found
    third, _ = get(running, "threads_in_batch", "a body's own")
    fourth, after = get(running, "threads_in_batch")
    assert third == first
    assert fourth != third
    assert after == found
