"""The bootstep: starts the forkserver before the pool, replaces it if it dies, stops it last."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.concurrency import solo

import isolated_tasks.remote  # noqa: F401  # its commands are there once it is imported
from isolated_tasks import requester, settings
from isolated_tasks.errors import ForkserverError
from isolated_tasks.task import IsolatedMixin

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

    from isolated_tasks.process.children import Children
    from isolated_tasks.process.launcher import Launcher
    from isolated_tasks.prometheus import MetricsServer

__all__ = ["IsolationStep"]

logger = logging.getLogger(__name__)

#: Where there is no event loop to say that the forkserver is gone, it is looked at this often.
CHECK_SECONDS = 0.5

#: Where there is one, it still does not say when a forkserver has stopped answering.
LIVENESS_SECONDS = 5.0

#: A forkserver that takes no more requests to stop calls is asked again after this long.
BACKLOG_SECONDS = 0.05


class IsolationStep(bootsteps.StartStopStep):
    """Starts the forkserver before the pool, replaces it if it dies, stops it last."""

    name = "isolation"
    label = "Isolation"

    def __init__(self, parent: WorkController, **options: Any) -> None:
        super().__init__(parent, **options)
        self.launcher: Launcher | None = None
        self._reload: Callable[..., Any] = lambda: None
        self._children: Children | None = None
        self._metrics: MetricsServer | None = None
        self._clock: Any = None
        #: When a forkserver that takes no more is to be asked again, with some to spare.
        self._asks_at = 0.0
        self._timer: Any = None
        self._watched: set[int] = set()

    def include_if(self, parent: WorkController) -> bool:
        """Whether this app has an isolated task at all."""
        return bool(_isolated_tasks(parent.app))

    def include(self, parent: WorkController) -> bool:
        """Take part, as the first step to start and the last to stop.

        Celery sorts steps by their requirements, and those without any in an order that depends on
        the hash seed. But the forkserver has to outlive the pool, whose tasks it serves.
        """
        included: bool = super().include(parent)
        if included:
            parent.steps.remove(self)
            parent.steps.insert(0, self)
        return included

    def create(self, parent: WorkController) -> IsolationStep:
        """Start the forkserver.

        Here and not in `start`: logging is set up, nothing has been forked yet, and it loads the
        app while the worker does the rest.
        """
        app = parent.app
        for task in _isolated_tasks(app):
            settings.check_task(task)
        self.launcher = requester.new_launcher(app, hostname=parent.hostname)
        # Before anything is started: it raises where the package that it needs is not there.
        self._metrics = _serve_metrics(app)
        _warn_of_the_budget(app, self.launcher.plan.memory_budget_bytes)
        self.launcher.on_backlog = functools.partial(self._ask_again, parent)
        self.launcher.start()
        requester.announce(app, self.launcher)
        # A pool process has one slot, and begins anew; all others are slots of this process.
        self._children = requester.children()
        self._children.count_slots = lambda: _count_slots(parent)
        # `pool_restart` calls it; there is no hook.
        self._reload, parent.reload = parent.reload, functools.partial(self._replace, parent)
        return self

    def _replace(self, parent: WorkController, *arguments: Any, **keywords: Any) -> Any:
        """Have bodies run the code as it is now, as the new pool processes do."""
        result = self._reload(*arguments, **keywords)
        if self.launcher is not None:
            self._call_again(parent, self.launcher.replace("pool_restart", at_once=True))
        if self._children is not None:
            self._children.renew()
        return result

    def start(self, parent: WorkController) -> None:
        """Wait until the forkserver has loaded, so that no task is taken that it cannot serve.

        Raises:
            ForkserverError: It died over it, or took too long; the worker does not start.
        """
        assert self.launcher is not None
        try:
            self.launcher.wait_loaded(settings.worker_settings(parent.app).boot_timeout)
        except ForkserverError:
            self.stop(parent)
            raise
        if getattr(parent, "hub", None) is None:
            self._wind_up(parent, CHECK_SECONDS)

    def register_with_event_loop(self, parent: WorkController, hub: Any) -> None:
        """Be told by the event loop when a forkserver speaks or dies.

        Called whenever the loop begins; it forgets its descriptors when the broker is lost.
        """
        self._watched.clear()
        # Celery before 5.6.2 drops all timers as well, that of a start which was put off too.
        self._wind_up(parent, LIVENESS_SECONDS)
        if self.launcher is not None:
            # A slot of this process may be the first to see that a forkserver is gone.
            self.launcher.on_launch = lambda: hub.call_soon(self._on_readable, hub, parent)
        hub.call_soon(self._on_readable, hub, parent)

    def stop(self, parent: WorkController) -> None:
        """Stop the forkserver, and with it whatever children there are."""
        for timer in (self._clock, self._timer):
            if timer is not None:
                timer.cancel()
        self._clock = self._timer = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._children is not None:
            self._children.close()
        if self.launcher is not None:
            self._unwatch(getattr(parent, "hub", None))
            self.launcher.stop()
            requester.withdraw(parent.app, self.launcher)
            self.launcher = None

    terminate = stop

    # ── watching ────────────────────────────────────────────────────────────────────────────────

    def _watch(self, hub: Any, parent: WorkController) -> None:
        if self.launcher is not None:
            for descriptor in self.launcher.descriptors():
                hub.add_reader(descriptor, self._on_readable, hub, parent)
                self._watched.add(descriptor)

    def _unwatch(self, hub: Any) -> None:
        for descriptor in self._watched:
            # One that a slot has closed may be somebody else's by now.
            if hub.readers.get(descriptor, (None,))[0] == self._on_readable:
                hub.remove_reader(descriptor)
        self._watched.clear()

    def _wind_up(self, parent: WorkController, seconds: float) -> None:
        """Have the forkservers looked at now and then."""
        if self._clock is not None:
            self._clock.cancel()
        self._clock = parent.timer.call_repeatedly(seconds, self._check, (parent,))

    def _ask_again(self, parent: WorkController) -> None:
        """A forkserver does not take what it is to be told: try again soon, once for all of it."""
        now = time.monotonic()
        # Should the timer be dropped, the next one is set after a while all the same.
        if now >= self._asks_at:
            self._asks_at = now + 20 * BACKLOG_SECONDS
            parent.timer.call_after(BACKLOG_SECONDS, self._check, (parent,))

    def _check(self, parent: WorkController) -> None:
        self._asks_at = 0.0
        if self.launcher is not None:
            self._call_again(parent, self.launcher.check())

    def _on_readable(self, hub: Any, parent: WorkController) -> None:
        # The descriptors change with the forkservers, and a closed one must not stay in the hub.
        self._unwatch(hub)
        if self.launcher is None:
            return
        wait = self.launcher.check()
        self._watch(hub, parent)
        self._call_again(parent, wait)

    def _call_again(self, parent: WorkController, wait: float | None) -> None:
        """Look again when a forkserver that could not be started is to be tried again."""
        hub = getattr(parent, "hub", None)
        # Where there is no event loop a timer does so anyway.
        if wait is not None and hub is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = parent.timer.call_after(wait, self._on_readable, (hub, parent))


def _isolated_tasks(app: Celery) -> list[IsolatedMixin]:
    tasks = [task for task in app.tasks.values() if isinstance(task, IsolatedMixin)]
    return [task for task in tasks if settings.is_isolated(task)]


def _serve_metrics(app: Celery) -> MetricsServer | None:
    chosen = settings.worker_settings(app)
    if chosen.prometheus_port is None:
        return None
    # Here and not above: what it needs is an extra.
    from isolated_tasks import prometheus

    return prometheus.serve(chosen.prometheus_host, chosen.prometheus_port)


def _warn_of_the_budget(app: Celery, budget_bytes: int | None) -> None:
    """Say which tasks the memory budget does nothing for."""
    if budget_bytes is None:
        return
    unlimited, too_large = [], []
    for task in sorted(_isolated_tasks(app), key=lambda task: task.name):
        ladder = settings.memory_ladder(task)
        if not ladder:
            unlimited.append(task.name)
        # A step with a queue may be for other workers.
        elif any(step.limit_bytes > budget_bytes and not step.queue for step in ladder):
            too_large.append(task.name)
    if unlimited:
        logger.warning(
            "isolated_memory_budget: tasks without a memory_limit do not count: %s",
            ", ".join(unlimited),
        )
    if too_large:
        logger.warning(
            "isolated_memory_budget, %.0f MiB, is below the memory_limit of %s",
            budget_bytes / 2**20,
            ", ".join(too_large),
        )


def _count_slots(parent: WorkController) -> int:
    """How many calls the pool makes at a time, now."""
    if issubclass(parent.pool_cls, solo.TaskPool):
        return 1
    # Autoscaling and `pool_grow` change it.
    limit = getattr(parent.pool, "limit", None)
    return max(1, limit or parent.concurrency or 1)
