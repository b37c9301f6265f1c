"""Tasks of a class with a ``__call__`` of its own, and what a child has been given."""

import os
import sys

from celery import Task

from harness.app import make_app
from isolated_tasks import IsolatedTask

app = make_app(__name__)


class Around(IsolatedTask):
    abstract = True

    def __call__(self, *args: object, **kwargs: object) -> object:
        return [os.getpid(), super().__call__(*args, **kwargs)]


class AroundWithoutSuper(IsolatedTask):
    """As Flask's documentation has it."""

    abstract = True

    def __call__(self, *args: object, **kwargs: object) -> object:
        return [os.getpid(), self.run(*args, **kwargs)]


class Plain(Task):
    """Somebody's base class that knows nothing of isolation."""

    abstract = True

    def __call__(self, *args: object, **kwargs: object) -> object:
        return [os.getpid(), super().__call__(*args, **kwargs)]


class AroundByAnotherBase(Plain, IsolatedTask):
    abstract = True


@app.task(base=Around)
def around() -> int:
    return os.getpid()


@app.task(base=AroundWithoutSuper)
def around_without_super() -> int:
    return os.getpid()


@app.task(base=AroundByAnotherBase)
def around_by_another_base() -> int:
    return os.getpid()


@app.task
def slot_pid() -> int:
    return os.getpid()


@app.task(base=IsolatedTask)
def is_preloaded() -> bool:
    return "preload_well" in sys.modules
