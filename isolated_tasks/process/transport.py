"""Sockets that carry messages, buffers and descriptors, without ever blocking by themselves.

A `Channel` moves what can be moved now and returns; its owner decides how to wait. That is what
lets one implementation serve a pool process, a thread, a greenlet of gevent or eventlet, the loop
of the forkserver, and the child.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import protocol
from isolated_tasks.process.protocol import Bytes, Frame, FrameReader, Limits

__all__ = ["Channel", "Lifeline", "Owned", "own", "received_descriptors"]

#: What one sendmsg(2) may take: IOV_MAX is 1024.
_MAX_PIECES = 512

# Numbers, because those of `socket` are members of enums, with which arithmetic is slow.
_MSG_CMSG_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_MSG_CTRUNC = int(socket.MSG_CTRUNC)
_ROOM_FOR_DESCRIPTORS = socket.CMSG_SPACE(protocol.SPAWN_DESCRIPTORS * array.array("i").itemsize)

# Bound before a preload gets the chance to replace it: gevent's makes an event loop for itself.
_Socket = socket.socket


class _Found(enum.Enum):
    """What a read has found."""

    #: As much as it could take.
    MORE = enum.auto()
    #: Less than that, so as a rule all that is here. But a read also ends where descriptors come,
    #: or another process's bytes.
    LESS = enum.auto()
    NOTHING = enum.auto()


class Owned(Protocol):
    """Something that belongs to one process, and to no fork of it."""

    def abandon(self) -> None:
        """Close the descriptors, in a process that was just forked, and do nothing else."""


_owned: weakref.WeakSet[Owned] = weakref.WeakSet()


def own(thing: Owned) -> None:
    """Have something abandoned in every fork of this process.

    A copy of a lifeline's writing end would keep the lifeline from ever firing, and one of a
    socket would keep its peer from ever seeing its end. Forks that exec need no help: all
    descriptors are closed there.
    """
    _owned.add(thing)


def _abandon_all() -> None:
    for thing in list(_owned):
        thing.abandon()
    _owned.clear()


os.register_at_fork(after_in_child=_abandon_all)


class Lifeline:
    """The writing end of a pipe to a child: the child's group dies when it is closed.

    Whoever holds it must be the only one, and never writes to it.
    """

    # What `close` finds where pipe(2) has failed.
    reader = _writer = -1

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        own(self)

    def close_reader(self) -> None:
        """Close our copy of the child's end, once it has been sent."""
        if self.reader >= 0:
            # Forgotten first: an exception may come between any two lines, and the number be
            # somebody else's by the time that this is called again.
            reader, self.reader = self.reader, -1
            os.close(reader)

    @property
    def is_cut(self) -> bool:
        """Whether it has been closed."""
        return self._writer < 0

    def close(self) -> None:
        """Cut it."""
        self.close_reader()
        if self._writer >= 0:
            writer, self._writer = self._writer, -1
            os.close(writer)

    abandon = close
    __del__ = close


