"""Sends calls, and knows when they have ended."""

import collections
import heapq
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery, chain
from kombu import Connection

import isolated_tasks.errors  # noqa: F401  # Celery rebuilds errors of modules that are imported
from soak import ledger
from soak.book import FINAL, Book, Call, End
from soak.kinds import KINDS, PROMISES, is_right

#: How often it is looked whether calls have ended, in seconds.
LOOK_SECONDS = 0.25
#: How often messages that no worker has acknowledged in time are given to another, in seconds.
SWEEP_SECONDS = 1.0
#: A call that has ended is looked at once more after this long, and its result deleted.
SECOND_LOOK_SECONDS = 20.0
#: Nothing that a call does takes longer without an event.
LONGEST_SECONDS = 12.0

#: How many calls are of each promise.
SHARES = {"early": 3, "late": 3, "returned": 4}


@dataclass
class Queue:
    """A queue of a broker, with the client's app for it."""

    broker: str
    app: Celery

    def __post_init__(self) -> None:
        self.name: str = self.app.conf.task_default_queue
        self._connection: Connection = self.app.connection_for_write()

    def sweep(self) -> None:
        """Have Redis give messages back that have been with a worker for too long.

        Kombu's own code, which workers run too, but each only every 100 seconds.
        """
        if self.broker == "redis":
            self._connection.default_channel.qos.restore_visible(num=1000, interval=1)

    def is_empty(self) -> bool:
        """Whether no message is there, nor with a worker; of RabbitMQ the second is not known."""
        if self.broker != "redis":
            return False
        channel = self._connection.default_channel
        return not (channel.client.llen(self.name) or channel.client.hlen(channel.unacked_key))

    def close(self) -> None:
        self._connection.close()


