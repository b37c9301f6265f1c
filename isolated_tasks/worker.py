"""The bootstep that starts and stops the forkserver, and what the slots of a process share.

A worker's main process has one launcher, made by the bootstep. Its slots find the forkserver
through the environment, whether they are threads or greenlets of the main process, or pool
processes that were forked or spawned from it. A process without a worker (``isolated_eager``) gets
a launcher of its own when it first needs one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals

from isolated_tasks import body, settings
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process.children import Children
from isolated_tasks.process.launcher import Launcher, Plan

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

__all__ = ["ADDRESS_VARIABLE", "IsolationStep", "address", "children", "install"]

logger = logging.getLogger(__name__)

#: ``<pid of the main process>:<path of the socket>``. The pid tells a pool process of that worker
#: from any other program that happens to be started below it and inherits the environment.
ADDRESS_VARIABLE = "ISOLATED_TASKS_ADDRESS"

#: Where there is no event loop to say that the forkserver is gone, it is looked at this often.
CHECK_SECONDS = 0.5


# ── what the slots of a process share ───────────────────────────────────────────────────────────


class _Process:
    """The state of this process; a forked one begins anew."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.children = Children()
        #: By app: a test suite may have several, with a worker for each.
        self.launchers: dict[Celery, Launcher] = {}


_process = _Process()


def _begin_anew() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_begin_anew)


def children() -> Children:
    """The children of this process."""
    return _process.children


def address(app: Celery) -> str:
    """Where this process finds a forkserver.

    Raises:
        ForkserverError: This process needed one of its own, and it did not come up.
    """
    launcher = _process.launchers.get(app)
    if launcher is not None:
        # In threads, greenlets and solo the slots live with the launcher, and the event loop that
        # would replace a dead forkserver may be waiting for this very call.
        launcher.check()
        return launcher.address
    owner, _, path = os.environ.get(ADDRESS_VARIABLE, "").partition(":")
    if path and owner == str(os.getppid()):
        return path
    return _own_launcher(app).address


def _own_launcher(app: Celery) -> Launcher:
    """Start a forkserver for this process alone."""
    with _process.lock:
        if app not in _process.launchers:
            launcher = _launcher(app, hostname="")
            launcher.start()
            try:
                launcher.wait_loaded(settings.worker_settings(app).boot_timeout)
            except ForkserverError:
                launcher.stop()
                raise
            _process.launchers[app] = launcher
            atexit.register(_close, app, _process)
        return _process.launchers[app]


def _close(app: Celery, process: _Process) -> None:
    if process is _process:
        process.children.close()
        process.launchers.pop(app).stop()


def _launcher(app: Celery, hostname: str) -> Launcher:
    chosen = settings.worker_settings(app)
    title, argument = body.describe_app(app, hostname)
    return Launcher(
        Plan(
            preload=chosen.preload,
            setup="isolated_tasks.body:load_app",
            setup_name=title,
            setup_argument=argument,
            count=chosen.forkservers,
        )
    )


@signals.worker_process_shutdown.connect
def _close_pool_process(**_: Any) -> None:
    # A pool process ends by os._exit, which would cut the lifelines of children in their exit
    # hooks.
    children().close()


# ── the bootstep ────────────────────────────────────────────────────────────────────────────────


def install(app: Celery) -> None:
    """Give workers of this app the bootstep; as often as one likes."""
    app.steps["worker"].add(IsolationStep)


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
        from isolated_tasks.task import IsolatedMixin

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
        self.launcher = _launcher(app, parent.hostname)
        self.launcher.start()
        os.environ[ADDRESS_VARIABLE] = f"{os.getpid()}:{self.launcher.address}"
        _process.launchers[app] = self.launcher
        # A pool process has one slot, and begins anew; all others are slots of this process.
        self._children = _process.children
        self._children.slots = max(1, parent.concurrency or 1)
        return self

    def _check_options(self, task: Any) -> None:
        from isolated_tasks.task import IsolatedMixin

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
            if _process.launchers.get(parent.app) is self.launcher:
                del _process.launchers[parent.app]
                os.environ.pop(ADDRESS_VARIABLE, None)
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
