"""OpenTelemetry's SDK and its instrumentation of Celery, with isolated tasks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import psutil
import pytest

from harness.worker import Worker

TIMEOUT = 30

#: Where a program sets its provider up. The second is the instrumentation's own advice for prefork;
#: in other pools Celery does not send this signal, so there is nothing set up outside children.
SET_UPS = [("prefork", "import"), ("threads", "import"), ("prefork", "worker_process_init")]


class Traced:
    def __init__(self, workplace: Any, worker: Worker) -> None:
        self.workplace = workplace
        self.worker = worker

    def get(self, task: str, *args: Any) -> Any:
        return self.worker.call(f"traced.{task}", *args).get(timeout=TIMEOUT)

    def settle(self) -> None:
        """Have all spans so far in the file."""
        self.get("end_of_the_last_child")
        self.get("flush")

    def spans(self, name: str) -> list[Any]:
        return [span for span in self.workplace.lines("spans") if span["name"] == name]


@pytest.fixture(scope="module", params=SET_UPS, ids="-".join)
def traced(
    request: pytest.FixtureRequest, open_workplace: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Traced]:
    pool, where = request.param
    with open_workplace() as workplace:
        yield Traced(workplace, workplace.start("traced", pool=pool, env={"SET_UP": where}))


def test_each_of_ten_bodies_sends_its_span_with_the_right_parent(traced: Traced) -> None:
    ids = traced.get("call", *range(10))
    results = [traced.worker.app.AsyncResult(task_id).get(timeout=TIMEOUT) for task_id in ids]
    traced.settle()

    assert len({result["pid"] for result in results}) == 10
    (caller,) = traced.spans("caller")
    sends = {span["id"]: span for span in traced.spans("apply_async/traced.work")}
    runs = {span["id"]: span for span in traced.spans("run/traced.work")}
    assert len(sends) == len(runs) == 10
    for number, result in enumerate(results):
        (body,) = traced.spans(f"in body {number}")
        assert body["pid"] == result["pid"]
        assert sends[runs[body["parent"]]["parent"]]["parent"] == caller["id"]
        assert body["trace"] == caller["trace"]
        assert result["baggage"] == {"tenant": "Ada"}


def test_what_a_body_sends_is_a_child_of_its_spans(traced: Traced) -> None:
    task_id = traced.get("send_from_body", 50)
    traced.worker.app.AsyncResult(task_id).get(timeout=TIMEOUT)
    traced.settle()

    (sender,) = traced.spans("sender in body")
    (send,) = [
        span for span in traced.spans("apply_async/traced.work") if span["parent"] == sender["id"]
    ]
    assert send["pid"] == sender["pid"]
    (run,) = [s for s in traced.spans("run/traced.work") if s["parent"] == send["id"]]
    (body,) = traced.spans("in body 50")
    assert body["parent"] == run["id"]


def test_each_call_of_a_batch_has_its_own_parent(traced: Traced) -> None:
    pids = [traced.get("work_in_batch", number) for number in (1, 2)]
    traced.settle()

    assert pids[0] == pids[1]
    runs = traced.spans("run/traced.work_in_batch")
    bodies = [*traced.spans("in batch 1"), *traced.spans("in batch 2")]
    assert [body["parent"] for body in bodies] == [run["id"] for run in runs]
    assert len({run["trace"] for run in runs}) == 2


def test_metrics_of_a_body_are_sent(traced: Traced) -> None:
    pid = traced.get("work", 99)["pid"]
    traced.settle()

    assert {"name": "calls_of_work", "pid": pid} in traced.workplace.lines("metrics")


def test_a_child_whose_spans_nobody_takes_exits_all_the_same(traced: Traced) -> None:
    pid = traced.get("work_while_the_backend_hangs")
    result = traced.get("work", 98)
    traced.settle()

    # The slot has seen the end of that child, or it would not have served the next call.
    assert result["pid"] != pid
    assert not psutil.pid_exists(pid)
    traced.worker.wait_for_log("opentelemetry.context could not send all that was buffered")
    assert traced.spans("never sent") == []
    (body,) = traced.spans("in body 98")
    assert body["pid"] == result["pid"]
