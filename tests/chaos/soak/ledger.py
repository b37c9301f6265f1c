"""Who did what, and when: a file to which every process appends one line for each event.

It is kept beside Celery's own bookkeeping, so that the two can be held against each other. Each
line is one write to a file opened for appending, so lines of different processes never mix; and
the time is the machine's one monotonic clock, so they can be put in order.
"""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

#: The environment variable that names the file.
VARIABLE = "SOAK_LEDGER"


def note(event: str, **values: Any) -> None:
    """Append an event, from whatever process has the ledger in its environment."""
    append(os.environ[VARIABLE], event, **values)


def append(path: str, event: str, **values: Any) -> None:
    """Append an event to the ledger at this path."""
    line = json.dumps({"t": time.monotonic(), "event": event, **values}) + "\n"
    # Opened each time: no process has a descriptor more for it while its descriptors are counted.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class Reader:
    """Reads what has been appended since it last looked."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Each new event, in the order of the file."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        # The last line may still be on its way.
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        for line in data.splitlines():
            yield json.loads(line)
