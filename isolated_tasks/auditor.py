"""Collects what the audits of all workers send, for as long as somebody wants to know."""

from __future__ import annotations

import dataclasses
import socket
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from isolated_tasks.advice import Advice, Call, TaskFigures, advise
from isolated_tasks.audit import EVENT

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Auditor", "listen"]

#: An event of our own: when it comes back, events are heard.
PROBE = f"{EVENT}-probe"
#: The routing keys of both; the events of tasks need not come here.
ROUTING_KEY = f"{EVENT.partition('-')[0]}.#"

#: Of an event, those that advice is made of.
_FIELDS = tuple(field.name for field in dataclasses.fields(Call))

#: So often it is looked whether it is time to end, and the probe is repeated, in seconds.
TICK_SECONDS = 0.2


class Auditor:
    """What was heard so far of each task.

    Args:
        names: Of the tasks to look at; empty for all.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = frozenset(names)
        self.tasks: dict[str, TaskFigures] = {name: TaskFigures(name) for name in sorted(names)}

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event of type `audit.EVENT`."""
        name = event["name"]
        if self._names and name not in self._names:
            return
        task = self.tasks.setdefault(name, TaskFigures(name))
        worker = event["hostname"]
        if event.get("unmeasurable"):
            task.unmeasurable[worker] = event["unmeasurable"]
            return
        call = Call(**{name: event[name] for name in _FIELDS})
        task.add((worker, event["pid"]), call)

    def has_heard(self, calls: int) -> bool:
        """Whether each task, of those asked for or else of those heard of, had so many calls.

        One that no worker can measure has none to wait for.
        """
        return bool(self.tasks) and all(
            task.calls >= calls or (task.unmeasurable and not task.calls)
            for task in self.tasks.values()
        )

    def advice(self) -> list[Advice]:
        """The verdict on each task, the most severe first."""
        advice = [advise(task) for task in self.tasks.values()]
        return sorted(advice, key=_most_severe_first)


def _most_severe_first(advice: Advice) -> tuple[int, int, str]:
    return -advice.verdict.severity, -(advice.kept_per_call_bytes or 0), advice.task


def listen(
    app: Celery,
    auditor: Auditor,
    *,
    seconds: float | None = None,
    calls: int | None = None,
    on_ready: Callable[[], object] = lambda: None,
    on_tick: Callable[[], object] = lambda: None,
) -> None:
    """Hand the events of all workers to an auditor.

    Ends when one of the two bounds is reached; without any, when ``on_tick`` raises.

    Args:
        app: Whose workers.
        auditor: Who takes them.
        seconds: How long, from when events are heard.
        calls: How many of each task, see `Auditor.has_heard`.
        on_ready: Called when events are heard.
        on_tick: Called several times a second.

    Raises:
        Exception: The broker does not answer, or not any more; each transport has its own.
    """
    token = uuid.uuid4().hex
    #: When events began to be heard.
    heard: list[float] = []

    def on_probe(event: Mapping[str, Any]) -> None:
        if event["uuid"] == token and not heard:
            heard.append(time.monotonic())
            on_ready()

    def is_over() -> bool:
        if not heard:
            return False
        over = seconds is not None and time.monotonic() - heard[0] >= seconds
        return over or (calls is not None and auditor.has_heard(calls))

    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1)
        receiver = app.events.Receiver(
            connection, handlers={EVENT: auditor.add, PROBE: on_probe}, routing_key=ROUTING_KEY
        )
        with receiver.consumer_context(wakeup=False) as (link, _, _):
            while not is_over():
                on_tick()
                if not heard:
                    # A consumer is not at once a subscriber: over Redis what is published before
                    # it is one is lost.
                    with app.events.default_dispatcher() as dispatcher:
                        dispatcher.send(PROBE, uuid=token)
                try:
                    link.drain_events(timeout=TICK_SECONDS)
                except socket.timeout:  # noqa: UP041  # gevent's and eventlet's is another
                    link.heartbeat_check()
