"""One worker that all rows are sent to: plain, or isolated."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Celery, _state
from kombu import Queue

from contract import recorder, table
from contract.features import reports_all
from contract.table import Row
from harness.events import Events
from harness.worker import Worker
from harness.workplace import Workplace

TASK_CLASSES = {"plain": "celery:Task", "isolated": "isolated_tasks:IsolatedTask"}

#: After this long without anything new, tasks that have not ended will not.
SETTLE_TIMEOUT = 12.0
#: And after this long one of them goes on for ever. All rows take half a minute.
SETTLE_LIMIT = 150.0

#: How many tasks run at a time, where the pool can.
CONCURRENCY = 3


def contract_conf(name: str) -> dict[str, Any]:
    """What is on so that there is more to see, and what keeps one side's keys to itself."""
    return {
        "accept_content": ["json", "pickle"],
        "task_send_sent_event": True,
        "task_track_started": True,
        "result_extended": True,
        # A spawned pool process imports it; the others have.
        "include": ["contract.app"],
        # Redis has one hash for the unacknowledged messages of all queues.
        "broker_transport_options": {
            key: f"{name}-{key[:-4]}"
            for key in ("unacked_key", "unacked_index_key", "unacked_mutex_key")
        },
    }


class Side:
    """A worker, its client, and all that either has to say.

    Args:
        name: "plain" or "isolated".
        pool: one of the harness's.
        broker: "redis" or "amqp".
        workplace: where the worker runs, and nothing else does; whoever has made it closes it.
    """

    def __init__(self, name: str, *, pool: str, broker: str, workplace: Workplace) -> None:
        self.name = name
        self.pool = pool
        self.record = workplace.folder / "record"
        self._broker = broker
        self._workplace = workplace
        self.queue = workplace.name
        self.queues = workplace.queues
        self.queues.append(f"{self.queue}-other")
        self._conf = contract_conf(self.queue)
        self.app = self._make_client()
        self.events = Events(self.app)
        self.worker: Worker
        #: The names of the rows that were sent.
        self.done: set[str] = set()
        #: By the name of a row.
        self.sent: dict[str, Any] = {}
        self.raised: dict[str, BaseException] = {}
        self.followed: dict[str, str] = {}
        self.looked: dict[str, str] = {}
        self.exit_code: int | None = None
        #: What the worker left behind.
        self.leaked: list[str] = []
        #: Ids of the tasks whose messages were still there when the worker had stopped.
        self.left: list[str] = []
        self.unsettled: str = ""

    def _make_client(self) -> Celery:
        settings = self._workplace.settings(pool=self.pool, broker=self._broker, conf=self._conf)
        task_cls = TASK_CLASSES[self.name]
        app = table.make_contract_app("client", settings, task_cls=task_cls, current=False)
        app.conf.include = []
        self._workplace.adopt(app)
        return app

    def start(self) -> None:
        """Start the worker, which may not be ready yet."""
        self.worker = self._workplace.start(
            "contract.app",
            pool=self.pool,
            concurrency=1 if self.pool == "solo" else CONCURRENCY,
            broker=self._broker,
            conf=self._conf,
            app=self.app,
            env={
                "CONTRACT_RECORD": str(self.record),
                "CONTRACT_TASK_CLS": TASK_CLASSES[self.name],
            },
            args=["-E", "-Q", ",".join(self.queues)],
            ready=False,
        )

    def wait_until_ready(self) -> None:
        self.events.start()
        self.worker.wait_until_ready()

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def send(self, rows: Sequence[Row]) -> None:
        """Do what the rows do, in the client."""
        for row in rows:
            with self._doing(row):
                try:
                    self.sent[row.name] = row.send(self.app)
                except Exception as exc:
                    self.raised[row.name] = exc
                self.done.add(row.name)

    def follow(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.follow is not None and row.name in self.sent:
                self.followed[row.name] = self._call(row, row.follow)

    def look(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.look is not None and row.name in self.sent:
                self.looked[row.name] = self._call(row, row.look)

    def _call(self, row: Row, function: Callable[[Celery, Any], Any]) -> str:
        with self._doing(row):
            try:
                return recorder.describe(function(self.app, self.sent[row.name]))
            except Exception as exc:
                return recorder.describe(exc)

    @contextmanager
    def _doing(self, row: Row) -> Iterator[None]:
        previous = _state._tls.current_app
        _state._set_current_app(self.app)
        try:
            with recorder.recording(str(self.record), row.name), warnings.catch_warnings():
                # Of Celery's own calls of its client of Redis; a worker takes no notice either.
                warnings.simplefilter("ignore", DeprecationWarning)
                yield
        finally:
            _state._set_current_app(previous)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def settle(self) -> None:
        """Wait until there is nothing left to do, and say what there is if that takes too long."""
        progress = -1
        limit = time.monotonic() + SETTLE_LIMIT
        while not self._is_settled():
            if progress != (progress := self._progress()):
                deadline = min(limit, time.monotonic() + SETTLE_TIMEOUT)
            if time.monotonic() > deadline or self.worker.process.poll() is not None:
                self.unsettled = self._unsettled()
                return
            with self.events.changed:
                # Most changes come with an event; that the main process has finished with a task
                # does not.
                self.events.changed.wait(0.2)

    def _is_settled(self) -> bool:
        before = self._progress()
        # A message that has not arrived anywhere is on its way; one that is back in the queue is
        # too. Between two equal counts nothing was sent and nothing arrived, so a worker that has
        # no task in between has none any more.
        return (
            self._all_arrived()
            and self._is_idle()
            and not self._queued()
            and self._is_idle()
            and self._progress() == before
        )

    def _progress(self) -> int:
        return self.record.stat().st_size

    def lines(self) -> list[dict[str, Any]]:
        """What was recorded."""
        return recorder.read(str(self.record))

    def _all_arrived(self) -> bool:
        sent: Counter[str] = Counter()
        arrived: Counter[str] = Counter()
        names = ("task_received", "task_revoked", "task_rejected", "task_unknown")
        for line in recorder.read(str(self.record), *names, "after_task_publish"):
            if line["name"] == "after_task_publish":
                sent[line["id"]] += 1
            elif line["name"] in names:
                arrived[line["id"]] += 1
        return all(arrived[id] >= number for id, number in sent.items())

    def _is_idle(self) -> bool:
        commands = ("active", "reserved", "scheduled")
        for command in commands if reports_all(self.pool) else commands[1:]:
            replies = self.app.control.broadcast(
                command, reply=True, destination=[self.worker.name], limit=1, timeout=5.0
            )
            if not replies or any(tasks for reply in replies for tasks in reply.values()):
                return False
        return True

    def _queued(self) -> int:
        return sum(self._length(queue) for queue in self.queues)

    def _length(self, queue: str) -> int:
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(queue, passive=True).message_count)
            except connection.channel_errors:
                return 0  # an empty list does not exist in Redis

    def _unsettled(self) -> str:
        inspect = self.app.control.inspect([self.worker.name], limit=1, timeout=5.0)
        return (
            f"exit code of the worker {self.worker.process.poll()}, in the queue {self._queued()}, "
            f"active {inspect.active()}, reserved {inspect.reserved()}, "
            f"scheduled {inspect.scheduled()}"
        )

    def stop(self) -> None:
        """Stop the worker, and receive the last that it had to say."""
        self.exit_code = self.worker.stop()
        self.leaked = self._workplace.stop()
        self.events.stop()
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            for name in self.queues:
                queue = Queue(name)(channel)
                while (message := queue.get(no_ack=True)) is not None:
                    self.left.append(message.headers["id"])

    def close(self) -> None:
        """Hear no more events; the rest is for whoever has opened the workplace."""
        self.events.stop()
