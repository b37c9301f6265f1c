"""Role: forkserver. The preloaded, single-threaded process that starts, signals and reaps children.

``python -m isolated_tasks.process.forkserver LISTENER STATUS LIFELINE`` is how the launcher starts
it; the arguments are descriptors.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import faulthandler
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import NoReturn

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import board, cgroup, child, memory, preload, protocol, system
from isolated_tasks.process.admission import Admission, Answer
from isolated_tasks.process.board import Board, Entry
from isolated_tasks.process.protocol import Adopt, Boot, Loaded, Spawn
from isolated_tasks.process.strays import Strays
from isolated_tasks.process.transport import Channel
from isolated_tasks.process.usage import ProcessUsage
from isolated_tasks.process.wear import Wear

__all__ = ["main"]

#: Signals that come to a whole terminal, session or control group. None of them is for the
#: forkserver: it ends when the main process does, and children end when their requesters say so.
IGNORED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)

#: While a request is served: its connection, what comes with it, a pidfd, a spawned child's
#: description, and one to spare for what happens meanwhile.
REQUEST_DESCRIPTORS = 1 + protocol.SPAWN_DESCRIPTORS + 3
#: What children get to be gone when the main process is, in seconds.
END_TIMEOUT = 5.0
#: Calls to be stopped that are remembered, for the case that their children are yet to be started.
MAX_STOPS = 10_000
#: After this long a forkserver that could not accept for want of descriptors tries again.
LISTEN_AGAIN_MILLISECONDS = 100

_KILLED = -int(signal.SIGKILL)
_READ = system.POLL_READ
_WRITE = system.POLL_WRITE


def main(arguments: list[str]) -> NoReturn:
    """Live the whole life of a forkserver.

    The duties, in order:

    1. ignore the signals of terminals and groups; have a session of its own;
    2. close every descriptor that it was not given on purpose;
    3. read what to load; until that is done, let the kernel end it with the main process;
    4. load it, look whether it may make control groups, report both, freeze the heap;
    5. serve spawn requests, forward signals, reap children, report their exits;
    6. when it is to be replaced: take no more requests, see its children to their end, leave;
    7. when the main process is gone: end all children, remove the socket, leave.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):
        os.setsid()
    listener, status, lifeline = (int(argument) for argument in arguments)
    system.close_descriptors_except({0, 1, 2, listener, status, lifeline})
    for descriptor in (listener, status, lifeline):
        os.set_inheritable(descriptor, False)
    _silence_stdin()
    _keep_from_forks((listener, status, lifeline))
    # Where a preload crashes, or is stuck until the launcher loses patience, is said on stderr.
    faulthandler.enable()
    # A preload that is stuck in C cannot notice that the main process is gone; the kernel can.
    system.arm_lifeline(lifeline, group=os.getpid())
    if system.is_closed_by_peer(lifeline):
        os._exit(child.ExitCode.ORPHANED)
    channel = Channel.adopt(status, protocol.STATUS_LIMITS)
    # Before the preload, which may replace socket.socket.
    listening = socket.socket(fileno=listener)
    boot = _receive_boot(channel)
    preload.adopt(boot)
    began = time.monotonic()
    entries = preload.load(boot)
    # A spawned child's ru_maxrss begins at the mark of the process that it was exec'd from.
    system.reset_peak_rss()
    system.disarm_lifeline(lifeline)
    groups = cgroup.Groups(_complain)
    report = Loaded(
        pid=os.getpid(),
        seconds=time.monotonic() - began,
        rss_bytes=system.rss_bytes(),
        memory_limits=groups.description,
        entries=[asdict(entry) for entry in entries],
    )
    with contextlib.suppress(OSError):
        # If the main process is gone the loop notices at once.
        channel.send(report)
        while channel.wants_write:
            system.wait_for(channel.fileno(), _WRITE)
            channel.flush()
    _Loop(listening, channel, lifeline, boot, groups).run()
    os._exit(0)


def _keep_from_forks(descriptors: tuple[int, ...]) -> None:
    """Close these in whatever a preload forks: its copies would hide the end of this process."""
    held = list(descriptors)

    def close() -> None:
        # Once: in what a child forks the numbers may be anything.
        while held:
            with contextlib.suppress(OSError):
                os.close(held.pop())

    os.register_at_fork(after_in_child=close)


def _silence_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null != 0:
        os.close(null)


