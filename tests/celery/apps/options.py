"""Tasks with options, from each place that they can come from."""

import contextlib
import contextvars
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.signals import celeryd_init
from celery.utils.log import get_task_logger

from harness import bodies
from harness.app import make_app
from isolated_tasks import IsolatedMixin, IsolatedTask

app: Celery = make_app(__name__)

logger = get_task_logger(__name__)


@celeryd_init.connect
def configure(conf: Any, **_: Any) -> None:
    """A setting that is in no file: only the worker's process has it."""
    conf.colour_at_run_time = "green"


# ── batches ─────────────────────────────────────────────────────────────────────────────────────


class InPairs(IsolatedTask):
    abstract = True
    batch_size = 2


@app.task(base=IsolatedTask)
def by_setting() -> int:
    return os.getpid()


@app.task(base=IsolatedTask, batch_size=3)
def by_decorator() -> int:
    return os.getpid()


@app.task(base=InPairs)
def by_class() -> int:
    return os.getpid()


@app.task(base=InPairs)
def by_annotation() -> int:
    return os.getpid()


@app.task(base=IsolatedTask, batch_size=100, batch_idle_timeout=0.2)
def not_idle_for_long() -> int:
    return os.getpid()


@app.task(base=IsolatedTask, batch_size=100, batch_memory_limit="200MB")
def hold(size: int) -> int:
    return bodies.hold(size)


# ── the process ─────────────────────────────────────────────────────────────────────────────────


@app.task(base=IsolatedTask, env={"COLOUR": "red"})
def red() -> dict[str, str | None]:
    return bodies.variables("COLOUR", "TASTE")


@app.task(base=IsolatedTask)
def tasteful() -> dict[str, str | None]:
    return bodies.variables("COLOUR", "TASTE")


@app.task(base=IsolatedTask, bind=True, start_method="spawn", env={"COLOUR": "blue"})
def spawned(self: Task, word: str) -> dict[str, Any]:
    logger.warning("%s: from a fresh interpreter", word)
    return {
        "id": self.request.id,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "frozen": gc.get_freeze_count(),
        "command": Path("/proc/self/cmdline").read_text().split("\0"),
        "setting": self.app.conf.get("colour_at_run_time"),
        "colour": os.environ.get("COLOUR"),
    }


@app.task(base=IsolatedTask, start_method="spawn")
def fail_when_spawned() -> None:
    raise LookupError("in vain")


@app.task(base=IsolatedTask, bind=True)
def setting_of_the_worker(self: Task) -> str | None:
    value: str | None = self.app.conf.get("colour_at_run_time")
    return value


@app.task(base=IsolatedTask)
def preloaded() -> dict[str, Any]:
    """Which module is here without having been imported here, and where it was imported."""
    module = sys.modules.get("preload_well")
    return {
        "pid": getattr(module, "pid", None),
        "parent": os.getppid(),
        "bad": "preload_badly" in sys.modules,
    }


# ── another base ────────────────────────────────────────────────────────────────────────────────

context: contextvars.ContextVar[int] = contextvars.ContextVar("context", default=0)


@contextlib.contextmanager
def app_context() -> Iterator[None]:
    """Stands for that of a web framework."""
    token = context.set(os.getpid())
    try:
        yield
    finally:
        context.reset(token)


class InContext(Task):
    """As Flask's documentation has it."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return self.run(*args, **kwargs)


class InContextBySuper(Task):
    """As Celery's documentation would have it."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return super().__call__(*args, **kwargs)


class IsolatedInContext(IsolatedMixin, InContext):
    abstract = True


class IsolatedInContextBySuper(IsolatedMixin, InContextBySuper):
    abstract = True


def look_around(self: Task, retries: int) -> dict[str, Any]:
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return {
        "context": context.get(),
        "pid": os.getpid(),
        "id": self.request.id,
        "launched": by_setting.delay().id,
    }


@app.task(base=IsolatedInContext, bind=True)
def in_context(self: Task, retries: int) -> dict[str, Any]:
    return look_around(self, retries)


@app.task(base=IsolatedInContextBySuper, bind=True)
def in_context_by_super(self: Task, retries: int) -> dict[str, Any]:
    return look_around(self, retries)
