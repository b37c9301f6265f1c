"""A message is acknowledged or rejected once, whoever comes to it at the same time."""

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import Ignore
from kombu.message import Message

from isolated_tasks import IsolatedTask, requester
from isolated_tasks.request import IsolatedRequest

app = Celery("test_request", set_as_current=False)


@app.task(base=IsolatedTask, name="tasks.run", acks_late=True)
def run() -> None: ...


def make_request(**callbacks: Callable[..., object]) -> IsolatedRequest:
    message = Message(
        "[[], {}, {}]",
        headers={"id": uuid.uuid4().hex, "task": "tasks.run"},
        content_type="application/json",
        content_encoding="utf-8",
    )
    return IsolatedRequest(message, app=app, **callbacks)


SETTLING: dict[str, Callable[[Any], None]] = {
    "acknowledge": lambda request: request.acknowledge(),
    "reject": lambda request: request.reject(requeue=True),
}


@pytest.mark.parametrize("second", SETTLING)
@pytest.mark.parametrize("first", SETTLING)
def test_of_two_threads_one_tells_the_broker(first: str, second: str) -> None:
    said = []
    is_there, other_has_been = threading.Event(), threading.Event()

    def tell(*_: object) -> None:
        said.append(threading.current_thread())
        is_there.set()
        other_has_been.wait()

    request = make_request(on_ack=tell, on_reject=tell)
    slot = threading.Thread(target=SETTLING[first], args=(request,))
    slot.start()
    is_there.wait()

    # The first is in the middle of it. This would wait for itself if it got there too.
    other = threading.Thread(target=SETTLING[second], args=(request,), daemon=True)
    other.start()
    other.join(10)
    other_has_been.set()
    slot.join()

    assert said == [slot]
    assert request.acknowledged


def test_a_message_that_could_not_be_acknowledged_can_be_again() -> None:
    said = []

    def tell(*_: object) -> None:
        said.append("ack")
        if len(said) == 1:
            raise BrokenPipeError

    request = make_request(on_ack=tell)

    with pytest.raises(BrokenPipeError):
        request.acknowledge()
    request.acknowledge()
    request.acknowledge()

    assert said == ["ack", "ack"]


def test_a_cancelled_message_is_not_acknowledged_however_fast_its_call_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    request = make_request(on_ack=lambda *_: said.append("ack"))
    request._call_id = "a call"
    request.time_start = 1.0

    def stop_call(*_: object, **__: object) -> None:
        """The slot, a thread, has come to know of it before the main process goes on."""
        try:
            raise Ignore("stopped")
        except Ignore:
            request.on_failure(ExceptionInfo(), return_ok=True)

    monkeypatch.setattr(requester, "stop_call", stop_call)

    request.cancel(object(), emit_retry=False)

    # Or the broker would not deliver it again.
    assert said == []
