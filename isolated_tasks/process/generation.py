"""One forkserver from its start to its end, as the main process sees it.

It is started by ``posix_spawn``: nothing of the main process, which may be large, threaded or
patched by gevent, is copied for that.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import preload, protocol, system
from isolated_tasks.process.protocol import (
    Boot,
    Held,
    List,
    Listing,
    Loaded,
    Ping,
    Pong,
    Reserve,
    Retire,
    Worn,
)
from isolated_tasks.process.transport import Channel, Lifeline

__all__ = ["Generation", "wait"]

logger = logging.getLogger(__name__)

#: For a forkserver to read what it is to load, in seconds; it does so as it starts.
SEND_TIMEOUT = 10.0

#: What a forkserver gets to end its children when it is told to stop, in seconds.
STOP_TIMEOUT = 5.0

#: What must not reach a forkserver: it would make Celery's ``@app.task`` bind differently.
_UNWANTED_VARIABLES = ("FORKED_BY_MULTIPROCESSING",)


class Generation:
    """One forkserver.

    Args:
        listener: The socket that it takes requests from.
        boot: What it is to load.

    Raises:
        OSError: No process could be started.
    """

    def __init__(self, listener: socket.socket, boot: Boot) -> None:
        #: What it has loaded; None until then.
        self.loaded: Loaded | None = None
        #: When it had.
        self.loaded_at = 0.0
        #: Why it wants to be replaced, if it does.
        self.worn: str | None = None
        #: What the memory limits of its children come to, in bytes; told when it has been retired.
        self.held_bytes: int | None = None
        #: What it has said last of its children, and when; None before.
        self.listing: Listing | None = None
        #: Since when it has been asked for that and has not answered; None where it owes nothing.
        self.asked_at: float | None = None
        self._reserved_bytes = boot.reserved_bytes
        # It was killed, or sends what cannot be understood.
        self._is_lost = False
        # When it was started, asked whether it is there, or has last said so.
        self._since = self.started_at = time.monotonic()
        self._owes_answer = False
        #: What is to be sent, by `flush`.
        self.outbox: collections.deque[protocol.Message] = collections.deque()
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as if_it_fails, theirs:
            self._channel = Channel(ours, protocol.STATUS_LIMITS)
            if_it_fails.callback(self._channel.close)
            self._lifeline = Lifeline()
            if_it_fails.callback(self._lifeline.close)
            passed = (listener.fileno(), theirs.fileno(), self._lifeline.reader)
            # posix_spawn closes nothing by itself: what is inheritable is inherited. The forkserver
            # closes the rest as its second act.
            with _inheritable(passed):
                command = system.interpreter("isolated_tasks.process.forkserver")
                arguments = [*command, *(str(descriptor) for descriptor in passed)]
                self.pid = os.posix_spawn(command[0], arguments, _environment())
            if_it_fails.pop_all()
        self._lifeline.close_reader()
        with contextlib.suppress(OSError):
            self._channel.send(boot)
            while self._channel.wants_write:
                wait([self._channel.fileno()], selectors.EVENT_WRITE, SEND_TIMEOUT)
                self._channel.flush()

    @property
    def failed(self) -> set[str]:
        """The names of what it could not load."""
        entries = self.loaded.entries if self.loaded is not None else ()
        return {entry["name"] for entry in entries if entry["error"] is not None}

    @property
    def descriptor(self) -> int | None:
        """What becomes readable when `hear` has something to do; None if nothing will."""
        return None if self._is_lost or self._channel.at_eof else self._channel.fileno()

    def hear(self) -> bool:
        """Take note of what the forkserver says; whether it is still there."""
        try:
            for message in self._channel.messages():
                self._take(message)
        except (OSError, ProtocolError) as exc:
            logger.error("forkserver pid=%d sent nonsense, and is killed: %s", self.pid, exc)
            # Not stopped: that one takes the main process for gone, and removes the socket of all.
            self.kill()
        return not (self._is_lost or self._channel.at_eof)

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, Worn):
            self.worn = message.reason
        elif isinstance(message, Held):
            self.held_bytes = message.size_bytes
        elif isinstance(message, Listing):
            self.listing, self.asked_at = message, None
        elif isinstance(message, Pong):
            self._since, self._owes_answer = time.monotonic(), False
        else:
            self.loaded = protocol.expect(message, Loaded)
            self._since = self.loaded_at = time.monotonic()
            _log_loaded(self.loaded)

    # ── what it is told ─────────────────────────────────────────────────────────────────────────

    @property
    def has_backlog(self) -> bool:
        """Whether there is something for the forkserver that it has not taken yet."""
        return bool(self.outbox or self._channel.wants_write) and not self._channel.at_eof

    @property
    def can_send(self) -> bool:
        """Whether a message waits that nobody has tried to send."""
        return bool(self.outbox) and not (self._channel.wants_write or self._channel.at_eof)

    def flush(self) -> None:
        """Send what the forkserver takes now; what it does not, is sent the next time.

        By one thread at a time.
        """
        if self._channel.at_eof:
            return
        with contextlib.suppress(OSError):
            self._channel.flush()
            while self.outbox and not self._channel.wants_write:
                self._channel.send(self.outbox.popleft())

    def retire(self) -> None:
        """Have it start no more children, and exit with the last that it has."""
        # Before all that waits: no request that comes from now on is to be taken.
        self.outbox.appendleft(Retire())

    def reserve(self, size: int) -> None:
        """Have it leave this much of the memory budget, in bytes, to others."""
        if size != self._reserved_bytes:
            self._reserved_bytes = size
            self.outbox.append(Reserve(size))

    def ask(self) -> bool:
        """Ask which children there are; whether an answer is to be expected at once.

        One that has not answered yet is not asked again: it may be stopped, and owe many.
        """
        if self.loaded is None or self.asked_at is not None or self.descriptor is None:
            return False
        self.asked_at = time.monotonic()
        self.outbox.append(List())
        return True

    def is_stuck(self, patience: float, boot_timeout: float) -> bool:
        """Whether it has not answered in time; asks it now and then. After `hear`.

        Args:
            patience: How long an answer may take, in seconds.
            boot_timeout: How long it may load, in seconds.
        """
        if self._channel.at_eof:
            return False
        silent = time.monotonic() - self._since
        if self.loaded is None:
            return silent > boot_timeout
        if self._owes_answer:
            return silent > patience
        if silent > patience / 2:
            self._since, self._owes_answer = time.monotonic(), True
            self.outbox.append(Ping())
        return False

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def hang_up(self) -> None:
        """Close our ends, which is how a forkserver is told to stop; not during a `flush`."""
        self._channel.close()
        self._lifeline.close()

    def abort(self) -> None:
        """Have one that still loads write on stderr where it is, and end."""
        self._end_by(signal.SIGABRT)

    def kill(self) -> None:
        """End it wherever it is. Its children live on."""
        self._end_by(signal.SIGKILL)

    def _end_by(self, number: int) -> None:
        pidfd = system.open_pidfd(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        # Until it is gone, as what follows here would cut it short. Not until the end of its
        # socket, which something that it has forked may hold.
        if pidfd is not None:
            wait([pidfd], selectors.EVENT_READ, STOP_TIMEOUT)
            os.close(pidfd)
        self._is_lost = True

    def wait_or_kill(self) -> int | None:
        """Wait for its end, after `hang_up`; its exit code, None where nobody can tell."""
        deadline = time.monotonic() + STOP_TIMEOUT
        pidfd = system.open_pidfd(self.pid)
        try:
            if pidfd is not None:
                # Readable when the process has ended.
                wait([pidfd], selectors.EVENT_READ, STOP_TIMEOUT)
            while True:
                done, status = os.waitpid(self.pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                if time.monotonic() >= deadline:
                    os.kill(self.pid, signal.SIGKILL)
                    deadline = float("inf")
                time.sleep(0.01)
        except ChildProcessError:
            # Somebody else reaps all children of this process: an event loop's child watcher.
            return None
        finally:
            if pidfd is not None:
                os.close(pidfd)


def wait(descriptors: Sequence[int], event: int, timeout: float) -> None:
    """Wait for one of these, in the way of whatever runs this process: gevent, eventlet, nobody."""
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, event)
        selector.select(timeout)


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
        if entry.sockets:
            logger.warning(
                "forkserver pid=%d: loading %s left %d socket(s) open (%s), which all children "
                "have in common; connect in the body, or in isolated_process_init",
                loaded.pid,
                entry.name,
                len(entry.sockets),
                ", ".join(entry.sockets),
            )
        if entry.cuda:
            logger.warning(
                "forkserver pid=%d: loading %s initialised CUDA, which does not work in a fork; "
                "initialise it in the body, or use start_method='spawn'",
                loaded.pid,
                entry.name,
            )
