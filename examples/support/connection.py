"""The broker and the result backend: one description, read by the workers from the environment."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery
from celery.states import READY_STATES, SUCCESS
from kombu.utils.url import maybe_sanitize_url

from support import files
from support.errors import ExampleError, UsageError

VARIABLE = "EXAMPLE_CONNECTION"

CONNECT_TIMEOUT = 4.0
ANSWER_TIMEOUT = 30.0


@dataclass(frozen=True)
class Connection:
    """Where messages and results go.

    Attributes:
        name: Of the example.
        folder: Where they go if a URL is not given.
        queue: Of this run alone, so that a broker that others use as well is not disturbed.
    """

    name: str
    folder: str
    queue: str
    broker: str | None
    backend: str | None

    @classmethod
    def create(
        cls, name: str, folder: Path, *, broker: str | None, backend: str | None
    ) -> Connection:
        """Describe the connection of a new run, with the folders that it needs."""
        files.create(folder)
        (folder / "results").mkdir()
        return cls(name, str(folder), f"{name}-{uuid.uuid4().hex[:12]}", broker, backend)

    @classmethod
    def from_environment(cls) -> Connection | None:
        """Read in a worker what the command wrote there with `environment()`."""
        written = os.environ.get(VARIABLE)
        return None if written is None else cls(**json.loads(written))

    def environment(self) -> Mapping[str, str]:
        """The variables by which a worker finds this connection."""
        return {VARIABLE: json.dumps(asdict(self))}

    def app(self) -> Celery:
        """A Celery app that is connected here."""
        app = Celery(self.name, broker=self.broker or files.URL, set_as_current=False)
        app.conf.update(
            result_backend=self.backend or f"file://{self.folder}/results",
            task_default_queue=self.queue,
            broker_connection_retry_on_startup=True,
            broker_connection_timeout=CONNECT_TIMEOUT,
            redis_socket_connect_timeout=CONNECT_TIMEOUT,
            redis_socket_timeout=ANSWER_TIMEOUT,
            result_expires=3600,
            # Workers that run one after the other know nothing of each other and need no remote
            # control; every queue less is one less to clear away on somebody's broker.
            worker_enable_remote_control=False,
        )
        if self.broker is None:
            app.conf.broker_transport_options = files.options(self.folder)
        elif self.broker.startswith("redis"):
            # Else the kernel's: two minutes for a host that drops packets.
            app.conf.broker_transport_options = {"socket_connect_timeout": CONNECT_TIMEOUT}
        return app


def make_app() -> Celery:
    """A Celery app, connected as the command that started this worker says.

    In the command itself, which sends its tasks by their names, it is connected to nothing.
    """
    connection = Connection.from_environment()
    return (
        Celery(broker="memory://", set_as_current=False) if connection is None else connection.app()
    )


class Outcome(NamedTuple):
    """What a body returned, or the exception that it raised."""

    succeeded: bool
    result: Any


class Client:
    """The command's side of a connection: sends tasks and clears up after them."""

    def __init__(self, connection: Connection) -> None:
        self._queue = connection.queue
        self._broker = connection.broker
        self._backend = connection.backend
        self._app = connection.app()
        self._sent: list[str] = []

    def open(self) -> None:
        """See that backend and broker answer, and then declare the queue.

        Kombu writes a queue's file in place; declared here, before there is a worker, it is never
        read half written.

        Raises:
            UsageError: One of them does not answer, or Celery cannot use its URL.
        """
        with _answering("result backend", self._backend, UsageError):
            self._app.backend.get_task_meta("probe")
        with (
            _answering("broker", self._broker, UsageError),
            self._app.connection_for_write() as link,
        ):
            link.ensure_connection(max_retries=1, timeout=CONNECT_TIMEOUT)
            self._app.amqp.queues[self._queue](link.default_channel).declare()

    def send(self, name: str, *args: object) -> str:
        """Send one task and return its id.

        Not its AsyncResult: that subscribes to a channel of Redis for as long as it lives, and is
        loud when it goes after Redis has gone.
        """
        with _answering("broker", self._broker):
            task_id: str = self._app.send_task(name, args).id
        self._sent.append(task_id)
        return task_id

    def outcome(self, task_id: str) -> Outcome | None:
        """The outcome of a task, if it has one yet."""
        with _answering("result backend", self._backend):
            meta = self._app.backend.get_task_meta(task_id)
        if meta["status"] not in READY_STATES:
            return None
        return Outcome(meta["status"] == SUCCESS, meta["result"])

    def forget(self) -> None:
        """Remove the results of what was sent so far."""
        with _answering("result backend", self._backend):
            while self._sent:
                # Some backends (rpc://) remove nothing, and say so.
                with suppress(NotImplementedError):
                    self._app.backend.forget(self._sent.pop())

    def close(self) -> None:
        """Leave nothing on the broker or in the backend."""
        if self._broker is None:
            return  # it is all in the folder, which goes as a whole
        # What made the run fail may well fail this too, and is the error to tell.
        with suppress(ExampleError):
            self.forget()
        with (
            suppress(ExampleError),
            _answering("broker", self._broker),
            self._app.connection_for_write() as link,
        ):
            queue = self._app.amqp.queues[self._queue](link.default_channel)
            # Kombu deletes those of a queue's bindings that it knows from this same connection.
            queue.declare()
            queue.delete()
            queue.exchange.delete()
        self._app.close()


@contextmanager
def _answering(
    what: str, url: str | None, error: type[ExampleError] = ExampleError
) -> Iterator[None]:
    """Tell in one line that the broker or the backend failed.

    Every transport and backend has exceptions of its own, and those for a wrong URL or a missing
    package are not even theirs: nothing narrower than Exception covers them.
    """
    try:
        yield
    except Exception as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        where = maybe_sanitize_url(url or "in files")
        raise error(f"the {what} {where} does not work: {reason}") from failure
