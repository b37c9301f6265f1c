"""A row of the table, and the tasks that rows send.

A module of rows is imported by pytest and by both workers. So tasks belong to no app here: `task`
only collects them, and each app gets its own from `make_contract_app`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from celery import Celery
from kombu.utils.imports import symbol_by_name

from contract import recorder
from harness.app import Settings

#: What one side has shown of one row; see `contract.observation`.
Seen = dict[str, Any]

_definitions: "dict[str, Definition]" = {}


@dataclass(frozen=True)
class Definition:
    """A task as each app has it."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    mixins: tuple[type, ...]

    def on(self, app: Celery) -> Any:
        """The task, as `app` has it."""
        return app.tasks[self.name]

    def add_to(self, app: Celery, *, shared: bool) -> None:
        options = {"name": self.name, "shared": shared, **self.options}
        if self.mixins:
            bases = (*self.mixins, symbol_by_name(app.task_cls))
            options["base"] = type("ContractTask", bases, {"abstract": True})
        app.task(**options)(self.function)


def task(
    *, hooks: bool = True, mixins: tuple[type, ...] = (), **options: Any
) -> Callable[[Callable[..., Any]], Definition]:
    """Collect a task; the options are those of ``@app.task``.

    Args:
        hooks: whether the calls of `before_start`, `on_success` and so on are recorded, by
            overriding them; Celery treats some tasks differently that have none.
        mixins: classes to put before the app's own task class.
    """

    def collect(function: Callable[..., Any]) -> Definition:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        all_mixins = (*mixins, *([recorder.Hooks] if hooks else []))
        definition = Definition(name, function, options, all_mixins)
        assert name not in _definitions, f"two tasks are called {name}"
        _definitions[name] = definition
        return definition

    return collect


def make_contract_app(main: str, settings: Settings, *, task_cls: str, current: bool) -> Celery:
    """Make an app whose tasks are all of `task_cls`, with the tasks of all rows."""
    modules()
    app = Celery(main, task_cls=task_cls, set_as_current=current)
    app.conf.update(settings.celery_conf())
    # Celery's own unsubscribes from Redis. Where the garbage collector calls it in the middle of
    # another command, that waits for ever for the lock of redis-py 5, in a worker too.
    app.AsyncResult.__del__ = lambda result: None
    for definition in _definitions.values():
        # Shared tasks belong to every app of the process: a spawned pool process has another app
        # than the one that its import of this module makes, and pytest must not have them in all.
        definition.add_to(app, shared=current)
    return app


@dataclass(frozen=True)
class Differs:
    """A difference that is meant to be; docs/explanation/differences.md lists them.

    Args:
        reason: why, in a sentence.
        isolated: what is expected of the isolated side, as `Row.expects` is of the plain one.
        only: the parts that differ, such as ``("log",)``; the others are still compared. Empty:
            nothing is compared.
    """

    reason: str
    isolated: Mapping[str, Any]
    only: tuple[str, ...] = ()


#: All pools but the spawned one, whose processes know less of their worker than a child does: which
#: queues it consumes from, and which app is the current one.
BUT_SPAWNED = ("prefork", "threads", "gevent", "eventlet", "solo")


@dataclass(frozen=True)
class Row:
    """Something that a task may do, or a caller may see.

    Args:
        name: a sentence.
        send: does it, in the client. Returns a result, or any other value; what it raises is
            compared too.
        expects: what the plain side shows, see `contract.observation.check`: without it, a row in
            which nothing happens would be the same on both sides.
        follow: called with the app and what `send` returned, after all rows have been sent, while
            the workers run. Its value is compared.
        look: the same, when all tasks have ended.
        trap: the trap of this number in the list of how a naive isolation breaks tasks.
        brokers: where it runs.
        pools: where it runs; None means in all.
        scrub: pattern and replacement for text that differs from run to run.
        differs: set where the two sides are meant to differ.
        plain: False keeps a row from the plain side, where it would end the worker; then `expects`
            is not looked at and `differs` says what is expected.
    """

    name: str
    send: Callable[[Celery], Any]
    expects: Mapping[str, Any]
    follow: Callable[[Celery, Any], Any] | None = None
    look: Callable[[Celery, Any], Any] | None = None
    trap: int | None = None
    brokers: tuple[str, ...] = ("redis",)
    pools: tuple[str, ...] | None = None
    scrub: tuple[tuple[str, str], ...] = field(default=())
    differs: Differs | None = None
    plain: bool = True

    def __post_init__(self) -> None:
        assert self.expects, f"row {self.name!r} expects nothing, so it could not fail"
        assert self.plain or self.differs, f"row {self.name!r} is not run where it is plain"

    def runs_in(self, pool: str, broker: str) -> bool:
        return broker in self.brokers and (self.pools is None or pool in self.pools)


def modules() -> list[ModuleType]:
    """Every module of rows, imported."""
    return list(_import_modules())


def _import_modules() -> Iterator[ModuleType]:
    package = importlib.import_module("rows")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        yield importlib.import_module(f"rows.{module.name}")


def all_rows() -> list[Row]:
    """The rows of every module, in order."""
    return [row for module in modules() for row in getattr(module, "ROWS", ())]