def _receive_boot(channel: Channel) -> Boot:
    while (message := channel.receive()) is None:
        if channel.at_eof:
            os._exit(child.ExitCode.ORPHANED)
        system.wait_for(channel.fileno())
    return protocol.expect(message, Boot)


class _Connection:
    """One requester's control socket, and the child that it asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        #: None before the child is started and after it has been reaped.
        self.pid: int | None = None
        #: What its child has started lives on.
        self.keeps_children = False
        #: The one of the child, also of a child of a dead forkserver.
        self.group: cgroup.Group | None = None
        self.was_used = False
        #: The only call that its child serves; None of a batch, and of calls that nobody stops.
        self.only_call: str | None = None
        #: Of a child of a dead forkserver: readable when that has ended.
        self.pidfd: int | None = None
        #: What waits for memory to become free: the request, and the descriptors that came with it.
        self.waiting: tuple[Spawn, list[int]] | None = None
        #: Since when, as time.monotonic() counts.
        self.waiting_since = 0.0
        #: What is known of its child.
        self.entry: Entry | None = None
        #: Of a child of a dead forkserver, of which no more than this is known.
        self.adopted: Adopt | None = None


class _Loop:
    """The forkserver's only loop."""

    def __init__(
        self,
        listener: socket.socket,
        status: Channel,
        lifeline: int,
        boot: Boot,
        groups: cgroup.Groups,
    ) -> None:
        self._listener = listener
        self._status = status
        self._boot = boot
        self._groups = groups
        self._listener.setblocking(False)
        # What a preload has opened on purpose stays open in children: everything that is there
        # now, but for what is ours.
        ours = {listener.fileno(), status.fileno(), lifeline}
        self._preloaded = frozenset(_open_descriptors() - ours)
        self._wakeup, wakeup_writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(wakeup_writer, False)
        # The handler does nothing; that there is one makes the signal write to the pipe.
        system.set_signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
        # Python counts our threads at each fork; where there is one there is nothing to silence.
        self._fork_process = system.fork if system.thread_count() == 1 else preload.fork_quietly
        self._connections: dict[int, _Connection] = {}
        self._by_pid: dict[int, _Connection] = {}
        #: Those of children of dead forkservers, by their pidfds.
        self._adopted: dict[int, _Connection] = {}
        self._poll = system.poll()
        self._patience: int | None = None
        self._own_descriptors = len(_open_descriptors())
        self._admission = Admission(boot.memory_budget_bytes)
        self._admission.reserve(boot.reserved_bytes)
        self._wear = Wear(boot.max_starts)
        self._is_retired = False
        self._stops: collections.OrderedDict[str, protocol.Stop] = collections.OrderedDict()
        self._oom_kills = memory.OOMKills()
        self._strays = Strays(self._by_pid)
        self._board = Board()
        self._starts = self._failures = 0
        for descriptor in (listener.fileno(), status.fileno(), self._wakeup):
            self._poll.register(descriptor, _READ)

    def run(self) -> None:
        """Serve until the main process is gone, or until the last child is, once replaced."""
        # What came right behind the `Boot` has been read with it.
        self._hear()
        while not self._status.at_eof:
            if self._is_retired and not self._by_pid and not self._strays.end():
                self._strays.end_preloaded()
                return
            ready = self._poll.poll(self._patience)
            # What the main process says first: that no further request is to be taken, say.
            ready.sort(key=lambda one: one[0] != self._status.fileno())
            for descriptor, events in ready:
                self._dispatch(descriptor, events)
            if not ready:
                self._listen(True)
        self._end()

    def _dispatch(self, descriptor: int, events: int) -> None:
        if descriptor == self._wakeup:
            self._reap()
        elif descriptor == self._listener.fileno():
            self._accept()
        elif descriptor == self._status.fileno():
            self._hear()
            self._say()
        elif descriptor in self._connections:
            self._serve(self._connections[descriptor], events)
        elif descriptor in self._adopted:
            self._end_adopted(self._adopted[descriptor])

    def _listen(self, listening: bool) -> None:
        if self._listener.fileno() < 0:
            # It is retired, or at its end: nobody is listened to any more.
            return
        # Where the whole system is short of descriptors, none of ours need ever be closed.
        self._patience = None if listening else LISTEN_AGAIN_MILLISECONDS
        self._poll.modify(self._listener.fileno(), _READ if listening else 0)

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def _has_room(self) -> bool:
        """Whether a request can be taken whole: descriptors that find no room are lost."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # What came with a request is held while it waits for memory, and until it is here whole.
        waiting = sum(not one.was_used or bool(one.waiting) for one in self._connections.values())
        held = waiting * protocol.SPAWN_DESCRIPTORS
        needed = len(self._connections) + held + REQUEST_DESCRIPTORS
        return self._own_descriptors + needed <= limit

    def _accept(self) -> None:
        if not self._has_room():
            self._listen(False)
            return
        try:
            accepted = system.accept(self._listener)
        except OSError as exc:
            # Another forkserver was faster or the requester is gone. Or we are out of
            # descriptors: then connections wait in the queue until one is closed here.
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                self._listen(False)
            return
        if system.peer_uid(accepted) not in (os.geteuid(), 0, None):
            accepted.close()
            return
        connection = _Connection(Channel(accepted, protocol.CONTROL_LIMITS, owned=False))
        self._connections[accepted.fileno()] = connection
        self._poll.register(accepted.fileno(), _READ)
        # The request is as a rule here already; reading it now saves a round of polling.
        self._serve(connection, _READ)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & _WRITE:
                connection.channel.flush()
            for message in connection.channel.messages():
                self._obey(connection, message)
        except ProtocolError as exc:
            _complain("a requester sent what is not a request: %s", exc)
            self._drop(connection)
            return
        except OSError:
            # It does not read what we tell it, so it is gone.
            self._drop(connection)
            return
        if connection.channel.at_eof:
            self._drop(connection)
        else:
            self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        events = _READ | (_WRITE if connection.channel.wants_write else 0)
        self._poll.modify(connection.channel.fileno(), events)

    def _obey(self, connection: _Connection, message: protocol.Message) -> None:
        if isinstance(message, protocol.Signal):
            if message.signal not in signal.valid_signals():
                raise ProtocolError(f"there is no signal {message.signal}")
            if connection.pid is not None:
                system.signal_child(connection.pid, message.signal, to_group=message.to_group)
            return
        descriptors = connection.channel.take_descriptors()
        waits = False
        try:
            if isinstance(message, Adopt) and not connection.was_used:
                connection.was_used = True
                self._admission.take(connection, message.memory_limit_bytes)
                connection.group = self._groups.adopt(message.group)
                if descriptors:
                    connection.adopted = message
                    connection.pidfd = descriptors.pop()
                    self._adopted[connection.pidfd] = connection
                    self._poll.register(connection.pidfd, _READ)
                self._send_stops(connection)
                return
            spawn = protocol.expect(message, Spawn)
            if connection.was_used or len(descriptors) != protocol.SPAWN_DESCRIPTORS:
                raise ProtocolError(
                    f"a spawn request came {'again' if connection.was_used else ''} "
                    f"with {len(descriptors)} descriptors"
                )
            connection.was_used = True
            waits = self._admit(connection, spawn, descriptors)
        finally:
            if not waits:
                _close_all(descriptors)

    def _drop(self, connection: _Connection) -> None:
        """The requester is gone: so goes its child."""
        if connection.channel.fileno() not in self._connections:
            # Seen before, while something was being sent to it.
            return
        if connection.pid is not None:
            system.signal_group(connection.pid, signal.SIGKILL)
        if connection.waiting is not None:
            _close_all(connection.waiting[1])
            connection.waiting = None
        descriptor = connection.channel.fileno()
        self._poll.unregister(descriptor)
        del self._connections[descriptor]
        connection.channel.close()
        self._end_adopted(connection)
        if connection.pid is None:
            # Else when the child is gone, and its memory with it. One that was adopted is now.
            self._give_back(connection)
            self._groups.finish(connection.group)
        self._listen(True)

    def _end_adopted(self, connection: _Connection) -> None:
        """A child of a dead forkserver is gone, or is not ours to look after any more."""
        if connection.pidfd is not None:
            pidfd, connection.pidfd = connection.pidfd, None
            connection.adopted = None
            del self._adopted[pidfd]
            self._poll.unregister(pidfd)
            os.close(pidfd)
            self._give_back(connection)

    # ── what the main process wants ─────────────────────────────────────────────────────────────

    def _hear(self) -> None:
        for message in self._status.messages():
            if isinstance(message, protocol.Retire):
                self._retire()
            elif isinstance(message, protocol.Reserve):
                self._admission.reserve(message.size_bytes)
                self._start_admitted()
            elif isinstance(message, protocol.Ping):
                self._say(protocol.Pong())
            elif isinstance(message, protocol.List):
                self._say(self._listing())
            else:
                self._stop_call(protocol.expect(message, protocol.Stop))

    def _say(self, message: protocol.Message | None = None) -> None:
        """Tell the main process, or send it what it has not taken yet."""
        # If it is gone the loop notices at once.
        with contextlib.suppress(OSError):
            if message is not None:
                self._status.send(message)
            elif self._status.wants_write:
                self._status.flush()
        events = _READ | (_WRITE if self._status.wants_write else 0)
        self._poll.modify(self._status.fileno(), events)

    def _listing(self) -> protocol.Listing:
        now = time.monotonic()
        children = [
            connection.entry.describe(pid)
            for pid, connection in self._by_pid.items()
            if connection.entry is not None
        ]
        waiting = []
        for connection in self._connections.values():
            if connection.adopted is not None:
                children.append(board.describe_adopted(connection.adopted))
            if connection.waiting is not None:
                spawn, _ = connection.waiting
                waiting.append(
                    {
                        "name": spawn.name,
                        "call_id": spawn.call_id,
                        "needed_bytes": spawn.memory_limit_bytes,
                        "seconds": now - connection.waiting_since,
                    }
                )
        return protocol.Listing(
            starts=self._starts,
            failures=self._failures,
            taken_bytes=self._admission.taken_bytes,
            budget_bytes=self._admission.budget_bytes,
            children=children,
            waiting=waiting,
        )

    def _retire(self) -> None:
        """Take no more requests. The listening socket is the main process's, and stays."""
        if self._is_retired:
            return
        self._is_retired = True
        self._patience = None
        self._poll.unregister(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            if connection.pid is None:
                # It waits for memory, or has said nothing yet, or its child was another one's: all
                # of these ask the next forkserver when they see this. So the group stays.
                connection.group = None
                self._drop(connection)
            else:
                self._tell(connection, protocol.Retiring())
        self._tell_held()

    def _tell_held(self) -> None:
        self._say(protocol.Held(self._admission.taken_bytes))

    def _stop_call(self, stop: protocol.Stop) -> None:
        self._stops[stop.call_id] = stop
        while len(self._stops) > MAX_STOPS:
            self._stops.popitem(last=False)
        # Only its requester knows which of its calls a child serves.
        for connection in list(self._connections.values()):
            if connection.was_used and connection.only_call in (None, stop.call_id):
                self._tell(connection, stop)

    def _send_stops(self, connection: _Connection) -> None:
        for stop in list(self._stops.values()):
            if not self._tell(connection, stop):
                return

    def _tell(self, connection: _Connection, message: protocol.Message) -> bool:
        """Send a message; whether the requester is there."""
        if connection.channel.fileno() not in self._connections:
            return False
        try:
            connection.channel.send(message)
        except OSError:
            self._drop(connection)
            return False
        self._watch(connection)
        return True

    # ── admission ───────────────────────────────────────────────────────────────────────────────

    def _admit(self, connection: _Connection, spawn: Spawn, descriptors: list[int]) -> bool:
        """Start a child, or have it wait; whether it waits."""
        connection.only_call = spawn.call_id if spawn.batch_size == 1 else None
        stop = None if spawn.call_id is None else self._stops.get(spawn.call_id)
        if stop is not None:
            connection.channel.send(stop)
            return False
        answer = self._admission.ask(connection, spawn.memory_limit_bytes)
        if answer is Answer.NEVER:
            budget = self._admission.budget_bytes
            connection.channel.send(protocol.Refused("its memory_limit is too high", None, budget))
        elif answer is Answer.WAIT:
            assert self._admission.budget_bytes is not None
            connection.channel.send(
                protocol.Waiting(self._admission.taken_bytes, self._admission.budget_bytes)
            )
            # Not before: if the requester is gone, it is the caller that closes the descriptors.
            connection.waiting = spawn, descriptors
            connection.waiting_since = time.monotonic()
        else:
            self._start(connection, spawn, descriptors)
            if spawn.call_id is None:
                # Nobody knows yet which call it will serve: one of these, maybe.
                self._send_stops(connection)
        return answer is Answer.WAIT

    def _give_back(self, connection: _Connection) -> None:
        self._admission.give_back(connection)
        if self._is_retired:
            self._tell_held()
        self._start_admitted()

    def _start_admitted(self) -> None:
        while (admitted := self._admission.next()) is not None:
            assert isinstance(admitted, _Connection)
            self._start_waiting(admitted)

    def _start_waiting(self, connection: _Connection) -> None:
        assert connection.waiting is not None
        (spawn, descriptors), connection.waiting = connection.waiting, None
        try:
            self._start(connection, spawn, descriptors)
        except OSError:
            self._drop(connection)
        else:
            self._watch(connection)
        finally:
            _close_all(descriptors)

    # ── children ────────────────────────────────────────────────────────────────────────────────

    def _start(self, connection: _Connection, spawn: Spawn, descriptors: list[int]) -> None:
        call, lifeline, crash, stderr = descriptors
        group = self._groups.make(spawn.memory_limit_bytes)
        # Before the fork: what is written after it is copied, page by page.
        connection.entry = entry = self._board.enter(spawn)
        self._starts += 1
        inherited = child.Inherited(
            call, lifeline, crash, stderr, self._preloaded, group, entry.place
        )
        try:
            if spawn.start_method == "spawn":
                pid = self._spawn(spawn, inherited)
            else:
                pid = self._fork(spawn, inherited)
        except (OSError, ValueError) as exc:
            # ValueError: the environment holds what execve(2) cannot take.
            code = exc.errno if isinstance(exc, OSError) else None
            reason = os.strerror(code) if code else str(exc)
            self._groups.finish(group)
            self._board.leave(entry)
            self._starts -= 1
            self._failures += 1
            connection.channel.send(protocol.Refused(reason, code, None))
            self._give_back(connection)
            return
        with contextlib.suppress(OSError):
            # On both sides of the fork: whoever comes first, nobody signals a group that is not
            # there yet, or worse, is still our own. EACCES: it has exec'd since, so it came first.
            os.setpgid(pid, pid)
        connection.pid, connection.group = pid, group
        connection.keeps_children = spawn.keep_children
        self._by_pid[pid] = connection
        worn = self._wear.started(spawn.failures)
        if worn is not None:
            self._say(protocol.Worn(worn))
        pidfd = system.open_pidfd(pid)
        try:
            started = protocol.Started(pid, None if group is None else str(group.folder))
            connection.channel.send(started, () if pidfd is None else (pidfd,))
            if connection.channel.wants_write and pidfd is not None:
                # It goes out with bytes that are still to be sent; the channel has not got a copy.
                raise BlockingIOError(errno.EAGAIN, "the requester's socket is full")
        finally:
            if pidfd is not None:
                os.close(pidfd)

    def _fork(self, spawn: Spawn, inherited: child.Inherited) -> int:
        pid = self._fork_process()
        if pid == 0:
            self._let_go()
            child.main(inherited, spawn)
        return pid

    def _let_go(self) -> None:
        """In the child: have no object here close a descriptor whose number is another's by then.

        The descriptors themselves are closed by `child.main`, all at once.
        """
        for connection in self._connections.values():
            connection.channel.detach()
        self._listener.detach()
        self._status.detach()

    def _spawn(self, spawn: Spawn, inherited: child.Inherited) -> int:
        """Start a fresh interpreter, which loads the app for itself."""
        description = system.crash_file()
        try:
            _write_whole(description, child.describe(spawn, self._boot))
            os.lseek(description, 0, os.SEEK_SET)
            passed = (*inherited.always(), description)
            for descriptor in passed:
                os.set_inheritable(descriptor, True)
            command = system.interpreter("isolated_tasks.process.child")
            group = [] if inherited.group is None else [str(inherited.group.folder)]
            environment = {
                **os.environ,
                **spawn.env,
                "PYTHONPATH": os.pathsep.join(self._boot.sys_path),
            }
            return system.posix_spawn(
                command[0],
                [*command, *(str(descriptor) for descriptor in passed), *group],
                environment,
                setpgroup=0,
                # What a whole control group may get stays ignored until the child has handlers.
                setsigdef=[signal.SIGUSR2],
            )
        finally:
            os.close(description)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while system.read(self._wakeup, 512):
                pass
        in_order = True
        with contextlib.suppress(ChildProcessError):
            while (pid := system.child_exit()) is not None:
                connection = self._by_pid.get(pid)
                is_spared = connection is not None and connection.keeps_children
                if is_spared or self._strays.spares(pid):
                    # What has lost its parent just now is what this one has left. If another one
                    # has exited too, it may be that one's: in doubt it lives.
                    self._strays.spare()
                else:
                    # While it is unreaped its number is nobody else's: now is the time to take the
                    # rest of its group along.
                    system.signal_group(pid, signal.SIGKILL)
                self._strays.reaped(pid)
                _, status, rusage = os.wait4(pid, 0)
                exit_code = os.waitstatus_to_exitcode(status)
                in_order &= exit_code == child.ExitCode.DONE and pid in self._by_pid
                self._report(pid, exit_code, ProcessUsage.from_rusage(rusage))
            in_order &= bool(self._by_pid) or self._strays.spares_any
            if not in_order or self._strays.are_seen():
                # A child that leaves in order has looked for processes that it would leave behind
                # itself, and looking takes a pass over all that there are. What is killed here
                # comes back as an exit, and we look again for what that one has left.
                self._strays.end()
        # One of them may have been the last in its group.
        self._groups.tidy()

    def _report(self, pid: int, exit_code: int, usage: ProcessUsage) -> None:
        connection = self._by_pid.pop(pid, None)
        if connection is None:
            return
        group, connection.pid, connection.group = connection.group, None, None
        if connection.entry is not None:
            self._board.leave(connection.entry)
            connection.entry = None
        self._failures += exit_code not in child.IN_ORDER
        is_killed = exit_code == _KILLED
        self._oom_kills.look(at_once=is_killed)
        oom_killed: bool | None = False
        evidence = ""
        if is_killed:
            oom_killed, evidence = self._look_for_oom_kill(group)
        exited = protocol.Exited(
            exit_code=exit_code,
            oom_killed=oom_killed,
            oom_evidence=evidence,
            memory_limit_hit=group is not None and group.limit_hit(),
            peak_bytes=None if group is None else group.peak_bytes(),
            peak_rss_bytes=usage.peak_rss_bytes,
            user_seconds=usage.user_seconds,
            system_seconds=usage.system_seconds,
        )
        if exit_code == child.ExitCode.DONE:
            self._groups.check_joined(group)
        self._groups.finish(group, kill=not connection.keeps_children)
        if connection.channel.fileno() >= 0:
            self._tell(connection, exited)
        self._give_back(connection)

    def _look_for_oom_kill(self, group: cgroup.Group | None) -> tuple[bool | None, str]:
        if group is not None and (count := group.oom_kills()):
            return True, f"oom_kill of {group.folder} rose from 0 to {count}"
        explained = self._oom_kills.explain_one()
        return explained, self._oom_kills.evidence if explained else ""

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def _end(self) -> None:
        """The main process is gone. Requesters live in it or die with it; so do children."""
        self._listener.close()
        _remove(self._boot.directory)
        for pid in self._by_pid:
            system.signal_group(pid, signal.SIGKILL)
        self._strays.end_preloaded()
        deadline = time.monotonic() + END_TIMEOUT
        # What was killed may leave others, which become ours as it ends: until there are none.
        while self._by_pid or self._strays.end() or not self._groups.tidy():
            left = deadline - time.monotonic()
            if left <= 0:
                return
            system.wait_for(self._wakeup, timeout=left)
            self._reap()


def _write_whole(descriptor: int, data: bytes) -> None:
    """Write it to the end: up to a limit of its size, or of memory, a file takes a part."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _open_descriptors() -> set[int]:
    """Every descriptor of this process; those of a listing of /proc in between are closed again."""
    try:
        listed = {int(name) for name in os.listdir("/proc/self/fd")}
    except OSError:
        listed = set(range(3, 256))
    return {descriptor for descriptor in listed if _is_open(descriptor)}


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _remove(directory: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def _complain(message: str, *arguments: object) -> None:
    # Logging belongs to the app, which may have configured it for another process or not at all.
    # And where stderr takes nothing, as on a full disk, that is no reason to end.
    text = message % arguments
    # Not sys.stderr, which may be a log of the app's; without either there is None.
    with contextlib.suppress(OSError, ValueError):
        print("isolated_tasks forkserver:", text, file=sys.__stderr__ or sys.stderr, flush=True)


if __name__ == "__main__":
    # This module under its real name: a child pickles by reference, and finds it there.
    from isolated_tasks.process import forkserver

    forkserver.main(sys.argv[1:])
