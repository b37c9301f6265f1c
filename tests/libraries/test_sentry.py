"""Sentry's SDK and its integration for Celery, with isolated tasks."""

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.worker import Worker

TIMEOUT = 30

APP = Path(__file__).parent / "apps" / "watched.py"

#: Where a program calls ``sentry_sdk.init``.
SET_UPS = [("prefork", "import"), ("threads", "import"), ("prefork", "signals")]


#: The operations of transactions.
OF_THE_SLOT, OF_THE_BODY = "queue.task.celery", "function"


class Sentry(ThreadingHTTPServer):
    """What Sentry's server is to the SDK."""

    # Handler threads are joined when the server is closed.
    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        #: Events and transactions, as they came.
        self.items: list[dict[str, Any]] = []

    @property
    def dsn(self) -> str:
        return f"http://key@127.0.0.1:{self.server_port}/1"

    def receive(self, envelope: bytes) -> None:
        """An envelope is a line of JSON, then two for each item: its header, its payload."""
        _, *lines = envelope.splitlines()
        while lines:
            header, payload, *lines = lines
            if json.loads(header)["type"] in ("event", "transaction"):
                self.items.append(json.loads(payload))


class _Handler(BaseHTTPRequestHandler):
    server: Sentry

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.receive(
            gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        )
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Watched:
    def __init__(self, worker: Worker, sentry: Sentry) -> None:
        self.worker = worker
        self.sentry = sentry

    def send(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.worker.app.send_task(f"watched.{task}", args, kwargs)

    def get(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.send(task, *args, **kwargs).get(timeout=TIMEOUT)

    def settle(self) -> None:
        """Have all that was captured so far at the server."""
        self.get("end_of_the_last_child")
        self.get("flush")

    def events(self, text: str) -> list[dict[str, Any]]:
        """The events that speak of this."""
        self.settle()
        return [
            item
            for item in self.sentry.items
            if item.get("type") != "transaction" and text in json.dumps(item)
        ]

    def transactions(self, task_id: str) -> dict[str, dict[str, Any]]:
        """The transactions of a call, by what they are of."""
        found = [
            item
            for item in self.sentry.items
            if item.get("type") == "transaction" and item["tags"]["celery_task_id"] == task_id
        ]
        by_op = {item["contexts"]["trace"]["op"]: item for item in found}
        assert len(by_op) == len(found)
        return by_op


@pytest.fixture(scope="module")
def sentry() -> Iterator[Sentry]:
    with Sentry() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module", params=SET_UPS, ids="-".join)
def watched(
    request: pytest.FixtureRequest,
    sentry: Sentry,
    open_workplace: Callable[[], AbstractContextManager[Any]],
) -> Iterator[Watched]:
    pool, where = request.param
    sentry.items.clear()
    with open_workplace() as workplace:
        worker = workplace.start(
            "watched", pool=pool, env={"SENTRY_DSN": sentry.dsn, "SET_UP": where}
        )
        yield Watched(worker, sentry)


def test_what_a_body_raises_is_reported_once_with_its_frames(watched: Watched) -> None:
    result = watched.send("fail", user="Ada")
    with pytest.raises(KeyError):
        result.get(timeout=TIMEOUT)

    (event,) = watched.events("of the body for Ada")
    (exception,) = event["exception"]["values"]
    assert exception["type"] == "KeyError"
    assert exception["mechanism"]["type"] == "celery"
    last = exception["stacktrace"]["frames"][-1]
    assert (last["function"], last["filename"]) == ("fail", "watched.py")
    assert last["context_line"].strip().startswith("raise KeyError(")
    assert event["transaction"] == "watched.fail"
    assert event["tags"] == {"celery_task_id": result.id, "tenant": "tenant of Ada"}


def test_what_a_body_captures_has_the_scope_and_the_trace_of_the_slot(watched: Watched) -> None:
    result = watched.send("report", user="Bob")
    result.get(timeout=TIMEOUT)

    (event,) = watched.events("message for Bob")
    assert event["message"] == "message for Bob"
    assert event["user"]["id"] == "Bob"
    assert event["tags"] == {"celery_task_id": result.id, "tenant": "tenant of Bob"}
    assert event["contexts"]["order"] == {"number": 7, "of": "Bob"}
    assert event["extra"]["attempt"] == 3
    assert "unpicklable" not in event["extra"]
    assert event["transaction"] == "watched.report"
    crumbs = [(crumb["category"], crumb["message"]) for crumb in event["breadcrumbs"]["values"]]
    assert crumbs == [("slot", "before the call"), ("body", "in the body")]
    # The body has no spans, so there is none of its own.
    assert set(watched.transactions(result.id)) == {OF_THE_SLOT}
    transaction = watched.transactions(result.id)[OF_THE_SLOT]
    assert event["contexts"]["trace"]["trace_id"] == transaction["contexts"]["trace"]["trace_id"]
    spans = {span["span_id"] for span in transaction["spans"]}
    assert event["contexts"]["trace"]["parent_span_id"] in spans


def test_an_error_that_a_body_logs_is_reported_once(watched: Watched) -> None:
    watched.get("handle", user="Eve")

    (event,) = watched.events("handled for Eve")
    assert event["logentry"]["message"] == "logged in the body"
    assert event["tags"]["tenant"] == "tenant of Eve"
    assert event["exception"]["values"][0]["stacktrace"]["frames"][-1]["function"] == "handle"


def test_the_scope_of_a_call_is_gone_at_the_next_of_its_process(watched: Watched) -> None:
    first = watched.get("report_in_batch", "the first of two", user="Ada")
    second = watched.get("report_in_batch", "the second of two")

    assert first == second
    (event,) = watched.events("the second of two")
    assert set(event["tags"]) == {"celery_task_id"}
    assert "id" not in event.get("user", {})
    assert "order" not in event["contexts"]


def test_spans_of_a_body_come_in_a_transaction_below_the_slots(watched: Watched) -> None:
    sender = watched.send("send_from_body", user="Zoe")
    sent = watched.worker.app.AsyncResult(sender.get(timeout=TIMEOUT))
    sent.get(timeout=TIMEOUT)
    watched.settle()

    transactions = watched.transactions(sender.id)
    assert set(transactions) == {OF_THE_SLOT, OF_THE_BODY}
    slot, body = transactions[OF_THE_SLOT], transactions[OF_THE_BODY]
    assert body["contexts"]["trace"]["parent_span_id"] in {
        span["span_id"] for span in slot["spans"]
    }
    assert body["transaction"] == slot["transaction"] == "watched.send_from_body"
    assert body["tags"]["tenant"] == "tenant of Zoe"
    # And the trace goes on to whom the body sends.
    of_sent = watched.transactions(sent.id)[OF_THE_SLOT]["contexts"]["trace"]
    assert of_sent["trace_id"] == slot["contexts"]["trace"]["trace_id"]
    assert of_sent["parent_span_id"] in {span["span_id"] for span in body["spans"]}