class Load:
    """The client.

    Args:
        queues: where it sends to, in turn.
        rng: says what.
        rate: calls a second, all queues together.
        limit: of calls that are under way, all queues together.
        path: of the ledger.
        plain: leave out what plain tasks would not survive.
    """

    def __init__(
        self,
        queues: Sequence[Queue],
        *,
        rng: random.Random,
        rate: float,
        limit: int,
        path: str,
        plain: bool = False,
    ) -> None:
        self.book = Book()
        #: Calls that were sent, and have not ended as far as is known.
        self.open: dict[str, Call] = {}
        self._queues = queues
        self._rng = rng
        self._rate = rate
        self._limit = limit
        self._path = path
        self._reader = ledger.Reader(path)
        self._kinds = [
            kind for kind in KINDS.values() if kind.weight and (kind.harmless or not plain)
        ]
        self._number = 0
        #: When to revoke which call, and by whose app.
        self._to_revoke: list[tuple[float, str, int]] = []
        self._second_looks: collections.deque[tuple[float, Call]] = collections.deque()

    @property
    def backend(self) -> Any:
        """Both brokers' workers store results in one place."""
        return self._queues[0].app.backend

    def send_for(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Send calls for so long."""
        self._run(time.monotonic() + seconds, sends=True, until=until)

    def drain(self, timeout: float) -> bool:
        """Wait until every call has ended, or cannot any more; whether all have."""
        self._run(time.monotonic() + timeout, sends=False, until=self._is_drained)
        return not self.open

    def wait_ready(self, workers: Sequence[str], timeout: float) -> bool:
        """Wait until these workers have said that they are ready; whether they have."""
        deadline = time.monotonic() + timeout

        def ready() -> bool:
            return all(
                name in self.book.workers and self.book.workers[name].ready_at is not None
                for name in workers
            )

        self._run(deadline, sends=False, until=ready)
        return ready()

    def finish(self) -> None:
        """Look at all calls a last time."""
        self._read()
        open_calls = list(self.book.calls.values())
        self._look([call for call in open_calls if call.end is None])
        for _, call in self._second_looks:
            self._look_again(call)
        self._second_looks.clear()

    # ── the loop ────────────────────────────────────────────────────────────────────────────────

    def _run(self, deadline: float, *, sends: bool, until: Callable[[], bool]) -> None:
        now = time.monotonic()
        due = {"send": now, "look": now, "sweep": now}
        while (now := time.monotonic()) < deadline and not until():
            if sends and now >= due["send"]:
                # No catching up after a pause.
                due["send"] = max(due["send"], now - 1.0) + self._rng.expovariate(self._rate)
                if len(self.open) < self._limit:
                    self._send()
            while self._to_revoke and self._to_revoke[0][0] <= now:
                self._revoke()
            if now >= due["look"]:
                due["look"] = now + LOOK_SECONDS
                self._read()
                self._look(list(self.open.values()))
                self._give_up(now)
                while self._second_looks and self._second_looks[0][0] <= now:
                    self._look_again(self._second_looks.popleft()[1])
            if now >= due["sweep"]:
                due["sweep"] = now + SWEEP_SECONDS
                for queue in self._queues:
                    queue.sweep()
            time.sleep(0.01)

    def _send(self) -> None:
        self._number += 1
        index = self._number % len(self._queues)
        (kind,) = self._rng.choices(self._kinds, [kind.weight for kind in self._kinds])
        (promise,) = self._rng.choices(list(PROMISES), [SHARES[name] for name in PROMISES])
        revoked_after = self._rng.uniform(0.1, 1.5)
        queue, token = self._queues[index], str(self._number)
        name = f"{kind.name}.{promise}"
        if kind.name == "first":
            follower = f"{token}/second"
            pair = chain(
                queue.app.signature(name, (token,)),
                queue.app.signature(f"second.{promise}", (follower,)),
            )
            second = pair.apply_async()
            self._note_sent(second.parent.id, kind.name, promise, queue, token)
            # Not sent, but known: the slot of the first sends it.
            call = self.book.calls.setdefault(second.id, Call(second.id))
            call.kind, call.promise, call.broker = "second", promise, queue.broker
            call.token, call.parent = follower, second.parent.id
            return
        result = queue.app.send_task(name, (token,))
        self._note_sent(result.id, kind.name, promise, queue, token)
        if kind.name == "revoked":
            heapq.heappush(self._to_revoke, (time.monotonic() + revoked_after, result.id, index))

    def _note_sent(self, task_id: str, kind: str, promise: str, queue: Queue, token: str) -> None:
        ledger.append(
            self._path,
            "sent",
            id=task_id,
            kind=kind,
            promise=promise,
            broker=queue.broker,
            token=token,
            parent=None,
        )

    def _revoke(self) -> None:
        _, task_id, index = heapq.heappop(self._to_revoke)
        ledger.append(self._path, "revoking", id=task_id)
        self._queues[index].app.control.revoke(task_id, terminate=True)

    # ── what has become of them ─────────────────────────────────────────────────────────────────

    def _read(self) -> None:
        for event in self._reader.events():
            self.book.feed(event)
            if event["event"] in ("sent", "published"):
                call = self.book.calls[event["id"]]
                if call.end is None:
                    self.open[call.id] = call

    def _look(self, calls: Sequence[Call]) -> None:
        for task_id, end in self._ends(calls).items():
            call = self.book.calls[task_id]
            call.end = end
            self.open.pop(task_id, None)
            self._second_looks.append((time.monotonic() + SECOND_LOOK_SECONDS, call))

    def _look_again(self, call: Call) -> None:
        end = self._ends([call]).get(call.id)
        if end != call.end and end is not None:
            call.later_end = end
        self.backend.client.delete(self.backend.get_key_for_task(call.id))

    def _ends(self, calls: Sequence[Call]) -> Mapping[str, End]:
        found = {}
        for start in range(0, len(calls), 100):
            some = calls[start : start + 100]
            keys = [self.backend.get_key_for_task(call.id) for call in some]
            for call, data in zip(some, self.backend.client.mget(keys), strict=True):
                if data is not None:
                    meta = self.backend.decode_result(data)
                    if meta["status"] in FINAL:
                        found[call.id] = _end_of(call, meta)
        return found

    def _give_up(self, now: float) -> None:
        """Wait no more for what was acknowledged early by a worker that was killed since."""
        for call in list(self.open.values()):
            if call.promise != "early" or now - call.events[-1]["t"] < LONGEST_SECONDS:
                continue
            last = next(iter(reversed(list(call.all("acking")))), None)
            worker = self.book.workers.get(last["worker"]) if last else None
            if worker is not None and worker.ended_at is not None:
                del self.open[call.id]

    def _is_drained(self) -> bool:
        if not self.open:
            return True
        now = time.monotonic()
        silent = all(now - call.events[-1]["t"] > LONGEST_SECONDS for call in self.open.values())
        queues = {queue.broker: queue for queue in self._queues}
        return silent and all(queues[call.broker].is_empty() for call in self.open.values())

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


def _end_of(call: Call, meta: Mapping[str, Any]) -> End:
    state, value = meta["status"], meta["result"]
    if state == "SUCCESS":
        return End(state, is_right=is_right(call.kind, call.token, value))
    if state == "REVOKED":
        return End(state)
    return End(
        state,
        error=type(value).__name__,
        text=str(value)[:500],
        pid=getattr(value, "pid", None),
        started=getattr(value, "started", None),
        redeliveries=getattr(value, "redeliveries", None),
    )
