"""Role: requester. Starts one child, sends it calls, waits for their outcomes, knows how it ended.

Nothing here blocks but the caller's own thread or greenlet: sockets never block, and the one wait
goes through ``selectors.DefaultSelector``, looked up at each start because gevent and eventlet put
theirs in its place. There is no helper thread, no queue, no signal handler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator

from isolated_tasks.errors import (
    ChildLostError,
    ForkserverError,
    ProtocolError,
    UnpicklableError,
)
from isolated_tasks.process import pickling, protocol, system
from isolated_tasks.process.lifecycle import Event, Lifecycle, State
from isolated_tasks.process.options import ProcessOptions
from isolated_tasks.process.outcome import Outcome
from isolated_tasks.process.pickling import Pickled
from isolated_tasks.process.transport import Channel, Lifeline
from isolated_tasks.process.usage import Usage

__all__ = ["NotBegunError", "Supervisor"]

logger = logging.getLogger(__name__)

_RETRY_CONNECT_SECONDS = 0.05
#: What loading a pickle raises, by the pickle module's own words and in practice.
UNLOADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
#: How often `Supervisor.call` does something else while it waits for its child.
_CHECK_SECONDS = 0.5


class NotBegunError(Exception):
    """The child went before it accepted the call: nothing of it has run, another child may."""


@contextlib.contextmanager
def _as_forkserver_error(address: str) -> Iterator[None]:
    """Turn what the system refuses us (EMFILE, ENOMEM) into our own error."""
    try:
        yield
    except OSError as exc:
        raise ForkserverError(
            f"no child can be asked for at {address}: {exc}",
            {"address": address, "errno": exc.errno},
        ) from exc


class Supervisor:
    """One child, as seen from the process that asked for it.

    Args:
        address: The forkserver's socket.
        options: What is asked for.

    Raises:
        ForkserverError: The forkserver cannot be reached.
        NotBegunError: The forkserver died while the request was sent.
    """

    def __init__(self, address: str, options: ProcessOptions) -> None:
        self.options = options
        self.pid: int | None = None
        #: How the process ended; None while it lives, and where nobody could tell.
        self.exit_code: int | None = None
        self.usage: Usage | None = None
        self._address = address
        self._life = Lifecycle()
        self._accepted = False
        self._outcome: protocol.Outcome | None = None
        self._refused: protocol.Refused | None = None
        self._forkserver_gone = False
        self._pidfd: int | None = None
        deadline = time.monotonic() + options.start_timeout
        with contextlib.ExitStack() as if_it_fails, _as_forkserver_error(address):
            self._lifeline = Lifeline()
            if_it_fails.callback(self._lifeline.close)
            self._crash = system.crash_file()
            if_it_fails.callback(os.close, self._crash)
            self._control = Channel(_connect(address, deadline), protocol.CONTROL_LIMITS)
            if_it_fails.callback(self._control.close)
            ours, theirs = socket.socketpair()
            if_it_fails.callback(theirs.close)
            self._call = Channel(ours, protocol.CALL_LIMITS)
            if_it_fails.callback(self._call.close)
            self._selector = selectors.DefaultSelector()
            if_it_fails.callback(self._selector.close)
            with theirs:
                descriptors = (theirs.fileno(), self._lifeline.reader, self._crash)
                self._request(descriptors, deadline)
            self._lifeline.close_reader()
            self._selector.register(self._control.fileno(), selectors.EVENT_READ)
            self._selector.register(self._call.fileno(), selectors.EVENT_READ)
            if_it_fails.pop_all()
        self._is_open = True

    #: Whether there is anything to give back; set last, so that `close` finds all or nothing.
    _is_open = False

    def __del__(self) -> None:
        # An exception from outside (a signal handler's, a killed greenlet's) may have hit the owner
        # between two of its lines.
        self.close()

    def __repr__(self) -> str:
        return f"child pid={self.pid} task={self.options.name}"

    # ── what the owner asks ─────────────────────────────────────────────────────────────────────

    @property
    def is_usable(self) -> bool:
        """Whether the child waits for a call, as far as is known now."""
        if self._life.state is State.READY:
            self._look_idly(0)
        return self._life.state is State.READY

    @property
    def has_exited(self) -> bool:
        """Whether the child has been reaped, as far as is known now."""
        if self._life.state is not State.EXITED:
            self._look_idly(0)
        return self._life.state is State.EXITED

    def call(self, pickled: Pickled, *, meanwhile: Callable[[], object] = lambda: None) -> Outcome:
        """Run one call in the child.

        Args:
            pickled: A tuple of a callable, its positional and its keyword arguments.
            meanwhile: Called now and then until the child accepts: the forkserver that is to
                start it may be gone, and this thread the one that would replace it.

        Returns:
            Its outcome, whole.

        Raises:
            NotBegunError: The child went before it accepted.
            ForkserverError: No child could be started, or none accepted within ``start_timeout``.
            ChildLostError: The child exited without an outcome.
        """
        deadline = time.monotonic() + self.options.start_timeout
        self._accepted, self._outcome = False, None
        self._life.handle(Event.CALL)
        try:
            self._write(self._call, protocol.Call(pickled.body, pickled.buffers))
            while self._life.state is State.CALLED:
                meanwhile()
                self._look_before(deadline)
            while self._life.state is State.RUNNING:
                self._look(None)
        except ProtocolError:
            self.kill()
            # An outcome that was here before the nonsense stands.
            if self._outcome is None:
                raise
        except BaseException:
            # A limit of the pool, a killed greenlet, an exit of the process: whatever takes the
            # caller away takes the child with it.
            self.kill()
            raise
        if self._outcome is not None:
            outcome, self._outcome = self._outcome, None
            return self._load(outcome)
        if self._refused is not None:
            raise self._refusal(self._refused)
        if not self._accepted:
            raise NotBegunError(f"{self!r} exited with {self.exit_code} before it accepted a call")
        raise self._lost()

    def dismiss(self) -> None:
        """Tell a child that waits for a call that none will come."""
        self._life.handle(Event.DISMISS)
        # End-of-file is what it waits for.
        self._call.shut_down_writing()

    def wait_exited(self, timeout: float | None = None) -> bool:
        """Wait until the child has been reaped.

        Args:
            timeout: In seconds; None waits without end.

        Returns:
            Whether it has.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._life.state is not State.EXITED:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._look_idly(left)
        return True

    def kill(self) -> None:
        """End the child and its group now, from wherever this is called; never waits.

        Cutting the lifeline has the kernel do it. The signals through the pidfd and through the
        forkserver are for kernels without a lifeline.
        """
        self._life.handle(Event.DISMISS)
        self._lifeline.close()
        if self._life.state is State.EXITED:
            return
        # Both: that the forkserver is gone may not have been seen yet.
        if self._pidfd is not None:
            system.signal_pidfd_group(self._pidfd, signal.SIGKILL)
        if not self._forkserver_gone:
            self._write(self._control, protocol.Signal(signal.SIGKILL))

    def close(self) -> None:
        """Give everything back; a child that still lives is killed."""
        if not self._is_open:
            return
        self._is_open = False
        self._selector.close()
        self._lifeline.close()
        self._control.close()
        self._call.close()
        for descriptor in (self._crash, self._pidfd):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._crash, self._pidfd = -1, None

    # ── sending ─────────────────────────────────────────────────────────────────────────────────

    def _request(self, descriptors: tuple[int, ...], deadline: float) -> None:
        options = self.options
        spawn = protocol.Spawn(
            name=options.name,
            start_method=options.start_method,
            batch_size=options.batch_size,
            batch_idle_timeout=options.batch_idle_timeout,
            batch_memory_limit_bytes=options.batch_memory_limit_bytes,
            exit_timeout=options.exit_timeout,
            env=dict(options.env),
        )
        try:
            self._control.send(spawn, descriptors)
            while self._control.wants_write:
                # Only a huge environment fills the socket. The descriptors must not be closed
                # here before they are sent.
                self._wait_writable(self._control, deadline)
                self._control.flush()
        except ConnectionError as exc:
            raise NotBegunError(f"the forkserver went while it was asked: {exc}") from exc

    def _wait_writable(self, channel: Channel, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(channel.fileno(), selectors.EVENT_WRITE)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise self._too_late()

    def _write(self, channel: Channel, message: protocol.Message) -> None:
        """Send what can be sent now; `_look` sends the rest."""
        try:
            channel.send(message)
        except OSError:
            # The peer is gone. How it ended is read from the other sockets.
            channel.drop_pending()
        self._watch(channel)

    def _watch(self, channel: Channel) -> None:
        """Have the selector wait for what can happen next on this socket."""
        descriptor = channel.fileno()
        events = 0 if channel.at_eof else selectors.EVENT_READ
        if channel.wants_write and not channel.at_eof:
            events |= selectors.EVENT_WRITE
        registered = self._selector.get_map().get(descriptor)
        if registered is None:
            if events:
                self._selector.register(descriptor, events)
        elif not events:
            self._selector.unregister(descriptor)
        elif registered.events != events:
            self._selector.modify(descriptor, events)

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────

    def _look_idly(self, timeout: float | None) -> None:
        """Like `_look`, while no call is under way: nonsense is nobody's error then."""
        try:
            self._look(timeout)
        except ProtocolError as exc:
            logger.warning("%r is killed, it talks out of turn: %s", self, exc)
            self.kill()

    def _look_before(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        self._look(min(left, _CHECK_SECONDS))

    def _look(self, timeout: float | None) -> None:
        """Take note of what has happened; wait for something to happen if nothing has.

        Args:
            timeout: In seconds; 0 does not wait, None waits without end.
        """
        for key, events in self._selector.select(timeout):
            if self._life.state is State.EXITED:
                break
            if key.fd == self._pidfd:
                self._exited(system.pidfd_exit_code(key.fd), None)
            elif key.fd == self._call.fileno():
                self._serve(self._call, events)
            elif key.fd == self._control.fileno():
                self._serve(self._control, events)

    def _serve(self, channel: Channel, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            try:
                channel.flush()
            except OSError:
                channel.drop_pending()
        try:
            for message in channel.messages():
                self._take(message)
        except ProtocolError:
            # Nothing that follows can be understood; the owner gets this error, and the child
            # is killed.
            self._selector.unregister(channel.fileno())
            channel.close()
            if self._life.state is not State.EXITED:
                self._at_eof(channel)
            raise
        if self._life.state is State.EXITED:
            return
        self._watch(channel)
        if channel.at_eof:
            self._at_eof(channel)

    def _at_eof(self, channel: Channel) -> None:
        if channel is self._control:
            self._forkserver_gone = True
            if self._pidfd is not None:
                self._selector.register(self._pidfd, selectors.EVENT_READ)
        # From here on only the pidfd tells of the exit. Without one (the forkserver died before
        # it could send it, or this kernel has none) the end of the call socket has to do.
        if self._forkserver_gone and self._pidfd is None and self._call.at_eof:
            self._exited(None, None)

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Started):
            self.pid = message.pid
            self._keep_pidfd(self._control.take_descriptors())
            self._life.handle(Event.STARTED)
        elif isinstance(message, protocol.Refused):
            self._refused = message
            self._exited(None, None)
        elif isinstance(message, protocol.Exited):
            usage = Usage(message.peak_rss_bytes, message.user_seconds, message.system_seconds)
            self._exited(message.exit_code, usage)
        elif isinstance(message, protocol.Accepted):
            self._accepted = True
            self.pid = message.pid
            if self._forkserver_gone and self._pidfd is None:
                pidfd = system.open_pidfd(message.pid)
                self._keep_pidfd([] if pidfd is None else [pidfd])
            self._life.handle(Event.ACCEPTED)
        elif isinstance(message, protocol.Outcome):
            self._outcome = message
            self._life.handle(Event.LAST_OUTCOME if message.last else Event.OUTCOME)
        else:
            raise ProtocolError(f"{type(message).__name__} cannot come from a child")

    def _keep_pidfd(self, descriptors: list[int]) -> None:
        if descriptors:
            self._pidfd = descriptors[0]
            if self._forkserver_gone:
                self._selector.register(self._pidfd, selectors.EVENT_READ)

    def _exited(self, exit_code: int | None, usage: Usage | None) -> None:
        # All that the child ever wrote is here by now, see lifecycle.py. Its end of the socket
        # may still be open in a process that it forked: what is here counts, not end-of-file.
        try:
            for message in self._call.messages():
                self._take(message)
        finally:
            self.exit_code, self.usage = exit_code, usage
            had_outcome = self._life.state in (State.READY, State.EXITING)
            self._life.handle(Event.EXITED)
        if had_outcome and exit_code not in (0, None) and not self._lifeline.is_cut:
            logger.warning("%r %s after its last outcome", self, system.describe_exit(exit_code))

    # ── verdicts ────────────────────────────────────────────────────────────────────────────────

    def _load(self, message: protocol.Outcome) -> Outcome:
        try:
            outcome = pickling.loads(Pickled(message.pickled, message.buffers))
        except UNLOADABLE as exc:
            # It could be pickled there and cannot be loaded here: a class of a module that only
            # the body imported, or a __setstate__ that fails. Not all exceptions: a time limit of
            # the pool, or a want of memory, may come just now and is something else.
            raise UnpicklableError(
                f"task {self.options.name!r}: the result of {self!r} cannot be loaded here: "
                f"{type(exc).__name__}: {exc}",
                {"path": "result", "type_name": "?", "reason": f"{type(exc).__name__}: {exc}"},
            ) from exc
        if not isinstance(outcome, Outcome):
            raise ProtocolError(f"{self!r} sent {type(outcome).__name__}, not an outcome")
        return outcome

    def _too_late(self) -> ForkserverError:
        return ForkserverError(
            f"task {self.options.name!r}: no child accepted the call within "
            f"{self.options.start_timeout:g} s; is the forkserver at {self._address} alive?",
            {"address": self._address},
        )

    def _refusal(self, refused: protocol.Refused) -> ForkserverError:
        return ForkserverError(
            f"task {self.options.name!r}: the forkserver could not start a child: {refused.reason}",
            {"address": self._address, "errno": refused.errno},
        )

    def _lost(self) -> ChildLostError:
        usage = self.usage
        crash_traceback = _only_theirs(system.read_crash_file(self._crash))
        here, whole = self._call.reader.progress
        ending = system.describe_exit(self.exit_code)
        facts = [f"task {self.options.name!r}: child pid={self.pid} {ending}"]
        facts.append(
            f"while it sent its outcome ({here} of {whole} bytes)"
            if self._call.reader.is_partial
            else "without an outcome, after the body had begun"
        )
        if usage is not None:
            facts.append(
                f"(peak RSS {usage.peak_rss_bytes / 2**20:.0f} MiB, "
                f"CPU {usage.user_seconds + usage.system_seconds:.1f} s)"
            )
        message = " ".join(facts)
        if crash_traceback:
            message += "\n" + crash_traceback
        return ChildLostError(
            message,
            {
                "task": self.options.name,
                "pid": self.pid,
                "exit_code": self.exit_code,
                "signal": system.signal_name(self.exit_code),
                "started": True,
                "peak_rss_bytes": usage.peak_rss_bytes if usage else None,
                "user_seconds": usage.user_seconds if usage else None,
                "system_seconds": usage.system_seconds if usage else None,
                "crash_traceback": crash_traceback,
            },
        )


def _connect(address: str, deadline: float) -> socket.socket:
    """Connect to a forkserver.

    Raises:
        ForkserverError: Nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    while True:
        try:
            connection.connect(address)
            return connection
        except BlockingIOError:
            # The queue of the listening socket is full; the kernel offers no event for its
            # getting shorter (connect(2), EAGAIN).
            if time.monotonic() < deadline:
                time.sleep(_RETRY_CONNECT_SECONDS)
                continue
            error: OSError = TimeoutError("its queue is full")
        except OSError as exc:
            error = exc
        connection.close()
        raise ForkserverError(
            f"no forkserver listens at {address}: {error}",
            {"address": address, "errno": error.errno},
        ) from error


def _only_theirs(crash_traceback: str) -> str:
    """Leave out our own frames, which stand below those of every body."""
    ours = f'  File "{os.path.dirname(__file__)}{os.sep}'
    return "".join(
        line
        for line in crash_traceback.splitlines(keepends=True)
        if not line.startswith((ours, '  File "<frozen runpy>"'))
    )
