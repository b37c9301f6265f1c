"""What a body writes on stderr: passed on at once, and the last of it kept for the case of a crash.

Libraries in C say there why they give up ("malloc(): invalid size", an exception of C++ that
nobody catches), and that belongs into the error of the call. So while a body runs its stderr is a
pipe, and its requester, who waits for it anyway, writes what comes to its own. Before and after the
body, in exit hooks, and between the calls of a batch it is the worker's own.

Where the worker's is a terminal it is left alone: programs look for that, and somebody is watching.
It is left alone too where processes are to outlive the body (``keep_children``): nobody would read.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import selectors
import termios
import time

from isolated_tasks.process.transport import own

__all__ = ["Capture", "Diversion"]

STDERR = 2

#: What is kept, in bytes, and what is shown of it, in lines.
KEPT_BYTES = 8 * 1024
SHOWN_LINES = 20

#: What one look passes on, at most, in bytes: clocks have to be looked at too.
READ_BYTES = 64 * 1024
MAX_READS = 8

#: How long stderr may be full, in seconds, before what does not fit is dropped.
PATIENCE = 0.25

#: How long a body's last lines may take to be passed on before exit hooks write theirs, in seconds.
TAKE_SECONDS = 0.05


class Capture:
    """The requester's side.

    Args:
        is_wanted: Whether to capture at all.

    Raises:
        OSError: There are no descriptors for it.
    """

    # What `close` finds where pipe(2) has failed.
    _reader = writer = -1

    def __init__(self, *, is_wanted: bool = True) -> None:
        self._kept = bytearray()
        # Most bodies write nothing there.
        self._buffer: bytearray | None = None
        if is_wanted and not os.isatty(STDERR):
            self._reader, self.writer = os.pipe()
            os.set_blocking(self._reader, False)
        else:
            self.writer = _own_stderr()
        own(self)

    def fileno(self) -> int:
        """What becomes readable when there is something to pass on; -1 if there never will be."""
        return self._reader

    def close_writer(self) -> None:
        """Close our copy of the child's end, once it has been sent."""
        if self.writer >= 0:
            writer, self.writer = self.writer, -1
            os.close(writer)

    def pass_on(self) -> bool:
        """Write what has come to our own stderr, and keep the last of it.

        Returns:
            Whether more may come.
        """
        if self._reader < 0:
            return False
        if self._buffer is None:
            self._buffer = bytearray(READ_BYTES)
        for _ in range(MAX_READS):
            try:
                # Not os.read, for which eventlet waits where there is nothing.
                count = os.readv(self._reader, [self._buffer])
            except BlockingIOError:
                return True
            if count == 0:
                return False
            data = memoryview(self._buffer)[:count]
            self._kept += data[-KEPT_BYTES:]
            del self._kept[:-KEPT_BYTES]
            _write(data)
        return True

    def last_lines(self) -> str:
        """The last lines that have come; the first of them may have lost its beginning."""
        lines = self._kept.decode(errors="replace").splitlines(keepends=True)
        return "".join(lines[-SHOWN_LINES:])

    def forget(self) -> None:
        """What has come was another call's."""
        self._kept.clear()

    def close(self) -> None:
        """Close the pipe; whoever still writes to it hears of that."""
        self.close_writer()
        if self._reader >= 0:
            reader, self._reader = self._reader, -1
            os.close(reader)

    abandon = close
    __del__ = close


def _own_stderr() -> int:
    try:
        return os.dup(STDERR)
    except OSError:
        # It is closed.
        return os.open(os.devnull, os.O_WRONLY)


def _write(data: memoryview) -> None:
    # Whoever does not read it any more cannot be helped; the body must not fail of that.
    with contextlib.suppress(OSError):
        while data:
            try:
                data = data[os.writev(STDERR, [data]) :]
            except BlockingIOError:
                # Somebody has made it so, and has it in common with us: a parent, or gevent.
                with selectors.DefaultSelector() as selector:
                    selector.register(STDERR, selectors.EVENT_WRITE)
                    if not selector.select(PATIENCE):
                        return


def _wait_taken(pipe: int) -> None:
    """Wait until the requester has taken what is in the pipe, so that what follows comes later.

    There is no event for that, and as a rule nothing to wait for.
    """
    waiting = array.array("i", [0])
    deadline = time.monotonic() + TAKE_SECONDS
    with contextlib.suppress(OSError):
        while not fcntl.ioctl(pipe, termios.FIONREAD, waiting) and waiting[0]:
            if time.monotonic() >= deadline:
                return
            time.sleep(0.001)


class Diversion:
    """The child's side.

    Args:
        target: Where its stderr goes while a body runs.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        try:
            self._own = os.dup(STDERR)
        except OSError:
            self._own = os.open(os.devnull, os.O_WRONLY)
        # Else what waits in there is the worker's, and none of our business.
        self._is_diverted = not os.path.sameopenfile(target, self._own)

    def begin(self) -> None:
        """A body begins."""
        self._turn(self._target)

    def end(self) -> None:
        """It has ended."""
        if self._is_diverted:
            _wait_taken(self._target)
        self._turn(self._own)

    def _turn(self, descriptor: int) -> None:
        # A body may have closed all that there is.
        with contextlib.suppress(OSError):
            os.dup2(descriptor, STDERR)
