"""A worker in a thread of the tests' process, whose isolated tasks really isolate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery import _state
from celery.contrib.testing import worker as contrib
from celery.worker import state

from isolated_tasks import settings
from isolated_tasks.errors import ForkserverError, OptionError
from isolated_tasks.testing import databases

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

__all__ = ["changed", "in_place", "start_worker"]

#: The transport in memory looks for messages this often, in seconds; its default is 1.
POLLING_SECONDS = 0.01

#: Pools whose slots are in the process of the tests.
POOLS = ("solo", "threads")


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Have isolated tasks of this process run where they are called, as if they were plain.

    That is in the worker's thread for one that was sent to an embedded worker, and in the test's
    own for ``apply()`` and ``task_always_eager``, also with ``isolated_eager``. Debuggers, mocks
    and coverage see the body; memory limits and the like do not apply. A worker that starts
    meanwhile has no forkserver. Not for workers in other processes.
    """
    with settings.nothing_isolated():
        yield


@contextlib.contextmanager
def start_worker(
    app: Celery,
    *,
    pool: str = "solo",
    concurrency: int = 1,
    start_timeout: float = 60.0,
    shutdown_timeout: float = 10.0,
    **options: Any,
) -> Iterator[WorkController]:
    """Run a worker in a thread of this process, whose isolated tasks run in children.

    As ``celery.contrib.testing.worker.start_worker``, of which it is made, with these differences:

    * an app that has no broker, or no result backend, gets one in memory;
    * ``task_always_eager`` is off while it runs: calls go through the worker;
    * it sets up no logging: that is left to the tests;
    * current and default app are afterwards what they were;
    * where Django runs on test databases, children use these too;
    * a worker that cannot start is an error, and does not hang.

    Tasks that are defined when it runs already are known to it after ``worker.reload()``.

    Args:
        app: Whose tasks it runs.
        pool: ``"solo"``, or ``"threads"``. Default: ``"solo"``, one call at a time.
        concurrency: How many calls at a time, with ``"threads"``. Default: 1.
        start_timeout: The worker, with its forkserver, may take this long to be ready, in seconds.
            Default: 60.
        shutdown_timeout: Running tasks may take this long to end when it stops, in seconds.
            Default: 10.
        **options: Further ones of ``app.Worker``: ``queues=["a", "b"]``.

    Yields:
        The worker.

    Raises:
        OptionError: An argument, an option of a task or a setting cannot be used.
        ForkserverError: The worker has not come up in time; its log says why.
        RuntimeError: It has not stopped in time.
    """
    if pool not in POOLS:
        raise _refusal("pool", pool, f"must be {' or '.join(map(repr, POOLS))}")
    _check_count("concurrency", concurrency)
    _check_seconds("start_timeout", start_timeout)
    _check_seconds("shutdown_timeout", shutdown_timeout)

    class Worker(_Worker):
        seconds = start_timeout

    with (
        _apps_kept(),
        _logging_left_alone(app),
        changed(app, **(wanted := _test_settings(app))),
        _connected_anew(app, wanted),
        databases.carried(app),
        contrib.start_worker(
            app,
            pool=pool,
            concurrency=concurrency,
            perform_ping_check=False,
            shutdown_timeout=shutdown_timeout,
            WorkController=Worker,
            **options,
        ) as worker,
    ):
        try:
            yield worker
        finally:
            _wake(app, worker)


def _wake(app: Celery, worker: WorkController) -> None:
    """Have it see that it is to stop: it looks when a message comes, or after two seconds."""
    state.should_terminate = 0
    # Whatever the broker says: it stops then too, later.
    with contextlib.suppress(Exception):
        app.control.broadcast("ping", destination=[worker.hostname])


class _Worker(contrib.TestWorkController):
    """A worker that says so when it cannot start; Celery's has whoever waits for it hang."""

    seconds: float
    _failed = False

    def start(self) -> None:
        try:
            super().start()
        finally:
            # Too late to matter, where it has been ready.
            self._failed = not self._on_started.is_set()
            self._on_started.set()

    def ensure_started(self) -> None:
        began = time.monotonic()
        is_set = self._on_started.wait(self.seconds)
        if is_set and not self._failed:
            return
        if not is_set:
            # In a thread of its own, which ends with the process at the latest.
            self.stop()
        raise ForkserverError(
            f"app {self.app.main!r}: the embedded worker is not ready after"
            f" {time.monotonic() - began:.1f} s (start_timeout={self.seconds:g}): its broker does"
            " not answer, or its forkserver does not load the app; its log says which"
        )


def _test_settings(app: Celery) -> dict[str, Any]:
    conf = app.conf
    wanted: dict[str, Any] = {"task_always_eager": False}
    if not (conf.broker_url or conf.broker_read_url or conf.broker_write_url):
        wanted["broker_url"] = "memory://localhost//"
    if not conf.result_backend:
        wanted["result_backend"] = "cache+memory://"
    broker = str(wanted.get("broker_url", conf.broker_url or ""))
    transport = dict(conf.broker_transport_options or {})
    if broker.startswith("memory") and "polling_interval" not in transport:
        wanted["broker_transport_options"] = {**transport, "polling_interval": POLLING_SECONDS}
    return wanted


@contextlib.contextmanager
def changed(app: Celery, **values: Any) -> Iterator[None]:
    """Change settings of an app for a while."""
    # Before the configuration is read there are no changes; asking for anything has it read.
    _ = app.conf.timezone
    changes = app.conf.changes
    before = dict(changes)
    for name, value in values.items():
        app.conf[name] = value
    # Celery may keep them under other names.
    touched = {n for n in changes if n not in before or changes[n] is not before[n]}
    try:
        yield
    finally:
        for name in touched:
            if name in before:
                changes[name] = before[name]
            else:
                changes.pop(name, None)


@contextlib.contextmanager
def _connected_anew(app: Celery, wanted: Mapping[str, Any]) -> Iterator[None]:
    """Have the app forget, for a while, the backend and the pools that other settings made."""
    if "result_backend" in wanted:
        shared, own = app._backend_cache, getattr(app._local, "backend", None)
        app._backend_cache = app._local.backend = None
    if "broker_url" in wanted:
        _forget_pools(app)
    try:
        yield
    finally:
        if "result_backend" in wanted:
            app._backend_cache, app._local.backend = shared, own
        if "broker_url" in wanted:
            _forget_pools(app)


def _forget_pools(app: Celery) -> None:
    # As Celery does after a fork: they are kept by URL elsewhere.
    app._pool = None
    app.amqp._producer_pool = None


@contextlib.contextmanager
def _apps_kept() -> Iterator[None]:
    current, default = _state._tls.current_app, _state.default_app
    try:
        yield
    finally:
        _state._tls.current_app = current
        _state.set_default_app(default)


@contextlib.contextmanager
def _logging_left_alone(app: Celery) -> Iterator[None]:
    # Celery's set-up would take the handlers of pytest from the root logger, change its level, and
    # have warnings logged.
    log, cls = app.log, type(app.log)
    was_set_up = cls._setup
    vars(log)["setup"] = lambda *arguments, **keywords: None
    try:
        yield
    finally:
        del vars(log)["setup"]
        cls._setup = was_set_up


def _check_count(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(option, value, "must be a whole number above 0")


def _check_seconds(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _refusal(option, value, "must be a number of seconds above 0")


def _refusal(option: str, value: object, rule: str) -> OptionError:
    return OptionError(
        f"start_worker: {option}={value!r}: {rule}",
        {"task": None, "option": option, "value": repr(value)},
    )
