"""Isolated tasks that end in each way, and what the signal tells of them, in a file."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from celery.signals import worker_init
from prometheus_client import CollectorRegistry, start_http_server

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedTask, Usage
from isolated_tasks.prometheus import register
from isolated_tasks.signals import isolated_call_finished
from isolated_tasks.usage import fields

app = make_app(__name__)


@isolated_call_finished.connect(weak=False)
def note(sender: Any, usage: Usage, **_: Any) -> None:
    with open(Path(os.environ["FOLDER"]) / "usages", "a") as file:
        values = {**fields(usage), "task": sender.name, "told_in": os.getpid()}
        file.write(json.dumps(values) + "\n")


if "OWN_EXPORTER" in os.environ:
    # As a program that serves metrics itself.
    registry = CollectorRegistry()
    register(registry)

    @worker_init.connect(weak=False)
    def serve(**_: Any) -> None:
        server, _thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        print(f"metrics are served at http://127.0.0.1:{server.server_port}/metrics", flush=True)


@app.task(base=IsolatedTask)
def hold(size: int) -> int:
    return bodies.hold(size)


@app.task(base=IsolatedTask, memory_limit="96MiB")
def hold_too_much() -> int:
    return bodies.hold(1 << 30)


@app.task(base=IsolatedTask)
def fail() -> NoReturn:
    raise ValueError("on purpose")


@app.task(base=IsolatedTask)
def leave() -> NoReturn:
    bodies.leave(3)


@app.task(base=IsolatedTask)
def report_and_wait(mailbox: str, fifo: str) -> Any:
    return bodies.report_and_wait(mailbox, fifo)
