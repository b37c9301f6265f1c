"""Celery's events, as whoever monitors a worker receives them."""

import threading
from typing import Any

from celery import Celery


class Events:
    """Celery's events, as a monitor in the client receives them."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self.changed = threading.Condition()
        self.seen: list[dict[str, Any]] = []
        self._connection = app.connection_for_read()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self._add})
        self._thread = threading.Thread(target=self._capture, name="events", daemon=True)

    def start(self) -> None:
        """Listen from now on.

        Raises:
            TimeoutError: Nothing arrives.
        """
        self._thread.start()
        # What is published before the subscription stands is lost; nothing says when it does.
        for _ in range(20):
            self._send("listener-begin")
            if self.wait_for("listener-begin", 0.5):
                return
        raise TimeoutError("no event arrives")

    def stop(self) -> None:
        """Wait for all that was published so far; calling it again does nothing."""
        if not self._thread.is_alive():
            return
        # The events of one exchange arrive in the order in which they were published.
        self._send("listener-end")
        self.wait_for("listener-end", 20.0)
        self._receiver.should_stop = True
        self._send("listener-stop")
        self._thread.join(timeout=20.0)
        self._connection.release()

    def _capture(self) -> None:
        self._receiver.capture(limit=None, timeout=None, wakeup=False)

    def _add(self, event: dict[str, Any]) -> None:
        with self.changed:
            self.seen.append(event)
            self.changed.notify_all()

    def wait_for(self, kind: str, timeout: float) -> bool:
        """Wait for an event of this kind; whether there is one."""

        def arrived() -> bool:
            return any(event["type"] == kind for event in self.seen)

        with self.changed:
            return self.changed.wait_for(arrived, timeout)

    def _send(self, kind: str) -> None:
        with self._app.events.default_dispatcher() as dispatcher:
            dispatcher.send(kind)
