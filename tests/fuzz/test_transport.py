"""Channels over real sockets whose peers send and take anything, anyhow, and go at any moment."""

import array
import os
import socket

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harness.frames import SAMPLES, as_bytes, find_frames
from harness.machines import MACHINE, messages
from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import protocol
from isolated_tasks.process.protocol import SPAWN_DESCRIPTORS, Frame, Kind, Limits, Message
from isolated_tasks.process.transport import Channel, received_descriptors

pytestmark = pytest.mark.usefixtures("nothing_leaks")

#: No piece is so large that the system might not have it.
LIMITS = Limits(body=1 << 24, buffers=1024, buffer=1 << 24)

COUNTS = st.integers(1, 100) | st.just(1 << 20)


class Pipes:
    """Descriptors to send: writing ends of pipes whose other ends tell whether any copy is open."""

    def __init__(self) -> None:
        self._readers: list[int] = []

    def new(self, count: int) -> list[int]:
        writers = []
        for _ in range(count):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            self._readers.append(reader)
            writers.append(writer)
        return writers

    def close(self) -> None:
        """Make sure that all writing ends have been closed, wherever they went."""
        for reader in self._readers:
            # Raises if somebody still has one.
            assert os.read(reader, 1) == b""
            os.close(reader)


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def inodes(descriptors: list[int]) -> list[int]:
    return [os.fstat(descriptor).st_ino for descriptor in descriptors]


def readable(data: bytes) -> tuple[list[Message], bool]:
    """The messages that come whole, and whether nonsense follows."""
    found = find_frames(data, LIMITS)
    whole: list[Message] = []
    for one in found.frames:
        try:
            whole.append(
                protocol.decode(Frame(Kind(one.kind), one.flags, one.body, list(one.buffers)))
            )
        except ProtocolError:
            return whole, True
    return whole, found.is_broken


class Receiver(RuleBasedStateMachine):
    """A channel that receives what a peer sends byte by byte, with descriptors anywhere."""

    def __init__(self) -> None:
        super().__init__()
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.channel = Channel(ours, LIMITS)
        self.pipes = Pipes()
        self.to_send = b""
        self.sent = b""
        #: Of descriptors that were sent, and of those that the channel has handed out.
        self.given: list[int] = []
        self.taken: list[int] = []
        #: How many the channel has yet to receive, and how many it has and nobody has taken.
        self.under_way = self.held = 0
        self.too_many_descriptors = False
        self.peer_is_gone = False
        self.messages: list[Message] = []
        self.failed = False

    @initialize(
        first=st.lists(messages(), min_size=1, max_size=4),
        peer_is_sane=st.booleans(),
        end=st.sampled_from(["sends the rest", "closes", "shuts down"]),
    )
    def begin(self, first: list[Message], *, peer_is_sane: bool, end: str) -> None:
        self.to_send = b"".join(as_bytes(message) for message in first)
        #: It never sends nonsense, nor more descriptors than are taken.
        self.peer_is_sane = peer_is_sane
        self.end = end

    @rule(message=messages())
    def has_another_message(self, message: Message) -> None:
        self.to_send += as_bytes(message)

    @precondition(lambda self: self.to_send and not self.peer_is_sane)
    @rule(at=st.integers(0), data=st.binary(min_size=1, max_size=3))
    def is_broken(self, at: int, data: bytes) -> None:
        at %= len(self.to_send)
        self.to_send = self.to_send[:at] + data + self.to_send[at + len(data) :]

    @precondition(lambda self: self.to_send)
    @rule(count=COUNTS)
    def peer_sends(self, count: int) -> None:
        self._send(count)

    @precondition(lambda self: self.to_send)
    @rule(count=COUNTS, descriptors=st.sampled_from([1, 1, SPAWN_DESCRIPTORS, 5]))
    def peer_sends_descriptors(self, count: int, descriptors: int) -> None:
        room = SPAWN_DESCRIPTORS - self.under_way - self.held
        self._send(count, min(descriptors, room) if self.peer_is_sane else descriptors)

    def _send(self, count: int, descriptors: int = 0) -> None:
        new = self.pipes.new(descriptors)
        try:
            count = socket.send_fds(self.peer, [self.to_send[:count]], new)
        except BlockingIOError:
            # The socket is full.
            pass
        else:
            self.sent, self.to_send = self.sent + self.to_send[:count], self.to_send[count:]
            self.given += inodes(new)
            self.under_way += descriptors
        finally:
            close_all(new)

    @rule()
    def receive(self) -> None:
        self.under_way, self.held = 0, self.under_way + self.held
        self.too_many_descriptors |= self.held > SPAWN_DESCRIPTORS
        try:
            for message in self.channel.rest():
                assert not self.failed, f"{message} has come after an error"
                self.messages.append(message)
        except ProtocolError:
            assert not self.failed, "an error has come twice"
            self.failed = True
        whole, is_broken = readable(self.sent)
        if self.too_many_descriptors:
            assert self.failed
            assert self.messages == whole[: len(self.messages)]
        else:
            assert self.messages == whole
            assert self.failed == is_broken
        assert self.channel.at_eof == (self.peer_is_gone or self.failed)

    @rule()
    def take_descriptors(self) -> None:
        taken = self.channel.take_descriptors()
        self.held = 0
        self.taken += inodes(taken)
        assert not any(os.get_inheritable(descriptor) for descriptor in taken)
        close_all(taken)
        if not self.too_many_descriptors:
            assert self.taken == self.given[: len(self.taken)]

    def teardown(self) -> None:
        try:
            if self.end == "closes":
                self.peer.close()
            elif self.end == "shuts down":
                self.peer.shutdown(socket.SHUT_WR)
            else:
                while self.to_send and not self.failed:
                    self._send(len(self.to_send))
                    self.receive()
            self.peer_is_gone = self.end != "sends the rest"
            self.receive()
        finally:
            self.channel.close()
            self.peer.close()
            self.pipes.close()


