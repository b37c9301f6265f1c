"""Bodies say where they run, and wait where they are told to."""

import json
import os
import socket
from pathlib import Path

from celery import Task

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

#: Shared by the machines; a test looks through it, no worker does.
FOLDER = Path(os.environ["FOLDER"])


@app.task(base=IsolatedTask, bind=True)
def where(self: Task, number: int) -> list[object]:
    host = socket.gethostname()
    redelivered = bool(self.request.delivery_info.get("redelivered"))
    bodies.append(str(FOLDER / "runs"), json.dumps([number, host, redelivered]))
    mailbox = FOLDER / f"hold-{host}"
    if mailbox.exists():
        bodies.report(mailbox.read_text(), number)
        bodies.hang_alone("asleep")
    return [number, host]
