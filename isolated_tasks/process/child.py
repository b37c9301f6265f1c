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
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import pickling, protocol, randomness, system
from isolated_tasks.process.outcome import Failure, Outcome
from isolated_tasks.process.protocol import Boot, Spawn
from isolated_tasks.process.transport import Channel

__all__ = ["ExitCode", "Inherited", "is_child", "main"]

_is_child = False


class ExitCode(enum.IntEnum):
    """How a child ends by itself; see docs/reference/exit-codes.md."""

    #: All calls served, or told to go.
    DONE = 0
    #: The requester was gone before the lifeline was armed.
    ORPHANED = 71
    #: The child's own code failed; the traceback is on its stderr.
    INTERNAL = 70


@dataclass(frozen=True)
class Inherited:
    """What a child is born with."""

    #: Its end of the call socket.
    call: int
    #: The reading end of the lifeline.
    lifeline: int
    #: Where faulthandler writes.
    crash: int
    #: What else stays open: files that a preload opened.
    keep: frozenset[int] = frozenset()


def is_child() -> bool:
    """Whether this process is a child, or was forked from one."""
    return _is_child


def main(inherited: Inherited, spawn: Spawn, *, boot: Callable[[], None] | None = None) -> NoReturn:
    """Live the whole life of a child.

    The duties, in order:

    1. lead a process group of its own (the forkserver does the same from its side);
    2. arm the lifeline, then look whether the requester is already gone;
    3. put signals back to Python's defaults, but for SIGINT, which it ignores;
    4. close what belongs to the forkserver;
    5. be preferred by the out-of-memory killer; begin the memory high-water mark anew;
    6. send faulthandler's output where the requester can read it;
    7. forget the forkserver's exit hooks; draw random numbers of its own;
    8. set its environment and, in a fresh interpreter, load the app;
    9. serve calls;
    10. run exit hooks, for a bounded time, and leave by ``os._exit``.
    """
    code: int = ExitCode.INTERNAL
    try:
        _be_born(inherited, spawn)
        failure = _boot(boot) if boot is not None else None
        code = _Server(inherited, spawn, failure).serve()
        _run_exit_hooks(spawn.exit_timeout)
    except BaseException:
        # Nothing may unwind into the forkserver's frames above this one.
        sys.excepthook(*sys.exc_info())
    finally:
        _flush()
        os._exit(code)


# ── birth ───────────────────────────────────────────────────────────────────────────────────────


def _be_born(inherited: Inherited, spawn: Spawn) -> None:
    global _is_child
    _is_child = True
    with contextlib.suppress(PermissionError):
        # A session leader cannot be moved, and need not be.
        os.setpgid(0, 0)
    system.arm_lifeline(inherited.lifeline, group=os.getpid())
    # Only now: a requester that died before the arming sent no signal, one that dies after does.
    if system.is_closed_by_peer(inherited.lifeline):
        os._exit(ExitCode.ORPHANED)
    _reset_signals()
    system.close_descriptors_except(
        {0, 1, 2, inherited.call, inherited.lifeline, inherited.crash} | inherited.keep
    )
    system.prefer_for_oom_kill()
    system.reset_peak_rss()
    faulthandler.enable(inherited.crash)
    atexit._clear()
    randomness.reseed()
    os.environ.update(spawn.env)
    gc.enable()


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _handled_signals():
        with contextlib.suppress(OSError, ValueError):
            system.set_signal(number, signal.SIG_DFL)
    # As in Celery's pool processes: the terminal's Ctrl-C is for the worker to act on.
    system.set_signal(signal.SIGINT, signal.SIG_IGN)
    # As Python itself starts: a closed socket, a file at its limit is an error, not the end.
    system.set_signal(signal.SIGPIPE, signal.SIG_IGN)
    system.set_signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _handled_signals() -> list[signal.Signals]:
    fixed = {signal.SIGKILL, signal.SIGSTOP}
    return [
        number
        for number in signal.Signals
        if number not in fixed and system.getsignal(number) is not signal.SIG_DFL
    ]


def _boot(boot: Callable[[], None]) -> Failure | None:
    try:
        boot()
    except BaseException as exc:
        # The requester will want to know, and can only be told as the outcome of a call.
        return Failure.of(exc, skip=sys._getframe())
    return None


# ── calls ───────────────────────────────────────────────────────────────────────────────────────


class _Server:
    """Serves the calls of one batch."""

    def __init__(self, inherited: Inherited, spawn: Spawn, failure: Failure | None) -> None:
        self._channel = Channel.adopt(inherited.call, protocol.CALL_LIMITS)
        self._spawn = spawn
        # Why no call can be run here: the app did not load.
        self._failure = failure
        self._pid = os.getpid()

    def serve(self) -> int:
        """Serve up to ``batch_size`` calls; return the exit code."""
        for position in range(1, self._spawn.batch_size + 1):
            idle_timeout = None if position == 1 else self._spawn.batch_idle_timeout
            call = self._receive(idle_timeout)
            if call is None:
                break
            if not isinstance(call, protocol.Call):
                raise ProtocolError(f"a call was to come, but {type(call).__name__} came")
            self._send(protocol.Accepted(self._pid))
            if self._serve_one(call, is_last=position == self._spawn.batch_size):
                break
        return ExitCode.DONE

    def _serve_one(self, call: protocol.Call, *, is_last: bool) -> bool:
        """Run one call and send its outcome; whether it was the last."""
        outcome = _run(call) if self._failure is None else Outcome(failure=self._failure)
        if os.getpid() != self._pid:
            # The body forked, and this is the copy that came back into our code.
            _flush()
            os._exit(ExitCode.DONE)
        pickled = _pickle_outcome(outcome, self._spawn.name)
        del outcome, call
        last = is_last or self._failure is not None or self._is_too_big()
        _flush()
        self._send(protocol.Outcome(pickled.body, pickled.buffers, last=last))
        return last

    def _is_too_big(self) -> bool:
        limit = self._spawn.batch_memory_limit_bytes
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
        self._channel.send(message)
        while self._channel.wants_write:
            system.wait_for(self._channel.fileno(), system.POLL_WRITE)
            self._channel.flush()


def _run(call: protocol.Call) -> Outcome:
    frame = sys._getframe()
    try:
        function, args, kwargs = pickling.loads(pickling.Pickled(call.pickled, call.buffers))
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


def _pickle_outcome(outcome: Outcome, task: str) -> pickling.Pickled:
    stand_in, outcome = outcome.stand_in, dataclasses.replace(outcome, stand_in=None)
    try:
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
    system.set_signal(signal.SIGALRM, signal.SIG_DFL)
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


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A body may have closed or replaced them.
        with contextlib.suppress(Exception):
            stream.flush()


# ── a fresh interpreter ─────────────────────────────────────────────────────────────────────────


def _spawned(arguments: list[str]) -> NoReturn:
    """``python -m isolated_tasks.process.child CALL LIFELINE CRASH BOOT``: start_method="spawn".

    The numbers are descriptors; BOOT holds the `Spawn` and the `Boot`, as frames.
    """
    from isolated_tasks.process import preload

    call, lifeline, crash, description = (int(argument) for argument in arguments)
    for descriptor in (call, lifeline, crash):
        os.set_inheritable(descriptor, False)
    with open(description, "rb") as file:
        spawn, boot = _read_description(file.read())
    preload.adopt(boot)
    main(Inherited(call, lifeline, crash), spawn, boot=lambda: preload.set_up(boot))


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
