"""A task that holds memory while it waits."""

import os

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


@app.task(base=IsolatedTask)
def hold_and_wait(size: int, mailbox: str, fifo: str) -> None:
    data = bytearray(b"x") * size
    bodies.report(mailbox, os.getpid())
    bodies.wait_for_word(fifo)
    del data
