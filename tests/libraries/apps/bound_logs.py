"""structlog and loguru: fields that are bound around a task, in lines that its body logs."""

import contextlib
import os
from pathlib import Path
from typing import Any

import structlog
from celery.signals import task_postrun, task_prerun
from loguru import logger as loguru_logger

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

FOLDER = Path(os.environ["FOLDER"])

# Both are set up at import: children inherit the open file.
loguru_logger.remove()
loguru_logger.add(FOLDER / "loguru", format="{message}|{extra}")
structlog.configure(
    processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer()],
    logger_factory=structlog.WriteLoggerFactory((FOLDER / "structlog").open("a")),
)

log = structlog.get_logger()

around: dict[str, contextlib.ExitStack] = {}


@task_prerun.connect
def bind(task_id: str, kwargs: dict[str, Any], **_: Any) -> None:
    stack = around[task_id] = contextlib.ExitStack()
    if "user" in kwargs:
        fields = {"task_id": task_id, "user": kwargs["user"], "unpicklable": lambda: None}
        stack.enter_context(structlog.contextvars.bound_contextvars(**fields))
        del fields["unpicklable"]
        stack.enter_context(loguru_logger.contextualize(**fields))


@task_postrun.connect
def unbind(task_id: str, **_: Any) -> None:
    around.pop(task_id).close()


def say(text: str) -> None:
    loguru_logger.info(text)
    log.info(text)


@app.task(base=IsolatedTask)
def speak(text: str, user: str) -> int:
    say(text)
    return os.getpid()


@app.task(base=IsolatedTask, batch_size=2, batch_idle_timeout=60.0)
def speak_in_batch(text: str, **kwargs: Any) -> int:
    structlog.contextvars.bind_contextvars(**{f"bound by {text}": True})
    say(text)
    return os.getpid()
