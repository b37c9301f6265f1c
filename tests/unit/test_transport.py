"""Channels over real sockets, both ends in this process; and lifelines."""

import array
import os
import socket
from collections.abc import Iterator

import pytest

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import system
from isolated_tasks.process.protocol import (
    CALL_LIMITS,
    HEADER,
    SPAWN_DESCRIPTORS,
    Call,
    Kind,
    Message,
    Signal,
    encode,
)
from isolated_tasks.process.transport import Channel, Lifeline

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, two = (Channel(end, CALL_LIMITS) for end in socket.socketpair())
    yield one, two
    one.close()
    two.close()


def received(channel: Channel) -> list[Message]:
    return list(channel.messages())


def pump(sender: Channel, receiver: Channel) -> Message:
    """Move one message, as two processes would in turn."""
    while (message := receiver.receive()) is None:
        sender.flush()
    return message


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# ── messages ────────────────────────────────────────────────────────────────────────────────────


def test_where_nothing_has_come_there_is_no_message(pair: Pair) -> None:
    assert pair[0].receive() is None
    assert not pair[0].at_eof


def test_messages_arrive_in_order(pair: Pair) -> None:
    for number in range(100):
        pair[0].send(Signal(number))

    assert received(pair[1]) == [Signal(number) for number in range(100)]


def test_a_message_larger_than_the_socket_takes_goes_out_bit_by_bit(pair: Pair) -> None:
    body, buffers = os.urandom(3 << 20), [os.urandom(5 << 20), b"", os.urandom(1)]

    pair[0].send(Call(body, buffers))

    assert pair[0].wants_write
    message = pump(*pair)
    assert not pair[0].wants_write
    assert isinstance(message, Call)
    assert message.pickled == body
    assert list(message.buffers) == buffers


def test_more_pieces_than_one_system_call_takes_arrive(pair: Pair) -> None:
    buffers = [bytes([number % 256]) for number in range(CALL_LIMITS.buffers)]

    pair[0].send(Call(b"", buffers))

    message = pump(*pair)
    assert isinstance(message, Call)
    assert list(message.buffers) == buffers


def test_a_typed_buffer_arrives_as_its_bytes(pair: Pair) -> None:
    numbers = array.array("d", [1.5, 2.5])

    pair[0].send(Call(b"", [memoryview(numbers)]))

    message = pump(*pair)
    assert isinstance(message, Call)
    assert bytes(message.buffers[0]) == numbers.tobytes()


def test_what_was_not_sent_can_be_forgotten(pair: Pair) -> None:
    pair[0].send(Call(bytes(8 << 20)))

    pair[0].drop_pending()

    assert not pair[0].wants_write


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


def test_messages_from_before_the_end_are_read_and_then_it_is_the_end(pair: Pair) -> None:
    pair[0].send(Signal(1))
    pair[0].close()

    assert list(pair[1].rest()) == [Signal(1)]
    assert pair[1].at_eof
    assert pair[1].receive() is None


def test_who_is_told_of_more_is_not_kept_with_another_look(pair: Pair) -> None:
    pair[0].send(Signal(1))
    pair[0].close()

    assert received(pair[1]) == [Signal(1)]
    assert not pair[1].at_eof
    assert received(pair[1]) == []
    assert pair[1].at_eof


def test_what_comes_behind_descriptors_is_here_too(pair: Pair) -> None:
    """One read ends where descriptors come, also if there is more."""
    pair[0].send(Signal(1), (0,))
    pair[0].send(Signal(2))

    assert list(pair[1].rest()) == [Signal(1), Signal(2)]


def test_a_peer_that_stops_writing_still_reads(pair: Pair) -> None:
    pair[0].shut_down_writing()
    pair[1].send(Signal(1))

    assert received(pair[1]) == []
    assert pair[1].at_eof
    assert received(pair[0]) == [Signal(1)]


def test_a_peer_that_went_without_reading_is_an_end_and_no_error(pair: Pair) -> None:
    pair[1].send(Signal(1))
    pair[0].send(Signal(2))
    pair[0].close()

    # ECONNRESET: it had not read everything.
    assert list(pair[1].rest()) == [Signal(2)]
    assert pair[1].at_eof


def test_sending_to_a_peer_that_is_gone_raises(pair: Pair) -> None:
    pair[1].close()

    with pytest.raises(BrokenPipeError):
        pair[0].send(Signal(1))


def test_nonsense_is_refused(pair: Pair) -> None:
    os.write(pair[0].fileno(), b"GET / HTTP/1.1\r\n\r\n")

    with pytest.raises(ProtocolError):
        pair[1].receive()


