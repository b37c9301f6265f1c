"""Role: main process. Starts forkservers, hears what they loaded, replaces those that die.

The launcher owns the listening socket, so that requests wait in its queue while a dead forkserver
is being replaced, and several forkservers can take from one queue. It starts them by
``posix_spawn``: nothing of the main process, which may be large, threaded or patched by gevent, is
copied for that. There is no thread here either; `Launcher.check` is to be called when one of
`Launcher.descriptors` becomes readable, or now and then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from isolated_tasks.errors import ForkserverError, ProtocolError
from isolated_tasks.process import preload, protocol, system
from isolated_tasks.process.protocol import Boot, Loaded
from isolated_tasks.process.transport import Channel, Lifeline, own

__all__ = ["Launcher", "Plan"]

logger = logging.getLogger(__name__)

#: Connections that may wait; the kernel cuts this down to net.core.somaxconn (listen(2)).
BACKLOG = 4096

#: Between two starts of a forkserver that dies before it has loaded, in seconds: this, then twice
#: as much each time, up to the last.
FIRST_DELAY = 0.5
LAST_DELAY = 30.0

#: For a forkserver to read what it is to load, in seconds; it does so as it starts.
SEND_TIMEOUT = 10.0

#: What a forkserver gets to end its children when it is told to stop, in seconds.
STOP_TIMEOUT = 5.0

#: What must not reach a forkserver: it would make Celery's ``@app.task`` bind differently.
_UNWANTED_VARIABLES = ("FORKED_BY_MULTIPROCESSING",)


@dataclass(frozen=True)
class Plan:
    """What forkservers are to load."""

    #: Modules, in this order, after ``setup``.
    preload: Sequence[str] = ()
    #: ``"module:function"``, called with ``setup_argument`` in each forkserver; may be empty.
    setup: str = ""
    #: The title of what ``setup`` loads, for reports.
    setup_name: str = ""
    setup_argument: bytes = b""
    #: How many forkservers take requests.
    count: int = 1


class _Server:
    """One forkserver, from this side."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.channel: Channel | None = None
        self.lifeline: Lifeline | None = None
        self.loaded: Loaded | None = None
        self.failures = 0
        self.not_before = 0.0

    def hang_up(self) -> None:
        """Close our ends, which is how a forkserver is told to stop."""
        if self.channel is not None:
            self.channel.close()
        if self.lifeline is not None:
            self.lifeline.close()
        self.channel = self.lifeline = None


