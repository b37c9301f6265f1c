"""Plain Celery tasks, which show that the harness works and what Celery itself does."""

import os
import time
from typing import Any

from harness.app import make_app

app = make_app(__name__)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def echo(value: Any) -> Any:
    return value


@app.task
def fail(message: str) -> None:
    raise ValueError(message)


@app.task
def pid() -> int:
    return os.getpid()


@app.task
def sleep(seconds: float) -> None:
    time.sleep(seconds)
