"""What the slots of a process share: its children, and the way to a forkserver.

A worker's main process has one launcher, made by its bootstep. The slots find the forkserver
through the environment, whether they are threads or greenlets of the main process, or pool
processes that were forked or spawned from it. A process without a worker (``isolated_eager``) gets
a launcher of its own when it first needs one.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Any

from celery import signals

from isolated_tasks import body, settings
from isolated_tasks.errors import ForkserverError
from isolated_tasks.process import memory
from isolated_tasks.process.children import Children
from isolated_tasks.process.launcher import Launcher, Plan
from isolated_tasks.process.protocol import Stop

if TYPE_CHECKING:
    from celery import Celery

__all__ = [
    "PROPERTY",
    "address",
    "announce",
    "children",
    "is_worker",
    "launcher_of",
    "launchers",
    "memory_budget",
    "new_launcher",
    "stop_call",
    "withdraw",
]

#: The name in ``request.properties`` of what the main process tells the slot.
PROPERTY = "isolated_tasks"

#: Of the memory that is available when the worker starts, what ``"auto"`` leaves to the worker.
WORKER_SHARE = 0.1

#: What a forkserver gets to answer at least, in seconds: a machine may be busy for a while.
LEAST_PATIENCE = 10.0

#: ``<pid of the main process>:<path of the socket>``. The pid tells a pool process of that worker
#: from any other program that happens to be started below it and inherits the environment.
ADDRESS_VARIABLE = "ISOLATED_TASKS_ADDRESS"


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


def is_worker(app: Celery) -> bool:
    """Whether this is the main process of a worker of this app, or one of its pool processes."""
    owner, _, _ = os.environ.get(ADDRESS_VARIABLE, "").partition(":")
    return app in _process.launchers or owner == str(os.getppid())


def launchers() -> list[Launcher]:
    """The launchers of this process; one from each worker that it is the main process of."""
    return list(_process.launchers.values())


def address(app: Celery) -> str:
    """Where this process finds a forkserver.

    Raises:
        ForkserverError: This process needed one of its own, and it did not come up.
    """
    launcher = launcher_of(app)
    if launcher is not None:
        # In threads, greenlets and solo the slots live with the launcher, and the event loop that
        # would replace a dead forkserver may be waiting for this very call.
        launcher.check()
        return launcher.address
    owner, _, path = os.environ.get(ADDRESS_VARIABLE, "").partition(":")
    if path and owner == str(os.getppid()):
        return path
    return _own_launcher(app).address


def launcher_of(app: Celery) -> Launcher | None:
    """That of this process; None where it has none, as a pool process."""
    return _process.launchers.get(app)


def announce(app: Celery, launcher: Launcher) -> None:
    """Have the slots of this worker, in this process and in pool processes, use a launcher."""
    os.environ[ADDRESS_VARIABLE] = f"{os.getpid()}:{launcher.address}"
    _process.launchers[app] = launcher


def withdraw(app: Celery, launcher: Launcher) -> None:
    """Take `announce` back."""
    if _process.launchers.get(app) is launcher:
        del _process.launchers[app]
        os.environ.pop(ADDRESS_VARIABLE, None)


def _own_launcher(app: Celery) -> Launcher:
    """Start a forkserver for this process alone."""
    with _process.lock:
        if app not in _process.launchers:
            launcher = new_launcher(app, hostname="")
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


def new_launcher(app: Celery, *, hostname: str) -> Launcher:
    """A launcher, not yet started, for forkservers that load this app.

    Raises:
        OptionError: A setting has a value that cannot be used, or does not exist.
    """
    settings.check_settings(app)
    chosen = settings.worker_settings(app)
    title, argument = body.describe_app(app, hostname)
    return Launcher(
        Plan(
            preload=chosen.preload,
            setup="isolated_tasks.body:load_app",
            setup_name=title,
            setup_argument=argument,
            count=chosen.forkservers,
            memory_budget_bytes=memory_budget(chosen.memory_budget),
            max_starts=chosen.forkserver_max_calls,
            # So that a call which waits for it is served by the next one in time.
            patience=max(LEAST_PATIENCE, chosen.start_timeout / 3),
            # `Launcher.wait_loaded` is to be the first to lose patience with one that boots.
            boot_timeout=2 * chosen.boot_timeout,
        )
    )


def memory_budget(chosen: int | str | None) -> int | None:
    """What ``isolated_memory_budget`` comes to here and now, in bytes; None for no bound."""
    if chosen == "auto":
        return int(memory.available_bytes() * (1 - WORKER_SHARE))
    assert not isinstance(chosen, str)
    return chosen


def stop_call(
    app: Celery, call_id: str, signal: int, reason: str, *, keeps_outcome: bool = False
) -> None:
    """Have a call stopped, in whichever process of this worker it is; from the main process.

    Args:
        app: The worker's.
        call_id: As `CallOptions` has it.
        signal: What the body gets first.
        reason: For the log.
        keeps_outcome: Whether a call that has ended by then is none the worse for it.
    """
    launcher = launcher_of(app)
    if launcher is not None:
        launcher.stop_call(Stop(call_id, signal, reason, keeps_outcome))


@signals.worker_process_shutdown.connect
def _close_pool_process(**_: Any) -> None:
    # A pool process ends by os._exit, which would cut the lifelines of children in their exit
    # hooks.
    children().close()
