"""structlog and loguru: what is bound in the slot is in the lines of the body."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

TIMEOUT = 30


class Running:
    def __init__(self, workplace: Any, pool: str) -> None:
        self.workplace = workplace
        self.worker = workplace.start("bound_logs", pool=pool)

    def send(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.worker.app.send_task(f"bound_logs.{task}", args, kwargs)

    def of_structlog(self, text: str) -> dict[str, Any]:
        (line,) = [line for line in self.workplace.lines("structlog") if line["event"] == text]
        del line["event"]
        return dict(line)

    def of_loguru(self, text: str) -> str:
        lines = (self.workplace.folder / "loguru").read_text().splitlines()
        (fields,) = [line.partition("|")[2] for line in lines if line.startswith(text + "|")]
        return fields  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["prefork", "threads", "gevent"])
def running(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Running]:
    with open_workplace() as workplace:
        yield Running(workplace, request.param)


def test_fields_of_the_slot_are_in_lines_of_the_body(running: Running) -> None:
    result = running.send("speak", "hello", user="Ada")
    result.get(timeout=TIMEOUT)

    assert running.of_structlog("hello") == {"task_id": result.id, "user": "Ada"}
    assert running.of_loguru("hello") == str({"task_id": result.id, "user": "Ada"})


def test_fields_of_a_call_are_gone_at_the_next_of_its_process(running: Running) -> None:
    first = running.send("speak_in_batch", "first", user="Ada")
    second = running.send("speak_in_batch", "second")

    assert first.get(timeout=TIMEOUT) == second.get(timeout=TIMEOUT)
    assert running.of_structlog("first")["user"] == "Ada"
    assert running.of_structlog("second") == {"bound by second": True}
    assert running.of_loguru("second") == "{}"
