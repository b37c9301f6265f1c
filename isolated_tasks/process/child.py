"""Role: child. The short-lived process that runs calls, sends their outcomes, and exits.

`main` is what the forkserver calls in a process that it has just forked; ``python -m
isolated_tasks.process.child`` is the same for a fresh interpreter (``start_method="spawn"``).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import enum
import faulthandler
import gc
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from isolated_tasks.errors import ProtocolError, ResultTooLargeError
from isolated_tasks.process import (
    board,
    cgroup,
    descendants,
    pickling,
    plain,
    protocol,
    randomness,
    system,
)
from isolated_tasks.process.condition import Condition
from isolated_tasks.process.limits import TERMINATING, Limits, body
from isolated_tasks.process.outcome import Failure, Outcome
from isolated_tasks.process.protocol import Boot, Spawn
from isolated_tasks.process.stderr import Diversion
from isolated_tasks.process.transport import Channel
from isolated_tasks.process.usage import Meter

__all__ = ["IN_ORDER", "ExitCode", "Inherited", "is_child", "main"]

logger = logging.getLogger(__name__)

_is_child = False


class ExitCode(enum.IntEnum):
    """How a child ends by itself; see docs/reference/exit-codes.md."""

    #: All calls served, or told to go.
    DONE = 0
    #: The same, and the body had left processes behind; the forkserver looks whether all are gone.
    LEFT_PROCESSES = 72
    #: The requester was gone, before the lifeline was armed or before it could end the child.
    ORPHANED = 71
    #: The child's own code failed; the traceback is on its stderr.
    INTERNAL = 70


#: Those of a child that has ended as it should.
IN_ORDER = frozenset({ExitCode.DONE, ExitCode.LEFT_PROCESSES})


@dataclass(frozen=True)
class Inherited:
    """What a child is born with."""

    #: Its end of the call socket.
    call: int
    #: The reading end of the lifeline.
    lifeline: int
    #: Where faulthandler writes.
    crash: int
    #: Where the stderr of bodies goes.
    stderr: int
    #: What else stays open: files that a preload opened.
    keep: frozenset[int] = frozenset()
    #: The group that it moves itself into, where the kernel keeps its memory limit.
    group: cgroup.Group | None = None
    #: Where it writes what it does.
    place: board.Place | None = None

    def always(self) -> tuple[int, int, int, int]:
        """The descriptors that every child has."""
        return self.call, self.lifeline, self.crash, self.stderr


def is_child() -> bool:
    """Whether this process is a child, or was forked from one."""
    return _is_child


def main(
    inherited: Inherited, spawn: Spawn, *, boot: Callable[[], object] | None = None
) -> NoReturn:
    """Live the whole life of a child.

    The duties, in order:

    1. lead a process group of its own (the forkserver does the same from its side);
    2. arm the lifeline, then look whether the requester is already gone; move into its control
       group, before it holds anything of its own;
    3. put signals back to Python's defaults, but for SIGINT, which it ignores, and for those that
       the requester may send (see `limits`);
    4. close what belongs to the forkserver;
    5. be preferred by the out-of-memory killer; begin the memory high-water mark anew;
    6. send faulthandler's output where the requester can read it;
    7. forget the forkserver's exit hooks and processes; draw random numbers of its own;
    8. set its environment and, in a fresh interpreter, load the app;
    9. serve calls;
    10. run exit hooks, and end what bodies have left, for a bounded time; leave by ``os._exit``.
    """
    code: int = ExitCode.INTERNAL
    try:
        limits = _be_born(inherited, spawn)
        failure = _boot(boot) if boot is not None else None
        code = _Server(inherited, spawn, limits, failure).serve()
        _run_exit_hooks(spawn.exit_timeout)
        if spawn.keep_children and not limits.was_stopped:
            # The kernel would kill who is still in the group when the requester lets go.
            system.disarm_lifeline(inherited.lifeline)
        elif code == ExitCode.DONE and system.has_children():
            code = ExitCode.LEFT_PROCESSES
            _end_processes()
    except BaseException:
        # Nothing may unwind into the forkserver's frames above this one.
        sys.excepthook(*sys.exc_info())
    finally:
        _flush()
        os._exit(code)


# ── birth ───────────────────────────────────────────────────────────────────────────────────────


def _be_born(inherited: Inherited, spawn: Spawn) -> Limits:
    global _is_child
    _is_child = True
    board.adopt(inherited.place)
    with contextlib.suppress(PermissionError):
        # A session leader cannot be moved, and need not be.
        os.setpgid(0, 0)
    system.arm_lifeline(inherited.lifeline, group=os.getpid())
    # Only now: a requester that died before the arming sent no signal, one that dies after does.
    if system.is_closed_by_peer(inherited.lifeline):
        os._exit(ExitCode.ORPHANED)
    if inherited.group is not None:
        inherited.group.join()
    _reset_signals()
    limits = Limits(spawn, inherited.call, inherited.crash)
    limits.install()
    # So that whatever the body starts stays below it, where its memory is counted.
    system.become_subreaper()
    system.close_descriptors_except({0, 1, 2, *inherited.always()} | inherited.keep)
    system.prefer_for_oom_kill()
    system.reset_peak_rss()
    faulthandler.enable(inherited.crash)
    atexit._clear()
    _forget_processes()
    randomness.reseed()
    os.environ.update(spawn.env)
    gc.enable()
    return limits


def _forget_processes() -> None:
    """Those that a preload has started are the forkserver's.

    At its exit multiprocessing would terminate them, fail as it waits for what is no child of this
    process, and leave the other exit hooks out. Its own children begin without any (BaseProcess.
    _bootstrap).
    """
    module = sys.modules.get("multiprocessing.process")
    if module is not None:
        module._children.clear()


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _RESET_SIGNALS:
        if system.getsignal(number) != system.SIG_DFL:
            with contextlib.suppress(OSError, ValueError):
                system.set_signal(number, system.SIG_DFL)
    # As in Celery's pool processes: the terminal's Ctrl-C is for the worker to act on.
    system.set_signal(signal.SIGINT, system.SIG_IGN)
    # As Python itself starts: a closed socket, a file at its limit is an error, not the end.
    system.set_signal(signal.SIGPIPE, system.SIG_IGN)
    system.set_signal(signal.SIGXFSZ, system.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


#: Those that get their default back: all that can be set, but for those of `limits`, which stay
#: ignored for the moment that there is no handler yet. As plain numbers: whatever a child touches
#: of the forkserver's objects it gets a copy of, page by page.
_RESET_SIGNALS = tuple(
    int(number)
    for number in signal.Signals
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1, *TERMINATING)
)


def _boot(boot: Callable[[], object]) -> Failure | None:
    try:
        boot()
    except BaseException as exc:
        # The requester will want to know, and can only be told as the outcome of a call.
        return Failure.of(exc, skip=sys._getframe())
    return None


# ── calls ───────────────────────────────────────────────────────────────────────────────────────


class _Server:
    """Serves the calls of one batch."""

    def __init__(
        self, inherited: Inherited, spawn: Spawn, limits: Limits, failure: Failure | None
    ) -> None:
        self._channel = Channel.adopt(inherited.call, protocol.CALL_LIMITS)
        self._spawn = spawn
        self._limits = limits
        # Why no call can be run here: the app did not load.
        self._failure = failure
        self._group = inherited.group
        self._stderr = Diversion(inherited.stderr)
        self._meter = Meter(is_forked=spawn.start_method == "forkserver")
        self._pid = os.getpid()

    def serve(self) -> int:
        """Serve up to ``batch_size`` calls; return the exit code."""
        for position in range(1, self._spawn.batch_size + 1):
            spawn = self._spawn
            timeout = spawn.first_call_timeout if position == 1 else spawn.batch_idle_timeout
            call = self._receive(timeout)
            if call is None or isinstance(call, protocol.Halt):
                break
            if not isinstance(call, protocol.Call):
                raise ProtocolError(f"a call was to come, but {type(call).__name__} came")
            self._limits.is_serving = True
            self._meter.begin()
            board.begin(position)
            self._send(protocol.Accepted(self._pid))
            if self._serve_one(call, is_last=position == self._spawn.batch_size):
                break
        return ExitCode.DONE

    def _serve_one(self, call: protocol.Call, *, is_last: bool) -> bool:
        """Run one call and send its outcome; whether it was the last."""
        self._limits.on_begin = self._say_begun
        self._limits.found = None
        self._stderr.begin()
        outcome = _run(call) if self._failure is None else Outcome(failure=self._failure)
        measured = self._meter.ended()
        # Should a signal have hit between two steps of the block that has them.
        self._limits.end()
        if os.getpid() != self._pid:
            # The body forked, and this is the copy that came back into our code.
            _flush()
            os._exit(ExitCode.DONE)
        pickled = _pickle_outcome(outcome, self._spawn)
        del outcome, call
        last = is_last or self._failure is not None or self._is_spent()
        _flush()
        self._stderr.end()
        if self._group is not None and self._group.limit_hit():
            # The kernel has killed a descendant, and the body did not mind; the limit is for all.
            os.kill(self._pid, signal.SIGKILL)
        # Once this is sent the next call may come.
        self._limits.is_serving = False
        board.end()
        self._send(
            protocol.Outcome(pickled.body, pickled.buffers, last=last, measured=measured().pack())
        )
        return last

    def _say_begun(self) -> None:
        self._meter.begun()
        self._send(protocol.Begun(self._pid))

    def _is_spent(self) -> bool:
        """Whether the next call must not find the process as the last one has left it."""
        left = []
        if self._limits.found is not None:
            may_leave = self._spawn.keep_children
            left = self._limits.found.changes(Condition.now(), may_leave_children=may_leave)
        if self._is_too_big():
            left.append(f"{system.rss_bytes() / 2**20:.0f} MiB of memory")
        if left:
            logger.warning(
                "child pid=%d task=%s serves no further call of its batch: it was left with %s",
                self._pid,
                self._spawn.name,
                "; ".join(left),
            )
        return bool(left)

    def _is_too_big(self) -> bool:
        limits = [self._spawn.batch_memory_limit_bytes]
        if self._spawn.soft_memory_limit_bytes is not None:
            # What one call leaves is not to be the next one's MemoryError.
            limits.append(self._spawn.soft_memory_limit_bytes // 2)
        limit = min((one for one in limits if one is not None), default=None)
        if limit is None or system.rss_bytes() <= limit:
            return False
        # What only cycles hold is no reason to end a batch.
        gc.collect()
        return system.rss_bytes() > limit

    def _receive(self, timeout: float | None) -> protocol.Message | None:
        """The next call; None when the requester wants no more or the time is over."""
        while (message := self._channel.receive()) is None:
            if self._channel.at_eof:
                return None
            # A call that has begun to arrive is waited for: its requester is sending.
            patience = None if self._channel.reader.is_partial else timeout
            if not system.wait_for(self._channel.fileno(), timeout=patience):
                return None
        return message

    def _send(self, message: protocol.Message) -> None:
        try:
            self._channel.send(message)
            while self._channel.wants_write:
                system.wait_for(self._channel.fileno(), system.POLL_WRITE)
                self._channel.flush()
        except ConnectionError:
            # The kernel closes its descriptors one by one, and has yet to come to the lifeline.
            os._exit(ExitCode.ORPHANED)


def _run(call: protocol.Call) -> Outcome:
    frame = sys._getframe()
    try:
        function, args, kwargs = pickling.loads(pickling.Pickled(call.pickled, call.buffers))
        # One that has more to do than to run a body says itself where that begins.
        marked = getattr(function, "marks_body", False)
        with contextlib.nullcontext() if marked else body():
            value = function(*args, **kwargs)
    except BaseException as exc:
        # SystemExit and KeyboardInterrupt as well: they end a body, and the requester is told.
        return Outcome(failure=Failure.of(exc, skip=frame))
    return value if isinstance(value, Outcome) else Outcome(value=value)


#: Types of results of which pickle itself makes sure that they load.
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})

#: A larger result is not loaded in the child to see whether it does, in bytes.
_LOADED_UP_TO = 256 * 1024


def _see_it_load(pickled: pickling.Pickled) -> None:
    """Raise here what the requester would, while there still is something else to send."""
    if pickled.size <= _LOADED_UP_TO:
        pickling.loads(pickled)


def _pickle_outcome(outcome: Outcome, spawn: Spawn) -> pickling.Pickled:
    if spawn.plain_outcomes:
        pickled = plain.encode(outcome, task=spawn.name)
    else:
        pickled = _pickle(outcome, spawn.name)
    if pickled.size <= spawn.max_result_bytes:
        return pickled
    what = "result" if outcome.failure is None else "exception"
    refusal = ResultTooLargeError(
        f"task {spawn.name!r}: its {what} has {pickled.size} bytes, above max_result_bytes="
        f"{spawn.max_result_bytes}; return a path or a key instead",
        {"task": spawn.name, "size": pickled.size, "limit": spawn.max_result_bytes},
    )
    # Without the notes, which may be what is so large.
    outcome = Outcome(failure=Failure.of(refusal))
    return plain.encode(outcome, task=spawn.name) if spawn.plain_outcomes else _pickle(outcome, "")


def _pickle(outcome: Outcome, task: str) -> pickling.Pickled:
    stand_in = outcome.stand_in
    if stand_in is not None:
        outcome = dataclasses.replace(outcome, stand_in=None)
    try:
        if type(outcome.value) in _PLAIN and outcome.failure is None:
            # There is nothing in it that pickle's own pickler does not know.
            return pickling.dumps(outcome, pickler=pickle.Pickler)
        pickled = pickling.dumps(outcome)
        if stand_in is not None and type(outcome.value) not in _PLAIN:
            _see_it_load(pickled)
        return pickled
    except Exception as exc:
        error = exc
    if stand_in is not None:
        # Whatever it raises: then the value itself is what there is to complain of.
        with contextlib.suppress(Exception):
            return pickling.dumps(dataclasses.replace(outcome, value=stand_in()))
    refusal = pickling.refusal({"result": outcome.value}, error, task=task, what="result")
    return pickling.dumps(Outcome(failure=Failure.of(refusal), notes=outcome.notes))


# ── exit ────────────────────────────────────────────────────────────────────────────────────────


def _run_exit_hooks(timeout: float) -> None:
    """Do what an interpreter does at its end, up to tearing down modules; not for longer than this.

    The kernel keeps the time: SIGALRM's default is to end the process, also one whose hook is
    stuck in C.
    """
    system.set_signal(signal.SIGALRM, system.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, timeout)
    # Threads of the body that are not daemons, then the hooks in the order of CPython's own
    # multiprocessing children (Lib/multiprocessing/process.py, BaseProcess._bootstrap).
    threading._shutdown()  # type: ignore[attr-defined]
    multiprocessing_util = sys.modules.get("multiprocessing.util")
    if multiprocessing_util is not None:
        multiprocessing_util._exit_function()
    atexit._run_exitfuncs()
    logging.shutdown()


def _end_processes() -> None:
    """End what the body has left, wherever it is: the forkserver, which would, may be dead.

    For as long as the clock of the exit hooks still runs.
    """
    with contextlib.suppress(ChildProcessError):
        while _kill_children():
            # Of each that ends, those it has started become ours.
            os.waitpid(-1, 0)


def _kill_children() -> bool:
    """Kill whom this process is the parent of; whether there is anybody that may be killed."""
    killed = False
    for pid in descendants.children(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            killed = True
    return killed


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A body may have closed or replaced them.
        with contextlib.suppress(Exception):
            stream.flush()


# ── a fresh interpreter ─────────────────────────────────────────────────────────────────────────


def _spawned(arguments: list[str]) -> NoReturn:
    """``python -m isolated_tasks.process.child CALL LIFELINE CRASH STDERR BOOT [GROUP]``.

    That is start_method="spawn". The numbers are descriptors; BOOT holds the `Spawn` and the
    `Boot`, as frames. GROUP is the folder of the control group.
    """
    from isolated_tasks.process import preload

    call, lifeline, crash, stderr, description = (int(argument) for argument in arguments[:5])
    for descriptor in (call, lifeline, crash, stderr):
        os.set_inheritable(descriptor, False)
    with open(description, "rb") as file:
        spawn, boot = _read_description(file.read())
    preload.adopt(boot)
    group = cgroup.Group.at(arguments[5] if arguments[5:] else None)
    inherited = Inherited(call, lifeline, crash, stderr, group=group)
    main(inherited, spawn, boot=lambda: preload.set_up(boot))


def describe(spawn: Spawn, boot: Boot) -> bytes:
    """What `_spawned` reads."""
    return b"".join(bytes(piece) for message in (spawn, boot) for piece in protocol.encode(message))


def _read_description(data: bytes) -> tuple[Spawn, Boot]:
    reader = protocol.FrameReader(protocol.STATUS_LIMITS)
    frames: list[protocol.Frame] = []
    while data:
        space = reader.space()
        count = min(len(space), len(data))
        space[:count] = data[:count]
        data = data[count:]
        frames.extend(reader.received(count))
    spawn, boot = (protocol.decode(frame) for frame in frames)
    return protocol.expect(spawn, Spawn), protocol.expect(boot, Boot)


if __name__ == "__main__":
    # This module under its real name, so that `is_child` has one answer.
    from isolated_tasks.process import child

    child._spawned(sys.argv[1:])