class Channel:
    """One end of a stream socket, as messages.

    Args:
        connection: The socket; from now on the channel's, and non-blocking.
        limits: What may come in.
        owned: Whether it must be closed in forks of this process.
    """

    def __init__(self, connection: socket.socket, limits: Limits, *, owned: bool = True) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._reader = FrameReader(limits)
        self._pending: list[memoryview] = []
        self._pending_descriptors: Sequence[int] = ()
        self._frames: list[Frame] = []
        self._descriptors: list[int] = []
        #: The peer has closed its end, is gone, or has sent what is not a message: nothing follows.
        self.at_eof = False
        if owned:
            own(self)

    @classmethod
    def adopt(cls, descriptor: int, limits: Limits) -> Channel:
        """A channel over an inherited descriptor, in a forkserver or a child."""
        return cls(_Socket(fileno=descriptor), limits, owned=False)

    def fileno(self) -> int:
        """The socket's descriptor; -1 when closed."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._pending)

    @property
    def reader(self) -> FrameReader:
        """The reader, for what it knows of a frame that has not come whole."""
        return self._reader

    def send(self, message: protocol.Message, descriptors: Sequence[int] = ()) -> None:
        """Queue a message, with descriptors, and send what can be sent now.

        Raises:
            OSError: The peer is gone (``BrokenPipeError``, ``ConnectionResetError``).
        """
        self._pending.extend(_view(piece) for piece in protocol.encode(message))
        if descriptors:
            self._pending_descriptors = descriptors
        self.flush()

    def flush(self) -> None:
        """Send as much as the peer takes now.

        Raises:
            OSError: The peer is gone.
        """
        while self._pending:
            ancillary: list[tuple[int, int, bytes]] = []
            if self._pending_descriptors:
                payload = array.array("i", self._pending_descriptors).tobytes()
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)]
            try:
                sent = self._socket.sendmsg(self._pending[:_MAX_PIECES], ancillary)
            except (BlockingIOError, InterruptedError):
                return
            self._pending_descriptors = ()
            self._drop(sent)

    def _drop(self, sent: int) -> None:
        index = 0
        while index < len(self._pending) and sent >= len(self._pending[index]):
            sent -= len(self._pending[index])
            index += 1
        del self._pending[:index]
        if sent:
            self._pending[0] = self._pending[0][sent:]

    def drop_pending(self) -> None:
        """Forget what has not been sent."""
        self._pending.clear()
        self._pending_descriptors = ()

    def receive(self) -> protocol.Message | None:
        """The next message that is here, whole; None where there is none yet.

        Descriptors that came with it are in `take_descriptors`.

        Raises:
            ProtocolError: What came is not a message. Nothing that follows can be understood, and
                nothing more is read.
        """
        return next(self._messages(to_the_end=True), None)

    def messages(self) -> Iterator[protocol.Message]:
        """All messages that are here, but for what only another look at the socket would show.

        For who waits for the socket, and is told if there is more.

        Raises:
            ProtocolError: As `receive`.
        """
        return self._messages(to_the_end=False)

    def rest(self) -> Iterator[protocol.Message]:
        """All messages that are here; for who knows that nothing can come any more.

        Raises:
            ProtocolError: As `receive`.
        """
        return self._messages(to_the_end=True)

    def _messages(self, *, to_the_end: bool) -> Iterator[protocol.Message]:
        found = _Found.MORE
        try:
            while True:
                while self._frames:
                    yield protocol.decode(self._frames.pop(0))
                is_over = found is _Found.NOTHING or (found is _Found.LESS and not to_the_end)
                if self.at_eof or is_over:
                    return
                found = self._read()
        except ProtocolError:
            self._frames.clear()
            self.at_eof = True
            raise

    def take_descriptors(self) -> list[int]:
        """The descriptors that have come; from now on the caller's."""
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    def _read(self) -> _Found:
        """Read once."""
        space = self._reader.space()
        try:
            count, ancillary, flags, _ = self._socket.recvmsg_into(
                [space], _ROOM_FOR_DESCRIPTORS, _MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return _Found.NOTHING
        except ConnectionError:
            self.at_eof = True
            return _Found.NOTHING
        if ancillary:
            self._descriptors.extend(received_descriptors(ancillary))
        # They may also come a few at a time, with bytes of a frame that never ends or with messages
        # for which nobody takes any: then they would fill the table of this process.
        if flags & _MSG_CTRUNC or len(self._descriptors) > protocol.SPAWN_DESCRIPTORS:
            raise ProtocolError("more descriptors came than a message has")
        if count == 0:
            self.at_eof = True
            return _Found.NOTHING
        self._frames.extend(self._reader.received(count))
        # What is no frame is to be said as soon as those before it are told.
        is_less = count < len(space) and not self._reader.is_broken
        return _Found.LESS if is_less else _Found.MORE

    def shut_down_writing(self) -> None:
        """Let the peer see end-of-file; what it sends still arrives."""
        self.drop_pending()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def detach(self) -> int:
        """Give the descriptor away, so that nothing here closes it."""
        _owned.discard(self)
        self.at_eof = True
        return self._socket.detach()

    def abandon(self) -> None:
        """Close the descriptor; unlike `close`, without a word to an event loop that is a copy."""
        descriptor = self.detach()
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Close the socket and what came with it and was not taken."""
        self.drop_pending()
        self.at_eof = True
        self._socket.close()
        for descriptor in self.take_descriptors():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def received_descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what recvmsg(2) returned."""
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return list(descriptors)


def _view(piece: Bytes) -> memoryview:
    view = memoryview(piece)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
