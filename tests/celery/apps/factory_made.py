"""An app whose tasks are made when a worker begins: no import makes them."""

import os
from collections.abc import Callable
from typing import Any

from celery import signals

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)

UNIT = "apples"


def label(number: int) -> str:
    return f"{number} {UNIT}"


def make(factor: int) -> Any:
    @app.task(base=IsolatedTask, name=f"{__name__}.times_{factor}")
    def times(number: int) -> list[object]:
        return [label(number * factor), os.getpid()]

    return times


def make_caller(called: Callable[[int], list[object]]) -> Any:
    @app.task(base=IsolatedTask, name=f"{__name__}.call_another")
    def call_another(number: int) -> list[object]:
        return [called(number), os.getpid()]

    return call_another


@signals.celeryd_init.connect
def make_all(**_: object) -> None:
    make_caller(make(3))
    make(4)
