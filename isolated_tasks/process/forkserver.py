"""Role: forkserver. The preloaded, single-threaded process that starts, signals and reaps children.

``python -m isolated_tasks.process.forkserver LISTENER STATUS LIFELINE`` is how the launcher starts
it; the arguments are descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import asdict
from typing import NoReturn

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import child, preload, protocol, system
from isolated_tasks.process.protocol import Boot, Loaded, Spawn
from isolated_tasks.process.transport import Channel
from isolated_tasks.process.usage import Usage

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
#: After this long a forkserver that could not accept for want of descriptors tries again.
LISTEN_AGAIN_MILLISECONDS = 100

_READ = system.POLL_READ
_WRITE = system.POLL_WRITE


def main(arguments: list[str]) -> NoReturn:
    """Live the whole life of a forkserver.

    The duties, in order:

    1. ignore the signals of terminals and groups; have a session of its own;
    2. close every descriptor that it was not given on purpose;
    3. read what to load; until that is done, let the kernel end it with the main process;
    4. load it, report it, freeze the heap;
    5. serve spawn requests, forward signals, reap children, report their exits;
    6. when the main process is gone: end all children, remove the socket, leave.
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
    report = Loaded(
        pid=os.getpid(),
        seconds=time.monotonic() - began,
        rss_bytes=system.rss_bytes(),
        entries=[asdict(entry) for entry in entries],
    )
    with contextlib.suppress(OSError):
        # If the main process is gone the loop notices at once.
        channel.send(report)
        while channel.wants_write:
            system.wait_for(channel.fileno(), _WRITE)
            channel.flush()
    _Loop(listening, channel, lifeline, boot).run()
    os._exit(0)


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
        self.was_used = False


class _Loop:
    """The forkserver's only loop."""

    def __init__(self, listener: socket.socket, status: Channel, lifeline: int, boot: Boot) -> None:
        self._listener = listener
        self._status = status
        self._boot = boot
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
        self._poll = system.poll()
        self._patience: int | None = None
        self._own_descriptors = len(_open_descriptors())
        for descriptor in (listener.fileno(), status.fileno(), self._wakeup):
            self._poll.register(descriptor, _READ)

    def run(self) -> None:
        """Serve until the main process is gone."""
        while not self._status.at_eof:
            ready = self._poll.poll(self._patience)
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
            self._status.receive()
        elif descriptor in self._connections:
            self._serve(self._connections[descriptor], events)

    def _listen(self, listening: bool) -> None:
        # Where the whole system is short of descriptors, none of ours need ever be closed.
        self._patience = None if listening else LISTEN_AGAIN_MILLISECONDS
        self._poll.modify(self._listener.fileno(), _READ if listening else 0)

    # ── connections ─────────────────────────────────────────────────────────────────────────────

    def _has_room(self) -> bool:
        """Whether a request can be taken whole: descriptors that find no room are lost."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self._own_descriptors + len(self._connections) + REQUEST_DESCRIPTORS <= limit

    def _accept(self) -> None:
        if not self._has_room():
            self._listen(False)
            return
        try:
            accepted, _ = self._listener.accept()
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
                system.signal_group(connection.pid, message.signal)
            return
        spawn = protocol.expect(message, Spawn)
        descriptors = connection.channel.take_descriptors()
        try:
            if connection.was_used or len(descriptors) != protocol.SPAWN_DESCRIPTORS:
                raise ProtocolError(
                    f"a spawn request came {'again' if connection.was_used else ''} "
                    f"with {len(descriptors)} descriptors"
                )
            connection.was_used = True
            call, lifeline, crash = descriptors
            inherited = child.Inherited(call, lifeline, crash, keep=self._preloaded)
            self._start(connection, spawn, inherited)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _drop(self, connection: _Connection) -> None:
        """The requester is gone: so goes its child."""
        if connection.pid is not None:
            system.signal_group(connection.pid, signal.SIGKILL)
        descriptor = connection.channel.fileno()
        self._poll.unregister(descriptor)
        del self._connections[descriptor]
        connection.channel.close()
        self._listen(True)

    # ── children ────────────────────────────────────────────────────────────────────────────────

    def _start(self, connection: _Connection, spawn: Spawn, inherited: child.Inherited) -> None:
        try:
            if spawn.start_method == "spawn":
                pid = self._spawn(spawn, inherited)
            else:
                pid = self._fork(spawn, inherited)
        except (OSError, ValueError) as exc:
            # ValueError: the environment holds what execve(2) cannot take.
            code = exc.errno if isinstance(exc, OSError) else None
            reason = os.strerror(code) if code else str(exc)
            connection.channel.send(protocol.Refused(reason, code))
            return
        with contextlib.suppress(OSError):
            # On both sides of the fork: whoever comes first, nobody signals a group that is not
            # there yet, or worse, is still our own. EACCES: it has exec'd since, so it came first.
            os.setpgid(pid, pid)
        connection.pid = pid
        self._by_pid[pid] = connection
        pidfd = system.open_pidfd(pid)
        try:
            connection.channel.send(protocol.Started(pid), () if pidfd is None else (pidfd,))
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
            os.write(description, child.describe(spawn, self._boot))
            os.lseek(description, 0, os.SEEK_SET)
            passed = (inherited.call, inherited.lifeline, inherited.crash, description)
            for descriptor in passed:
                os.set_inheritable(descriptor, True)
            command = system.interpreter("isolated_tasks.process.child")
            environment = {
                **os.environ,
                **spawn.env,
                "PYTHONPATH": os.pathsep.join(self._boot.sys_path),
            }
            return system.posix_spawn(
                command[0],
                [*command, *(str(descriptor) for descriptor in passed)],
                environment,
                setpgroup=0,
                setsigdef=[number for number in IGNORED_SIGNALS if number != signal.SIGINT],
            )
        finally:
            os.close(description)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while system.read(self._wakeup, 512):
                pass
        with contextlib.suppress(ChildProcessError):
            while (pid := system.child_exit()) is not None:
                # While it is unreaped its number is nobody else's: now is the time to take the
                # rest of its group along.
                system.signal_group(pid, signal.SIGKILL)
                _, status, rusage = os.wait4(pid, 0)
                self._report(pid, os.waitstatus_to_exitcode(status), Usage.from_rusage(rusage))

    def _report(self, pid: int, exit_code: int, usage: Usage) -> None:
        connection = self._by_pid.pop(pid, None)
        if connection is None:
            return
        connection.pid = None
        if connection.channel.fileno() < 0:
            return
        try:
            connection.channel.send(protocol.Exited(exit_code=exit_code, **asdict(usage)))
        except OSError:
            self._drop(connection)
        else:
            self._watch(connection)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def _end(self) -> None:
        """The main process is gone. Requesters live in it or die with it; so do children."""
        self._listener.close()
        _remove(self._boot.directory)
        for pid in self._by_pid:
            system.signal_group(pid, signal.SIGKILL)
        deadline = time.monotonic() + END_TIMEOUT
        while self._by_pid and time.monotonic() < deadline:
            system.wait_for(self._wakeup, timeout=deadline - time.monotonic())
            self._reap()


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
    print("isolated_tasks forkserver:", message % arguments, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # This module under its real name: a child pickles by reference, and finds it there.
    from isolated_tasks.process import forkserver

    forkserver.main(sys.argv[1:])
