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

from rss_comparison.errors import ComparisonError, UsageError

VARIABLE = "COMPARE_RSS_CONNECTION"

TASK_NAME = "compare_rss.summarise"
PING_NAME = "compare_rss.ping"

CONNECT_TIMEOUT = 4.0
ANSWER_TIMEOUT = 30.0

#: How often the filesystem transport looks for messages; Kombu's own 1 s would be most of what a
#: task costs here.
POLLING_INTERVAL = 0.02


@dataclass(frozen=True)
class Connection:
    """Where messages and results go.

    Attributes:
        folder: Where they go if a URL is not given.
        queue: Of this run alone, so that a broker that others use as well is not disturbed.
    """

    folder: str
    queue: str
    broker: str | None
    backend: str | None

    @classmethod
    def create(cls, folder: Path, *, broker: str | None, backend: str | None) -> Connection:
        """Describe the connection of a new run, with the folders that it needs."""
        for name in ("outbox", "inbox", "control", "results"):
            (folder / name).mkdir()
        queue = f"compare-rss-{uuid.uuid4().hex[:12]}"
        return cls(str(folder), queue, broker, backend)

    @classmethod
    def from_environment(cls) -> Connection:
        """Read in a worker what the command wrote there with `environment()`."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> Mapping[str, str]:
        """The variables by which a worker finds this connection."""
        return {VARIABLE: json.dumps(asdict(self))}

    def app(self, *, outbox: str) -> Celery:
        """A Celery app that is connected here.

        Args:
            outbox: The folder that messages as files are written to.
        """
        app = Celery(
            "compare_rss", broker=self.broker or "filesystem://localhost//", set_as_current=False
        )
        app.conf.update(
            result_backend=self.backend or f"file://{self.folder}/results",
            task_default_queue=self.queue,
            broker_connection_retry_on_startup=True,
            broker_connection_timeout=CONNECT_TIMEOUT,
            redis_socket_connect_timeout=CONNECT_TIMEOUT,
            redis_socket_timeout=ANSWER_TIMEOUT,
            result_expires=3600,
            # Four workers, one after the other, know nothing of each other and need no remote
            # control; every queue less is one less to clear away on somebody's broker.
            worker_enable_remote_control=False,
        )
        if self.broker is None:
            app.conf.broker_transport_options = {
                "data_folder_in": f"{self.folder}/inbox",
                "data_folder_out": f"{self.folder}/{outbox}",
                "control_folder": f"{self.folder}/control",
                "polling_interval": POLLING_INTERVAL,
            }
        elif self.broker.startswith("redis"):
            # Else the kernel's: two minutes for a host that drops packets.
            app.conf.broker_transport_options = {"socket_connect_timeout": CONNECT_TIMEOUT}
        return app


class Outcome(NamedTuple):
    """What a body returned, or the exception that it raised."""

    succeeded: bool
    result: Any


class Client:
    """The command's side of a connection: sends tasks and clears up after them."""

    def __init__(self, connection: Connection) -> None:
        self._folder = Path(connection.folder)
        self._queue = connection.queue
        self._broker = connection.broker
        self._backend = connection.backend
        self._app = connection.app(outbox="outbox")
        self._sent: list[str] = []

    def open(self) -> None:
        """See that backend and broker answer, and then declare the queue.

        The filesystem transport writes a queue's file in place; declared here, before there is a
        worker, it is never read half written.

        Raises:
            UsageError: One of them does not answer, or Celery cannot use its URL.
        """
        with _answering("result backend", self._backend, UsageError):
            self._app.backend.get_task_meta("compare-rss-probe")
        with (
            _answering("broker", self._broker, UsageError),
            self._app.connection_for_write() as link,
        ):
            link.ensure_connection(max_retries=1, timeout=CONNECT_TIMEOUT)
            self._app.amqp.queues[self._queue](link.default_channel).declare()

    def send(self, name: str, *args: str) -> str:
        """Send one task and return its id.

        Not its AsyncResult: that subscribes to a channel of Redis for as long as it lives, and is
        loud when it goes after Redis has gone.
        """
        with _answering("broker", self._broker):
            task_id: str = self._app.send_task(name, args).id
        self._sent.append(task_id)
        self._deliver()
        return task_id

    def outcome(self, task_id: str) -> Outcome | None:
        """The outcome of a task, if it has one yet."""
        with _answering("result backend", self._backend):
            meta = self._app.backend.get_task_meta(task_id)
        if meta["status"] not in READY_STATES:
            return None
        return Outcome(meta["status"] == SUCCESS, meta["result"])

    def _deliver(self) -> None:
        # The filesystem transport writes its messages in place, and a worker that is polling may
        # read half of one. A rename is atomic. With any other broker the outbox is empty.
        for message in (self._folder / "outbox").iterdir():
            message.rename(self._folder / "inbox" / message.name)

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
        with suppress(ComparisonError):
            self.forget()
        with (
            suppress(ComparisonError),
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
    what: str, url: str | None, error: type[ComparisonError] = ComparisonError
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