class Sender(RuleBasedStateMachine):
    """A channel that sends to a peer which takes it in pieces of any size."""

    def __init__(self) -> None:
        super().__init__()
        ours, self.peer = socket.socketpair()
        # As little as there can be, so that it is full now and then.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.peer.setblocking(False)
        self.channel = Channel(ours, LIMITS)
        self.pipes = Pipes()
        self.sent = b""
        self.received = b""
        #: Those that have to stay open until they are sent.
        self.open: list[int] = []
        self.given: list[int] = []
        self.taken: list[int] = []

    @initialize(peer_stays=st.booleans())
    def begin(self, *, peer_stays: bool) -> None:
        self.peer_stays = peer_stays

    @rule(message=messages(), descriptors=st.sampled_from([0, 0, 1, SPAWN_DESCRIPTORS]))
    def send(self, message: Message, descriptors: int) -> None:
        # One message with descriptors at a time, as between requester and forkserver.
        new = self.pipes.new(0 if self.open else descriptors)
        self.open += new
        self.given += inodes(new)
        self.sent += as_bytes(message)
        self.channel.send(message, new)
        self._close_sent()

    @rule()
    def flush(self) -> None:
        self.channel.flush()
        self._close_sent()

    def _close_sent(self) -> None:
        if not self.channel.wants_write:
            close_all(self.open)
            self.open = []

    @rule(count=COUNTS)
    def peer_takes(self, count: int) -> None:
        room = socket.CMSG_SPACE(5 * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self.peer.recvmsg(count, room)
        except BlockingIOError:
            assert self.received == self.sent or self.channel.wants_write
            return
        taken = received_descriptors(ancillary)
        self.taken += inodes(taken)
        close_all(taken)
        assert not flags & socket.MSG_CTRUNC
        self.received += data
        assert self.sent.startswith(self.received)
        assert self.taken == self.given[: len(self.taken)]

    def teardown(self) -> None:
        try:
            while self.peer_stays and self.received != self.sent:
                self.peer_takes(1 << 20)
                self.flush()
            assert not self.peer_stays or self.taken == self.given
            self.peer.close()
            with pytest.raises(ConnectionError):
                self.channel.send(SAMPLES[0])
        finally:
            close_all(self.open)
            self.channel.close()
            self.peer.close()
            self.pipes.close()


TestReceiver = Receiver.TestCase
TestReceiver.settings = settings(MACHINE, max_examples=150)
TestSender = Sender.TestCase
TestSender.settings = settings(MACHINE, max_examples=100)