@pytest.mark.parametrize("then", [Signal(2), b"GET / HTTP/1.1\r\n\r\n"])
def test_after_what_is_not_a_message_nothing_comes(pair: Pair, then: Message | bytes) -> None:
    not_a_signal = HEADER.pack(b"IT", 1, Kind.SIGNAL, 0, 0, 2) + b"[]"
    last = then if isinstance(then, bytes) else b"".join(map(bytes, encode(then)))
    first = b"".join(map(bytes, encode(Signal(1))))
    os.write(pair[0].fileno(), first + not_a_signal + last)

    assert pair[1].receive() == Signal(1)
    with pytest.raises(ProtocolError, match="SIGNAL"):
        pair[1].receive()

    assert pair[1].receive() is None
    assert pair[1].at_eof


def test_closing_twice_is_fine(pair: Pair) -> None:
    pair[0].close()
    pair[0].close()

    assert pair[0].fileno() == -1


def test_a_channel_that_was_detached_leaves_its_descriptor_open(pair: Pair) -> None:
    descriptor = pair[0].detach()
    try:
        pair[0].close()
        assert is_open(descriptor)
    finally:
        os.close(descriptor)


# ── descriptors ─────────────────────────────────────────────────────────────────────────────────


def test_descriptors_come_with_their_message_and_are_the_taker_s(pair: Pair) -> None:
    reader, writer = os.pipe()
    pair[0].send(Signal(1), (reader, writer))
    os.close(writer)

    assert received(pair[1]) == [Signal(1)]
    mine = pair[1].take_descriptors()

    os.write(mine[1], b"x")
    assert os.read(reader, 1) == b"x"
    assert pair[1].take_descriptors() == []
    assert not any(os.get_inheritable(descriptor) for descriptor in mine)
    for descriptor in (reader, *mine):
        os.close(descriptor)


def test_descriptors_are_sent_once_though_the_message_takes_several_writes(pair: Pair) -> None:
    reader, writer = os.pipe()
    pair[0].send(Call(bytes(8 << 20)), (reader,))
    os.close(reader)
    os.close(writer)

    pump(*pair)

    (mine,) = pair[1].take_descriptors()
    os.close(mine)


def test_descriptors_that_nobody_took_are_closed_with_the_channel(pair: Pair) -> None:
    reader, writer = os.pipe()
    pair[0].send(Signal(1), (writer,))
    os.close(writer)
    received(pair[1])

    pair[1].close()

    assert os.read(reader, 1) == b""
    os.close(reader)


def test_more_descriptors_than_any_message_has_are_refused_and_none_is_kept(pair: Pair) -> None:
    reader, writer = os.pipe()
    pair[0].send(Signal(1), (writer,) * 10)
    os.close(writer)

    with pytest.raises(ProtocolError, match="more descriptors"):
        pair[1].receive()

    pair[1].close()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_descriptors_that_come_few_at_a_time_and_are_not_taken_are_refused_too(pair: Pair) -> None:
    reader, writer = os.pipe()
    for number in range(SPAWN_DESCRIPTORS + 1):
        pair[0].send(Signal(number), (writer,))
    os.close(writer)

    for number in range(SPAWN_DESCRIPTORS):
        assert pair[1].receive() == Signal(number)
    with pytest.raises(ProtocolError, match="more descriptors"):
        pair[1].receive()

    pair[1].close()
    assert os.read(reader, 1) == b""
    os.close(reader)


# ── lifelines ───────────────────────────────────────────────────────────────────────────────────


def test_a_lifeline_is_closed_at_the_other_end_when_it_is_cut() -> None:
    lifeline = Lifeline()
    reader = os.dup(lifeline.reader)
    lifeline.close_reader()
    assert not lifeline.is_cut
    assert not system.is_closed_by_peer(reader)

    lifeline.close()

    assert lifeline.is_cut
    assert system.is_closed_by_peer(reader)
    os.close(reader)


def test_cutting_a_lifeline_twice_closes_nobody_else_s_descriptor() -> None:
    lifeline = Lifeline()
    lifeline.close()
    reader, writer = os.pipe()

    lifeline.close()

    assert is_open(reader)
    assert is_open(writer)
    os.close(reader)
    os.close(writer)


def test_a_lifeline_is_not_inherited_by_programs() -> None:
    lifeline = Lifeline()

    assert not os.get_inheritable(lifeline.reader)
    assert not os.get_inheritable(lifeline._writer)
    lifeline.close()