class Launcher:
    """The forkservers of one main process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        #: Where requesters connect; empty until `start`.
        self.address = ""
        self._owner = os.getpid()
        self._directory = ""
        self._listener: socket.socket | None = None
        self._servers = [_Server(number) for number in range(1, plan.count + 1)]
        #: Called when a forkserver has been started: `descriptors` has changed.
        self.on_launch: Callable[[], object] = lambda: None
        self._stopped = False
        self._lock = threading.RLock()

    def start(self) -> None:
        """Open the socket and start the forkservers; does not wait until they have loaded.

        Raises:
            OSError: No directory, no socket or no process could be made.
        """
        self._directory = _private_directory()
        self.address = os.path.join(self._directory, "forkserver.sock")
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(self.address)
            self._listener.listen(BACKLOG)
            own(self)
            for server in self._servers:
                self._launch(server)
        except BaseException:
            self.stop()
            raise

    def descriptors(self) -> list[int]:
        """What becomes readable when `check` has something to do."""
        channels = [server.channel for server in self._servers]
        return [channel.fileno() for channel in channels if channel and not channel.at_eof]

    def loaded(self) -> list[Loaded]:
        """What the forkservers that are ready have loaded."""
        return [server.loaded for server in self._servers if server.loaded is not None]

    def pids(self) -> list[int]:
        """The forkservers that live, as far as is known."""
        return [server.pid for server in self._servers if server.pid]

    def wait_loaded(self, timeout: float) -> None:
        """Wait until every forkserver has loaded.

        Args:
            timeout: In seconds.

        Raises:
            ForkserverError: One died over it, or the time was not enough.
        """
        deadline = time.monotonic() + timeout
        while any(server.loaded is None for server in self._servers):
            failed = [server for server in self._servers if server.failures]
            if failed:
                raise ForkserverError(
                    "the forkserver died while it loaded the app and isolated_preload; "
                    "its own output says why",
                    {"address": self.address},
                )
            left = deadline - time.monotonic()
            if left <= 0:
                self._abort_loading()
                raise ForkserverError(
                    f"the forkserver has not loaded the app and isolated_preload within "
                    f"{timeout:g} s (isolated_boot_timeout); its own output says where it is",
                    {"address": self.address},
                )
            _wait(self.descriptors(), selectors.EVENT_READ, left)
            self.check()

    def check(self) -> float | None:
        """Hear what the forkservers say; replace those that have died.

        Returns:
            In how many seconds to call again because a replacement has to wait; None if none has.
        """
        with self._lock:
            if self._stopped or self._owner != os.getpid():
                return None
            waits = [self._check_one(server) for server in self._servers]
        return min((wait for wait in waits if wait is not None), default=None)

    def stop(self) -> None:
        """Stop the forkservers, which ends their children, and remove everything."""
        with self._lock:
            if self._stopped or self._owner != os.getpid():
                return
            self._stopped = True
            for server in self._servers:
                server.hang_up()
            for server in self._servers:
                _wait_or_kill(server.pid)
                server.pid = 0
            if self._listener is not None:
                self._listener.close()
            if self._directory:
                shutil.rmtree(self._directory, ignore_errors=True)

    def _abort_loading(self) -> None:
        """Have the forkservers that still load write on stderr where they are, and end."""
        for server in self._servers:
            if server.loaded is None and server.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGABRT)
                # Until it is gone: what follows here would cut it short.
                _wait(self.descriptors(), selectors.EVENT_READ, STOP_TIMEOUT)

    # ── one forkserver ──────────────────────────────────────────────────────────────────────────

    def _launch(self, server: _Server) -> None:
        assert self._listener is not None
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as if_it_fails, theirs:
            channel = Channel(ours, protocol.STATUS_LIMITS)
            if_it_fails.callback(channel.close)
            lifeline = Lifeline()
            if_it_fails.callback(lifeline.close)
            passed = (self._listener.fileno(), theirs.fileno(), lifeline.reader)
            # posix_spawn closes nothing by itself: what is inheritable is inherited. The forkserver
            # closes the rest as its second act.
            with _inheritable(passed):
                command = system.interpreter("isolated_tasks.process.forkserver")
                arguments = [*command, *(str(descriptor) for descriptor in passed)]
                server.pid = os.posix_spawn(command[0], arguments, _environment())
            if_it_fails.pop_all()
        lifeline.close_reader()
        server.channel, server.lifeline, server.loaded = channel, lifeline, None
        with contextlib.suppress(OSError):
            channel.send(self._boot())
            while channel.wants_write:
                _wait([channel.fileno()], selectors.EVENT_WRITE, SEND_TIMEOUT)
                channel.flush()
        logger.debug("forkserver pid=%d started at %s", server.pid, self.address)
        self.on_launch()

    def _boot(self) -> Boot:
        return Boot(
            sys_path=[os.path.abspath(path) for path in sys.path],
            argv=list(sys.argv),
            python_path=os.environ.get("PYTHONPATH"),
            directory=self._directory,
            preload=list(self.plan.preload),
            setup=self.plan.setup,
            setup_name=self.plan.setup_name,
            setup_argument=self.plan.setup_argument,
        )

    def _check_one(self, server: _Server) -> float | None:
        if server.channel is not None:
            self._listen_to(server)
        if server.channel is not None:
            return None
        wait = server.not_before - time.monotonic()
        if wait > 0:
            return wait
        try:
            self._launch(server)
        except OSError as exc:
            # The owner's event loop, which asks, must not end of it.
            logger.error("no forkserver can be started: %s; calls wait for it", exc)
            return _postpone(server)
        return None

    def _listen_to(self, server: _Server) -> None:
        channel = server.channel
        assert channel is not None
        try:
            for message in channel.messages():
                server.loaded = protocol.expect(message, Loaded)
                server.failures = 0
                _log_loaded(server.loaded)
        except (OSError, ProtocolError) as exc:
            logger.error("forkserver pid=%d sent nonsense: %s", server.pid, exc)
            channel.close()
        if channel.at_eof:
            self._bury(server)

    def _bury(self, server: _Server) -> None:
        server.hang_up()
        exit_code = _wait_or_kill(server.pid)
        if server.loaded is None:
            _postpone(server)
        logger.error(
            "forkserver pid=%d %s while it was %s; calls under way carry on, new ones wait for the "
            "next forkserver",
            server.pid,
            system.describe_exit(exit_code),
            "loading" if server.loaded is None else "serving",
        )
        server.pid, server.loaded = 0, None

    def abandon(self) -> None:
        """Close the listening socket, in a fork of this process: it is not a launcher."""
        if self._listener is not None and (descriptor := self._listener.detach()) >= 0:
            os.close(descriptor)


def _postpone(server: _Server) -> float:
    server.failures += 1
    # No more than 10 doublings: after a night of failures the power would not fit a float.
    delay = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(server.failures - 1, 10))
    server.not_before = time.monotonic() + delay
    return delay


def _environment() -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in _UNWANTED_VARIABLES
    }
    # What `-m` needs to find this package as this process found it. `preload.adopt` puts the
    # variable back before anything is loaded.
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return environment


@contextlib.contextmanager
def _inheritable(descriptors: Sequence[int]) -> Iterator[None]:
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


def _private_directory() -> str:
    """A new directory of mode 0700, with a name short enough for a socket's address (unix(7))."""
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(
        prefix="isolated_tasks-", dir=parent if len(os.fsencode(parent)) < 60 else "/tmp"
    )


