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
from collections.abc import Callable, Iterator, Sequence

from isolated_tasks.errors import ForkserverError, ProtocolError, UnpicklableError
from isolated_tasks.process import (
    cgroup,
    descendants,
    limits,
    pickling,
    plain,
    protocol,
    stderr,
    stopping,
    system,
    verdicts,
)
from isolated_tasks.process.child import IN_ORDER
from isolated_tasks.process.enforcer import KILLED_SECONDS, Enforcer
from isolated_tasks.process.lifecycle import Event, Lifecycle, State
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.outcome import Outcome
from isolated_tasks.process.pickling import Pickled
from isolated_tasks.process.transport import Channel, Lifeline
from isolated_tasks.process.usage import ExitReason, Measured, ProcessUsage, Usage

__all__ = ["NotBegunError", "StoppedError", "Supervisor", "TimeIsUpError"]

logger = logging.getLogger(__name__)

_RETRY_CONNECT_SECONDS = 0.05
#: A child waits so long for the call that it was started for; its requester may have been stopped.
FIRST_CALL_SECONDS = 60.0
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


#: How often a child whose forkserver dies is shown to the next one.
_MAX_ADOPTIONS = 10


class NotBegunError(Exception):
    """The child went before it accepted the call: nothing of it has run, another child may.

    Args:
        message: What happened.
        is_its_own: The child was there, and has ended; else its forkserver is gone or retired.
    """

    def __init__(self, message: str, *, is_its_own: bool = False) -> None:
        super().__init__(message)
        self.is_its_own = is_its_own


class StoppedError(Exception):
    """Somebody has asked for the call to be stopped, and it was."""


