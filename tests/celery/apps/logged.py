"""Tasks that log, and an app that sets logging up in one of the ways that Celery offers."""

import logging
import os
import sys
import warnings
from typing import Any

from celery import signals
from celery.app.log import TaskFormatter
from celery.utils.log import get_task_logger

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

task_logger = get_task_logger(__name__)
other_logger = logging.getLogger("somewhere.else")


class Counting(logging.Filter):
    """Shows how many handlers a record has met: one that is attached twice writes twice."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.met = getattr(record, "met", 0) + 1
        return True


def _handler(form: str) -> logging.Handler:
    handler = logging.FileHandler(os.environ["TEST_LOG"])
    handler.setFormatter(TaskFormatter(form, use_color=False))
    handler.addFilter(Counting())
    return handler


FORM = "%(met)s %(levelname)s %(processName)s %(name)s %(task_name)s[%(task_id)s] %(message)s"

if os.environ.get("TEST_LOGGING") == "setup_logging":

    @signals.setup_logging.connect
    def _set_up(**_: Any) -> None:
        root = logging.getLogger()
        root.handlers[:] = [_handler(FORM)]
        root.setLevel("INFO")


if os.environ.get("TEST_LOGGING") == "after_setup":

    @signals.after_setup_logger.connect
    def _after(logger: logging.Logger, **_: Any) -> None:
        logger.addHandler(_handler("root " + FORM))

    @signals.after_setup_task_logger.connect
    def _after_task(logger: logging.Logger, **_: Any) -> None:
        logger.addHandler(_handler("task " + FORM))


def _talk(word: str) -> None:
    task_logger.info("%s: by the task logger", word)
    task_logger.debug("%s: too quiet", word)
    other_logger.warning("%s: by another logger", word)
    # At once, also where stdout has no buffer: else a line from elsewhere may come in between.
    sys.stdout.write(f"{word}: printed\n")
    print(f"{word}: printed as an error", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn(f"{word}: a warning", stacklevel=1)
    try:
        raise LookupError(word)
    except LookupError:
        task_logger.exception("%s: with a traceback", word)


@app.task
def mark(word: str) -> None:
    """Write to the terminal itself, however logging is set up."""
    os.write(1, f"{word}\n".encode())


@app.task
def plain_talk(word: str) -> None:
    _talk(word)


@app.task(base=IsolatedTask)
def talk(word: str) -> None:
    _talk(word)


@app.task(base=IsolatedTask, start_method="spawn")
def spawned_talk(word: str) -> None:
    _talk(word)
