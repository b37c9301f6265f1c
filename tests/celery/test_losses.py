"""How the children of a message were lost survives its redelivery, wherever that can be kept."""

import uuid
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.app.task import Context
from celery.backends.base import KeyValueStoreBackend

from harness.workplace import Workplace
from isolated_tasks import ChildLostError, IsolatedTask, losses


@pytest.fixture
def request_of_a_task(app: Celery) -> Iterator[Context]:
    request = Context(id=uuid.uuid4().hex, headers={}, delivery_info={"redelivered": True})
    yield request
    if isinstance(app.backend, KeyValueStoreBackend):
        app.backend.delete(f"{losses.KEY}{request.id}-0")


# Celery's backend for Redis calls a function that redis-py would rather have called otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

#: Result backends, and whether they can keep a history.
CAN_KEEP = {"redis": True, "cache+memory://": True, "rpc": False}


@pytest.fixture(params=CAN_KEEP)
def app(request: pytest.FixtureRequest, workplace: Workplace) -> Celery:
    return workplace.app(workplace.settings(broker="redis", backend=request.param, conf={}))


def make_task(app: Celery) -> object:
    @app.task(base=IsolatedTask, name="tasks.lose", shared=False)
    def lose() -> None: ...

    return app.tasks["tasks.lose"]


def test_the_result_backend_keeps_them_for_all_workers_where_it_can(
    request: pytest.FixtureRequest, app: Celery, request_of_a_task: Context
) -> None:
    task = make_task(app)
    backend = request.node.callspec.params["app"]

    seen: list[list[str]] = []
    for number in range(3):
        seen.append(losses.history(task, request_of_a_task, []))
        losses.add(task, request_of_a_task, seen[-1], f"loss {number}")

    assert seen == ([[], ["loss 0"], ["loss 0", "loss 1"]] if CAN_KEEP[backend] else [[], [], []])
    if backend == "redis":
        key = f"{losses.KEY}{request_of_a_task.id}-0"
        assert 0 < app.backend.client.ttl(key) <= app.backend.expires


def test_a_retry_begins_with_none(app: Celery, request_of_a_task: Context) -> None:
    task = make_task(app)
    losses.add(task, request_of_a_task, [], "a loss")

    request_of_a_task.retries = 1

    assert losses.history(task, request_of_a_task, []) == []


def test_a_message_that_comes_for_the_first_time_is_not_asked_for(
    app: Celery, request_of_a_task: Context
) -> None:
    task = make_task(app)
    losses.add(task, request_of_a_task, [], "a loss")
    request_of_a_task.delivery_info = {"redelivered": False}

    assert losses.history(task, request_of_a_task, []) == []


@pytest.mark.fault(52)
def test_the_longest_history_is_believed(app: Celery, request_of_a_task: Context) -> None:
    task = make_task(app)
    losses.add(task, request_of_a_task, [], "a loss")

    assert losses.history(task, request_of_a_task, ["one", "two"]) == ["one", "two"]


@pytest.mark.parametrize(
    ("headers", "count"),
    [({}, 0), (None, 0), ({"x-delivery-count": 5}, 5), ({"x-delivery-count": "?"}, 0)],
)
def test_a_quorum_queue_counts_for_itself(headers: dict[str, object] | None, count: int) -> None:
    assert losses.deliveries(Context(headers=headers)) == count


def test_a_loss_is_told_in_one_line() -> None:
    assert losses.describe(ChildLostError("it went\nwith frames\nand more")) == "it went"


def test_the_main_process_keeps_the_histories_of_the_latest_messages() -> None:
    ids = [uuid.uuid4().hex for _ in range(losses.MAX_KEPT + 1)]
    losses.note_kept(ids[0], 0, "one")
    losses.note_kept(ids[0], 0, "two")
    assert losses.kept(ids[0], 0) == ["one", "two"]
    # Another message.
    assert losses.kept(ids[0], 1) == []

    for one in ids[1:]:
        losses.note_kept(one, 0, "a loss")

    assert losses.kept(ids[0], 0) == []
    assert losses.kept(ids[-1], 0) == ["a loss"]