class TimeIsUpError(Exception):
    """The body has run for longer than its time limit, in seconds, and was stopped."""


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
        call_id: Of the first call.
        on_stop: Told of requests to stop a call that is not this child's.
        failures: How many children before this one have failed in a row to begin a body.
        is_spare: Whether there is no call for it yet. Then it ends as one that is idle in a batch,
            and is not waited for if the forkserver does not take the request at once.

    Raises:
        ForkserverError: The forkserver cannot be reached.
        NotBegunError: The forkserver died while the request was sent.
    """

    def __init__(
        self,
        address: str,
        options: ProcessOptions,
        call_id: str | None = None,
        on_stop: Callable[[protocol.Stop], object] = lambda stop: None,
        *,
        failures: int = 0,
        is_spare: bool = False,
    ) -> None:
        self.options = options
        self.pid: int | None = None
        #: How the process ended; None while it lives, and where nobody could tell.
        self.exit_code: int | None = None
        self.usage: ProcessUsage | None = None
        self._address = address
        self._life = Lifecycle()
        self._accepted = self._begun = False
        #: Whether it did not come to accept a call in time.
        self.is_late = False
        self._outcome: protocol.Outcome | None = None
        #: Calls that it was sent.
        self._position = 0
        self._call_began = self._body_began = 0.0
        self._argument_bytes = self._result_bytes = 0
        self._measured: Measured | None = None
        self._refused: protocol.Refused | None = None
        self._oom_killed: bool | None = None
        self._oom_evidence = ""
        self._group: cgroup.Group | None = None
        self._memory_limit_hit = False
        self._group_peak_bytes: int | None = None
        self._call_options = CallOptions(options.name)
        self._enforcer = Enforcer(options, self._call_options)
        self._on_stop = on_stop
        #: Called when the child has to wait for memory.
        self.on_waiting: Callable[[], object] = lambda: None
        self.has_waited = False
        #: See `Children.renew`.
        self.renewal = 0
        #: Called when the child has the call, whole, and begins.
        self.on_accepted: Callable[[], object] = lambda: None
        #: Called once a body runs: there is time to do something else.
        self.on_begun: Callable[[], object] = lambda: None
        # None while the child waits for memory to become free: that may take its time.
        self._start_deadline: float | None = None
        self._forkserver_gone = False
        self._is_retiring = False
        self._offence = ""
        self._adoptions = 0
        self._pidfd: int | None = None
        deadline = time.monotonic() + (0 if is_spare else options.start_timeout)
        with contextlib.ExitStack() as if_it_fails, _as_forkserver_error(address):
            self._lifeline = Lifeline()
            if_it_fails.callback(self._lifeline.close)
            self._crash = system.crash_file()
            if_it_fails.callback(os.close, self._crash)
            self._stderr = stderr.Capture(is_wanted=not options.keep_children)
            if_it_fails.callback(self._stderr.close)
            self._control = Channel(_connect(address, deadline), protocol.CONTROL_LIMITS)
            if_it_fails.callback(self._control.close)
            ours, theirs = socket.socketpair()
            if_it_fails.callback(theirs.close)
            self._call = Channel(ours, _outcome_limits(options))
            if_it_fails.callback(self._call.close)
            self._selector = selectors.DefaultSelector()
            if_it_fails.callback(self._selector.close)
            with theirs:
                reader, writer = self._lifeline.reader, self._stderr.writer
                descriptors = (theirs.fileno(), reader, self._crash, writer)
                waits = options.batch_idle_timeout if is_spare else FIRST_CALL_SECONDS
                self._request(descriptors, deadline, call_id, failures, waits)
            self._lifeline.close_reader()
            self._stderr.close_writer()
            if self._stderr.fileno() >= 0:
                self._selector.register(self._stderr.fileno(), selectors.EVENT_READ)
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
        if self._is_retiring:
            self._dismiss_if_ready()
        return self._life.state is State.READY

    @property
    def has_forkserver(self) -> bool:
        """Whether the forkserver that has started the child is there, as far as is known."""
        return not self._forkserver_gone

    @property
    def has_exited(self) -> bool:
        """Whether the child has been reaped, as far as is known now."""
        if self._life.state is not State.EXITED:
            self._look_idly(0)
        return self._life.state is State.EXITED

    def call(
        self,
        pickled: Pickled,
        options: CallOptions | None = None,
        *,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Outcome:
        """Run one call in the child.

        Args:
            pickled: A tuple of a callable, its positional and its keyword arguments.
            options: The limits of this call, and what requests to stop it name.
            meanwhile: Called now and then until the child accepts: the forkserver that is to
                start it may be gone, and this thread the one that would replace it.

        Returns:
            Its outcome, whole.

        Raises:
            NotBegunError: The child went before it accepted.
            StoppedError: Somebody has asked for that.
            ForkserverError: No child could be started, or none accepted within ``start_timeout``.
            OptionError: The child's ``memory_limit`` can never fit into the budget.
            ChildLostError: The child exited without an outcome.
            MemoryLimitExceeded: It was killed for its memory.
            CPUTimeLimitExceeded: The kernel has killed it for its CPU time.
            TimeIsUpError: It was stopped, as the body had run for too long.
        """
        self._accepted, self._begun, self._outcome = False, False, None
        self._position += 1
        self._call_began = time.monotonic()
        self._argument_bytes, self._result_bytes = pickled.size, 0
        self._measured = None
        self._stderr.forget()
        self._call_options = options or CallOptions(self.options.name)
        self._enforcer = enforcer = Enforcer(self.options, self._call_options)
        self._start_by(time.monotonic() + self.options.start_timeout)
        self._life.handle(Event.CALL)
        try:
            self._write(self._call, protocol.Call(pickled.body, pickled.buffers))
            while self._life.state is State.CALLED and enforcer.ladder is None:
                meanwhile()
                self._look_before_start()
            if self._life.state is State.CALLED:
                raise StoppedError(f"{self!r} was stopped before it began")
            self._supervise(enforcer)
        except ProtocolError as exc:
            self._offence = f"sent what is not a message ({exc})"
            self.kill()
            # For what is to be said of its end.
            with contextlib.suppress(ProtocolError):
                self.wait_exited(KILLED_SECONDS)
            # An outcome that was here before the nonsense stands.
            if not self._accepted:
                raise
        except BaseException:
            # A limit of the pool, a killed greenlet, an exit of the process: whatever takes the
            # caller away takes the child with it.
            self.kill()
            raise
        # Before whatever is said of the end of the call.
        self._stderr.pass_on()
        if enforcer.ladder is not None and enforcer.ladder.cause is not stopping.Cause.HANG_UP:
            raise self._stopped(enforcer.ladder)
        if self._outcome is not None:
            outcome, self._outcome = self._outcome, None
            self._result_bytes = Pickled(outcome.pickled, outcome.buffers).size
            if enforcer.soft_signal_sent:
                # Not again: should the signal still be under way, it is not for the next body.
                self._dismiss_if_ready()
            return self._load(outcome)
        if self._refused is not None:
            raise verdicts.refused(self.options, self._refused, self._address)
        if not self._accepted and not self._memory_limit_hit:
            raise NotBegunError(
                f"{self!r} {system.describe_exit(self.exit_code)} before it began",
                is_its_own=self.pid is not None,
            )
        error = verdicts.lost(self.facts())
        if self._memory_limit_hit:
            logger.warning(
                "%s[%s]: child pid=%s, with its group, was killed by the kernel: "
                "memory limit (%.0f MiB) exceeded",
                self.options.name,
                self._call_options.title,
                self.pid,
                (self.options.memory_limit_bytes or 0) / 2**20,
            )
        raise error

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
        for channel in (self._control, self._call):
            # Once more: what ended the call may have come between the end of a socket and what
            # follows from it.
            if channel.at_eof and self._life.state is not State.EXITED:
                self._at_eof(channel)
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
        if self._is_on_its_own and self.pid is not None and self._is_certainly_there:
            # Nobody else would end what has left the group, and is lost from sight with the child.
            descendants.kill_below(self.pid)
        self._lifeline.close()
        if self._life.state is State.EXITED:
            return
        if self.pid is None:
            # It may not even have been asked for: the forkserver drops what waits for memory.
            self._control.close()
            self._exited(None, None)
            return
        if self._forkserver_gone and self._group is not None:
            self._group.kill()
        # Both: that the forkserver is gone may not have been seen yet.
        self._signal(signal.SIGKILL, to_group=True)
        if not self._forkserver_gone:
            self._write(self._control, protocol.Signal(signal.SIGKILL, to_group=True))

    @property
    def _is_on_its_own(self) -> bool:
        """Whether no forkserver ends what the child has started."""
        return self._forkserver_gone or self.options.keep_children

    @property
    def _is_certainly_there(self) -> bool:
        """Whether its number is its own still: it is not reaped, though it may have ended."""
        if self._life.state is State.EXITED:
            return False
        # Signal 0 tells; without a pidfd nothing does.
        return self._pidfd is None or system.signal_pidfd(self._pidfd, 0, to_group=False)

    def close(self) -> None:
        """Give everything back; a child that still lives is killed."""
        if not self._is_open:
            return
        self._is_open = False
        self._selector.close()
        self._lifeline.close()
        self._control.close()
        self._call.close()
        self._stderr.close()
        for descriptor in (self._crash, self._pidfd):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._crash, self._pidfd = -1, None

    # ── sending ─────────────────────────────────────────────────────────────────────────────────

    def _request(
        self,
        descriptors: tuple[int, ...],
        deadline: float,
        call_id: str | None,
        failures: int,
        first_call_timeout: float,
    ) -> None:
        options = self.options
        spawn = protocol.Spawn(
            name=options.name,
            start_method=options.start_method,
            batch_size=options.batch_size,
            first_call_timeout=first_call_timeout,
            batch_idle_timeout=options.batch_idle_timeout,
            batch_memory_limit_bytes=options.batch_memory_limit_bytes,
            memory_limit_bytes=options.memory_limit_bytes,
            soft_memory_limit_bytes=options.soft_memory_limit_bytes,
            cpu_time_limit=options.cpu_time_limit,
            nice=options.nice,
            max_open_files=options.max_open_files,
            keep_children=options.keep_children,
            max_result_bytes=options.max_result_bytes,
            plain_outcomes=options.plain_outcomes,
            exit_timeout=options.exit_timeout,
            call_id=call_id,
            failures=failures,
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
                raise verdicts.too_late(self.facts(), self._address, accepted=False)

    def _signal(self, number: int, *, to_group: bool) -> None:
        """Send a signal to the child, through whoever can."""
        if self._pidfd is not None and system.signal_pidfd(self._pidfd, number, to_group=to_group):
            return
        if not self._forkserver_gone:
            self._write(self._control, protocol.Signal(number, to_group))

    def _write(
        self, channel: Channel, message: protocol.Message, descriptors: Sequence[int] = ()
    ) -> None:
        """Send what can be sent now; `_look` sends the rest."""
        try:
            channel.send(message, descriptors)
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

    def _start_by(self, deadline: float | None) -> None:
        self._start_deadline = deadline

    def _look_before_start(self) -> None:
        """Like `_look`, while the child has yet to accept its call."""
        left = self._left_to_start()
        self._look(_CHECK_SECONDS if left is None else min(left, _CHECK_SECONDS))

    def _left_to_start(self) -> float | None:
        if self._start_deadline is None:
            return None
        left = self._start_deadline - time.monotonic()
        if left <= 0:
            self.is_late = not self._accepted
            raise verdicts.too_late(self.facts(), self._address, accepted=self._accepted)
        return left

    def _supervise(self, enforcer: Enforcer) -> None:
        """See the body to its end; if it is stopped, to that of its process."""
        while self._life.state is State.RUNNING or self._is_being_stopped(enforcer):
            self._look_at_group(enforcer)
            rung = enforcer.due(self.pid)
            if rung is not None:
                self._step_down(rung, enforcer.ladder)
                continue
            left = self._left_to_start() if enforcer.ladder is None else None
            waits = [wait for wait in (left, enforcer.wait()) if wait is not None]
            self._look(min(waits, default=None))

    def _look_at_group(self, enforcer: Enforcer) -> None:
        """See whether the kernel has killed for the memory limit; it may have spared the child."""
        limit = self.options.memory_limit_bytes
        if enforcer.ladder is None and self._group is not None and self._group.limit_hit():
            enforcer.stop(stopping.on_memory_limit(limit or 0, self._group.peak_bytes() or 0))

    def _is_being_stopped(self, enforcer: Enforcer) -> bool:
        if enforcer.ladder is None or self._life.state is State.EXITED:
            return False
        # What would wait for its next call.
        self._dismiss_if_ready()
        return not enforcer.is_over

    def _dismiss_if_ready(self) -> None:
        if self._life.state is State.READY:
            self.dismiss()

    def _step_down(self, rung: stopping.Rung, ladder: stopping.Ladder | None) -> None:
        if rung.signal == signal.SIGKILL:
            if ladder is not None and ladder.cause is stopping.Cause.HANG_UP:
                self._offence = "closed the socket that its outcome would have come by"
            self.kill()
        else:
            if rung.signal in limits.TERMINATING:
                self._write(self._call, protocol.Halt(rung.signal))
            self._signal(rung.signal, to_group=rung.to_group)
        # After it: a thread may have to wait for the log as long as another one that waits for it.
        if ladder is not None:
            logger.warning(
                "%s[%s]: child pid=%s%s gets %s: %s",
                self.options.name,
                self._call_options.title,
                self.pid,
                ", with its group," if rung.to_group else "",
                system.signal_name(-rung.signal),
                ladder.why,
            )

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
                self._serve(self._call, events, to_the_end=timeout == 0)
            elif key.fd == self._control.fileno():
                self._serve(self._control, events, to_the_end=timeout == 0)
            elif key.fd == self._stderr.fileno() and not self._stderr.pass_on():
                self._selector.unregister(key.fd)

    def _serve(self, channel: Channel, events: int, *, to_the_end: bool) -> None:
        """Take what has come; who looks once, and does not come back for the rest, wants it all."""
        if events & selectors.EVENT_WRITE:
            try:
                channel.flush()
            except OSError:
                channel.drop_pending()
        try:
            for message in channel.rest() if to_the_end else channel.messages():
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
            self._watch_pidfd()
            self._do_without_forkserver()
        elif self._life.state is State.RUNNING:
            self._enforcer.stop(stopping.on_hang_up(self.options.exit_timeout))
        # From here on only the pidfd tells of the exit. Without one (the forkserver died before
        # it could send it, or this kernel has none) the end of the call socket has to do.
        if self._forkserver_gone and self._pidfd is None and self._call.at_eof:
            self._exited(None, None)

    def _do_without_forkserver(self) -> None:
        """Make up for what it has not told; where the child's pid is not known yet, later."""
        if self._pidfd is None and self.pid is not None and self._life.state is State.RUNNING:
            # It died between the fork and its report, in which the pidfd comes.
            pidfd = system.open_pidfd(self.pid)
            self._keep_pidfd([] if pidfd is None else [pidfd])
        self._show_to_next_forkserver()

    def _show_to_next_forkserver(self) -> None:
        """Have the next forkserver know of the child: of its memory, and of whom to tell of stops.

        The listening socket belongs to the main process, so this can be sent before there is one.
        """
        if self.pid is None or self._lifeline.is_cut or self._adoptions >= _MAX_ADOPTIONS:
            return
        self._adoptions += 1
        with contextlib.ExitStack() as if_it_fails:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            if_it_fails.callback(connection.close)
            connection.setblocking(False)
            try:
                connection.connect(self._address)
            except OSError:
                # There will be none: the worker ends.
                return
            control = Channel(connection, protocol.CONTROL_LIMITS)
            self._control.close()
            self._control = control
            if_it_fails.pop_all()
        group = None if self._group is None else str(self._group.folder)
        adopt = protocol.Adopt(self.pid, self.options.memory_limit_bytes, group)
        self._write(self._control, adopt, () if self._pidfd is None else (self._pidfd,))

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Stop):
            self._take_stop(message)
        elif isinstance(message, protocol.Waiting):
            self._start_by(None)
            self.has_waited = True
            self.on_waiting()
            logger.info(
                "%s[%s] waits for memory: needs %.0f MiB, %.0f of %.0f MiB are taken",
                self.options.name,
                self._call_options.title,
                (self.options.memory_limit_bytes or 0) / stopping.MIB,
                message.taken_bytes / stopping.MIB,
                message.budget_bytes / stopping.MIB,
            )
        elif isinstance(message, protocol.Started):
            if self._start_deadline is None:
                self._start_by(time.monotonic() + self.options.start_timeout)
            self.pid = message.pid
            self._group = cgroup.Group.at(message.group)
            self._keep_pidfd(self._control.take_descriptors())
            self._life.handle(Event.STARTED)
        elif isinstance(message, protocol.Retiring):
            self._is_retiring = True
        elif isinstance(message, protocol.Refused):
            self._refused = message
            self._exited(None, None)
        elif isinstance(message, protocol.Exited):
            usage = ProcessUsage(
                message.peak_rss_bytes, message.user_seconds, message.system_seconds
            )
            self._oom_killed = message.oom_killed
            self._oom_evidence = message.oom_evidence
            self._memory_limit_hit = message.memory_limit_hit
            self._group_peak_bytes = message.peak_bytes
            self._exited(message.exit_code, usage)
        elif isinstance(message, protocol.Accepted):
            self._accepted = True
            self.on_accepted()
            self.pid = message.pid
            self._enforcer.accepted()
            # A body whose clock has yet to start is not to keep anybody waiting for ever.
            now = time.monotonic()
            is_timed = self._call_options.is_timed
            self._start_by(now + self.options.start_timeout if is_timed else None)
            self._life.handle(Event.ACCEPTED)
            if self._forkserver_gone and self._pidfd is None:
                self._do_without_forkserver()
        elif isinstance(message, protocol.Begun):
            self._begun = True
            self._life.handle(Event.BEGUN)
            self._body_began = time.monotonic()
            self._start_by(None)
            self._enforcer.begun()
            self.on_begun()
        elif isinstance(message, protocol.Outcome):
            self._outcome = message
            self._life.handle(Event.LAST_OUTCOME if message.last else Event.OUTCOME)
        else:
            raise ProtocolError(f"{type(message).__name__} cannot come from a child")

    def _take_stop(self, stop: protocol.Stop) -> None:
        if stop.call_id == self._call_options.call_id and self._life.state in (
            State.CALLED,
            State.RUNNING,
        ):
            grace = self.options.term_grace
            self._enforcer.stop(stopping.on_request(stop.signal, grace, stop.reason))
        else:
            self._on_stop(stop)

    def _keep_pidfd(self, descriptors: list[int]) -> None:
        if descriptors:
            self._pidfd = descriptors[0]
            self._watch_pidfd()

    def _watch_pidfd(self) -> None:
        """Have the kernel tell of the exit, where the forkserver will not."""
        pidfd = self._pidfd
        if self._forkserver_gone and pidfd is not None and pidfd not in self._selector.get_map():
            self._selector.register(pidfd, selectors.EVENT_READ)

    def _exited(self, exit_code: int | None, usage: ProcessUsage | None) -> None:
        # All that the child ever wrote is here by now, see lifecycle.py. Its end of the socket
        # may still be open in a process that it forked: what is here counts, not end-of-file.
        if usage is None:
            # The forkserver was not there to tell, nor to end what the child has left.
            if self._pidfd is not None:
                system.signal_pidfd(self._pidfd, signal.SIGKILL, to_group=True)
            if self._group is not None:
                self._memory_limit_hit = self._group.limit_hit()
                self._group_peak_bytes = self._group.peak_bytes()
                self._group.kill()
        try:
            for message in self._call.rest():
                self._take(message)
        finally:
            self.exit_code, self.usage = exit_code, usage
            had_outcome = self._life.state in (State.READY, State.EXITING)
            self._life.handle(Event.EXITED)
        needs_a_word = exit_code is not None and exit_code not in IN_ORDER
        if had_outcome and needs_a_word and not self._lifeline.is_cut:
            when = "after its last outcome" if self._accepted else "before it had a call"
            logger.warning("%r %s %s", self, system.describe_exit(exit_code), when)

    # ── verdicts ────────────────────────────────────────────────────────────────────────────────

    def _load(self, message: protocol.Outcome) -> Outcome:
        try:
            self._measured = Measured.unpack(message.measured)
            if self.options.plain_outcomes:
                return plain.decode(Pickled(message.pickled, message.buffers))
            outcome = pickling.loads(Pickled(message.pickled, message.buffers))
        except ProtocolError as exc:
            raise self._no_outcome(str(exc)) from None
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
            raise self._no_outcome(f"it is of type {type(outcome).__name__}")
        return outcome

    def _no_outcome(self, why: str) -> ProtocolError:
        return ProtocolError(
            f"task {self.options.name!r}: what {self!r} sent is no outcome: {why}. "
            f"{verdicts.HANDS_OFF}."
        )

    def _stopped(self, ladder: stopping.Ladder) -> Exception:
        if ladder.cause is stopping.Cause.TIME_LIMIT:
            return TimeIsUpError(self._call_options.time_limit)
        if ladder.cause is stopping.Cause.MEMORY_LIMIT:
            return verdicts.memory_limit(self.facts())
        return StoppedError(f"{self!r} was stopped: {ladder.why}")

    def facts(self) -> verdicts.Facts:
        """What is known about the child, for an error."""
        reader = self._call.reader
        return verdicts.Facts(
            options=self.options,
            call=self._call_options,
            pid=self.pid,
            started=self._begun,
            exit_code=self.exit_code,
            usage=self.usage,
            oom_killed=self._oom_killed,
            oom_evidence=self._oom_evidence,
            last_bytes=self._enforcer.last_bytes,
            peak_bytes=self._enforcer.peak_bytes,
            crash_traceback=verdicts.only_theirs(system.read_crash_file(self._crash)),
            stderr=self._stderr.last_lines(),
            offence=self._offence,
            progress=reader.progress if reader.is_partial else None,
            memory_limit_hit=self._memory_limit_hit,
            group_peak_bytes=self._group_peak_bytes,
        )

    def call_usage(self, reason: ExitReason, waited: float = 0.0) -> Usage:
        """What the last call used, as far as is known.

        Args:
            reason: How it ended.
            waited: What has passed, in seconds, from the call to its being sent to this child.
        """
        measured, process = self._measured, self.usage
        began = self._body_began if self._begun else time.monotonic()
        wall: float | None = None
        peak = tree_peak = baseline = None
        user = kernel = None
        if measured is not None:
            wall, baseline = measured.wall_seconds, measured.baseline_bytes
            peak, tree_peak = measured.peak_bytes, measured.tree_peak_bytes
            user, kernel = measured.user_seconds, measured.system_seconds
        else:
            if self._begun:
                wall = time.monotonic() - self._body_began
            if process is not None and self._position == 1:
                # Of one that has served others, it may be theirs.
                peak = tree_peak = process.peak_rss_bytes
                user, kernel = process.user_seconds, process.system_seconds
        peaks = (tree_peak, self._enforcer.peak_bytes, self._group_peak_bytes)
        return Usage(
            pid=self.pid,
            peak_bytes=peak,
            tree_peak_bytes=max((one for one in peaks if one is not None), default=None),
            baseline_bytes=baseline,
            user_seconds=user,
            system_seconds=kernel,
            wall_seconds=wall,
            start_seconds=waited + began - self._call_began,
            argument_bytes=self._argument_bytes,
            result_bytes=self._result_bytes,
            start_method=self.options.start_method,
            position=self._position,
            exit_reason=reason,
        )


def _outcome_limits(options: ProcessOptions) -> protocol.Limits:
    """What may come from a child. An honest one says itself what is too large, which is small."""
    size = options.max_result_bytes
    buffers = protocol.CALL_LIMITS.buffers
    total = size + Measured.SIZE
    return protocol.Limits(body=size, buffers=buffers, buffer=size, total=total)


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
        except BaseException:
            # A signal handler's.
            connection.close()
            raise
        connection.close()
        raise ForkserverError(
            f"no forkserver listens at {address}: {error}",
            {"address": address, "errno": error.errno},
        ) from error
