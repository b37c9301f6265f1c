"""The bootstep: starts the forkserver before the pool, replaces it if it dies, stops it last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.concurrency import solo

from isolated_tasks import requester, settings
from isolated_tasks.errors import ForkserverError
from isolated_tasks.task import IsolatedMixin

if TYPE_CHECKING:
    from celery.worker import WorkController

    from isolated_tasks.process.children import Children
    from isolated_tasks.process.launcher import Launcher

__all__ = ["IsolationStep"]

#: Where there is no event loop to say that the forkserver is gone, it is looked at this often.
CHECK_SECONDS = 0.5


class IsolationStep(bootsteps.StartStopStep):
    """Starts the forkserver before the pool, replaces it if it dies, stops it last."""

    name = "isolation"
    label = "Isolation"

    def __init__(self, parent: WorkController, **options: Any) -> None:
        super().__init__(parent, **options)
        self.launcher: Launcher | None = None
        self._children: Children | None = None
        self._timer: Any = None
        self._watched: set[int] = set()

    def include_if(self, parent: WorkController) -> bool:
        """Whether this app has an isolated task at all."""
        tasks = [task for task in parent.app.tasks.values() if isinstance(task, IsolatedMixin)]
        return any(settings.is_isolated(task) for task in tasks)

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
        for task in app.tasks.values():
            self._check_options(task)
        self.launcher = requester.new_launcher(app, hostname=parent.hostname)
        self.launcher.start()
        requester.announce(app, self.launcher)
        # A pool process has one slot, and begins anew; all others are slots of this process.
        self._children = requester.children()
        is_solo = issubclass(parent.pool_cls, solo.TaskPool)
        self._children.slots = 1 if is_solo else max(1, parent.concurrency or 1)
        return self

    def _check_options(self, task: Any) -> None:
        if isinstance(task, IsolatedMixin) and settings.is_isolated(task):
            settings.process_options(task)

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
            self._timer = parent.timer.call_repeatedly(CHECK_SECONDS, self._check)

    def register_with_event_loop(self, parent: WorkController, hub: Any) -> None:
        """Be told by the event loop when a forkserver speaks or dies.

        Called whenever the loop begins; it forgets its descriptors when the broker is lost.
        """
        self._watched.clear()
        self._watch(hub, parent)
        if self.launcher is not None:
            # A slot of this process may be the first to see that a forkserver is gone.
            self.launcher.on_launch = lambda: hub.call_soon(self._on_readable, hub, parent)

    def stop(self, parent: WorkController) -> None:
        """Stop the forkserver, and with it whatever children there are."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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

    def _check(self) -> None:
        if self.launcher is not None:
            self.launcher.check()

    def _on_readable(self, hub: Any, parent: WorkController) -> None:
        # The descriptors change with the forkservers, and a closed one must not stay in the hub.
        self._unwatch(hub)
        if self.launcher is None:
            return
        wait = self.launcher.check()
        self._watch(hub, parent)
        if wait is not None:
            self._timer = parent.timer.call_after(wait, self._on_readable, (hub, parent))