def _wait(descriptors: Sequence[int], event: int, timeout: float) -> None:
    """Wait for one of these, in the way of whatever runs this process: gevent, eventlet, nobody."""
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, event)
        selector.select(timeout)


def _wait_or_kill(pid: int) -> int | None:
    """Wait for a forkserver that was told to stop; its exit code, None where nobody can tell."""
    if not pid:
        return None
    deadline = time.monotonic() + STOP_TIMEOUT
    pidfd = system.open_pidfd(pid)
    try:
        if pidfd is not None:
            # Readable when the process has ended.
            _wait([pidfd], selectors.EVENT_READ, STOP_TIMEOUT)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.01)
    except ChildProcessError:
        # Somebody else reaps all children of this process: an event loop's child watcher.
        return None
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _log_loaded(loaded: Loaded) -> None:
    logger.info(
        "forkserver pid=%d loaded %s in %.2f s, RSS %.0f MiB",
        loaded.pid,
        ", ".join(entry["name"] for entry in loaded.entries) or "nothing",
        loaded.seconds,
        loaded.rss_bytes / 2**20,
    )
    for values in loaded.entries:
        entry = preload.Entry(**values)
        if entry.error is not None:
            logger.error(
                "forkserver pid=%d failed to load %s:\n%s", loaded.pid, entry.name, entry.error
            )
        if entry.threads:
            logger.warning(
                "forkserver pid=%d: loading %s left %d thread(s) running (%s), which no child "
                "will have; start them in the body, or use start_method='spawn'",
                loaded.pid,
                entry.name,
                len(entry.threads),
                ", ".join(entry.threads),
            )
        if entry.cuda:
            logger.warning(
                "forkserver pid=%d: loading %s initialised CUDA, which does not work in a fork; "
                "initialise it in the body, or use start_method='spawn'",
                loaded.pid,
                entry.name,
            )
