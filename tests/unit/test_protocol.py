"""Messages, frames, and all that a peer can get wrong; not one byte goes through a socket."""

import dataclasses
import gc
import itertools
import json
import mmap
import re
import tracemalloc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import protocol
from isolated_tasks.process.protocol import (
    CALL_LIMITS,
    CONTROL_LIMITS,
    HEADER,
    LENGTH,
    MAPPED_FROM,
    SCRATCH_SIZE,
    STATUS_LIMITS,
    Accepted,
    Adopt,
    Begun,
    Boot,
    Bytes,
    Call,
    Exited,
    Frame,
    FrameReader,
    Halt,
    Held,
    Kind,
    Limits,
    List,
    Listing,
    Loaded,
    Message,
    Outcome,
    Refused,
    Reserve,
    Retire,
    Retiring,
    Signal,
    Spawn,
    Started,
    Stop,
    Waiting,
    Worn,
    decode,
    encode,
    expect,
)

SPAWN = Spawn(
    name="tasks.render",
    start_method="forkserver",
    batch_size=3,
    first_call_timeout=60.0,
    batch_idle_timeout=2.5,
    batch_memory_limit_bytes=None,
    memory_limit_bytes=1 << 33,
    soft_memory_limit_bytes=None,
    cpu_time_limit=60,
    nice=None,
    max_open_files=None,
    keep_children=False,
    max_result_bytes=1 << 31,
    plain_outcomes=False,
    call_id="id/1",
    failures=0,
    exit_timeout=5.0,
    env={"LANG": "C", "NAME": "ü \udc80"},
)
BOOT = Boot(
    sys_path=["/app", "/lib"],
    argv=["celery", "worker"],
    python_path=None,
    directory="/tmp/x",
    preload=["numpy"],
    memory_budget_bytes=None,
    reserved_bytes=0,
    max_starts=None,
    setup="module:function",
    setup_name="app proj:app",
    setup_argument=bytes(range(256)),
)
LOADED = Loaded(
    pid=7,
    seconds=0.5,
    rss_bytes=1 << 33,
    memory_limits="by looking",
    entries=[{"name": "numpy", "threads": []}],
)

#: At least one of each kind; together they are some hundred bytes long.
MESSAGES: list[Message] = [
    SPAWN,
    Signal(9),
    Started(pid=12, group=None),
    Started(pid=12, group="/sys/fs/cgroup/a"),
    Signal(15, to_group=False),
    Stop("id/1", 15, "revoked"),
    Adopt(pid=12, memory_limit_bytes=None, group=None),
    Worn("it has grown"),
    Retire(),
    Held(1 << 33),
    Reserve(0),
    Retiring(),
    Waiting(taken_bytes=1 << 33, budget_bytes=1 << 34),
    Refused(reason="no", errno=11, budget_bytes=None),
    Refused(reason="no", errno=None, budget_bytes=1 << 34),
    Exited(
        exit_code=0,
        oom_killed=None,
        oom_evidence="",
        memory_limit_hit=False,
        peak_bytes=None,
        peak_rss_bytes=1,
        user_seconds=0,
        system_seconds=0,
    ),
    Exited(
        exit_code=-9,
        oom_killed=True,
        oom_evidence="oom_kill of /a/group rose from 0 to 1",
        memory_limit_hit=True,
        peak_bytes=1 << 40,
        peak_rss_bytes=1 << 40,
        user_seconds=0.25,
        system_seconds=1.5,
    ),
    Call(b"pickle", [b"one", b"", b"three"]),
    Call(b""),
    Call(b"pickle"),
    protocol.Ping(),
    protocol.Pong(),
    List(),
    Listing(2, 1, 1 << 33, 1 << 34, [{"pid": 12, "name": "tasks.render"}], []),
    Accepted(pid=12),
    Begun(pid=12),
    Halt(signal=15),
    Outcome(b"pickle", [b"buffer"]),
    Outcome(b"pickle", last=True),
    BOOT,
    LOADED,
]

#: Admits all of them.
LIMITS = Limits(body=1 << 20, buffers=8, buffer=1 << 20)


def as_bytes(messages: Iterable[Message]) -> bytes:
    return b"".join(bytes(piece) for message in messages for piece in encode(message))


def feed(reader: FrameReader, data: bytes) -> Iterator[Frame]:
    """What a socket would do that delivers `data` as fast as the reader takes it."""
    while data:
        space = reader.space()
        assert len(space) > 0
        count = min(len(space), len(data))
        space[:count] = data[:count]
        data = data[count:]
        yield from reader.received(count)


def read(chunks: Iterable[bytes], limits: Limits = LIMITS) -> list[Message]:
    reader = FrameReader(limits)
    frames = [frame for chunk in chunks for frame in feed(reader, chunk)]
    assert not reader.is_partial
    return [decode(frame) for frame in frames]


def _whole(pickled: Bytes | list[Bytes]) -> bytes:
    return b"".join(pickled) if isinstance(pickled, list) else bytes(pickled)


def plain(messages: Sequence[Message]) -> list[Message]:
    """The same messages, their memoryviews as bytes."""
    return [
        dataclasses.replace(
            message,
            pickled=_whole(message.pickled),
            buffers=[bytes(buffer) for buffer in message.buffers],
        )
        if isinstance(message, Call | Outcome)
        else message
        for message in messages
    ]


def header(
    *,
    magic: bytes = b"IT",
    version: int = 1,
    kind: int = Kind.CALL,
    flags: int = 0,
    buffers: int = 0,
    body: int = 0,
) -> bytes:
    return HEADER.pack(magic, version, kind, flags, buffers, body)


# ── round trips ─────────────────────────────────────────────────────────────────────────────────


def test_the_samples_have_every_message_there_is() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))
    assert len(Kind) == len(get_args(Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert plain(read([as_bytes([message])])) == plain([message])


def test_messages_keep_their_order() -> None:
    assert plain(read([as_bytes(MESSAGES)])) == plain(MESSAGES)


def test_a_message_of_each_kind_has_a_number_of_its_own() -> None:
    kinds = {
        frame.kind
        for message in MESSAGES
        for frame in feed(FrameReader(LIMITS), as_bytes([message]))
    }

    assert kinds == set(Kind)


def test_control_messages_are_json_so_that_nobody_has_to_unpickle_them() -> None:
    (frame,) = feed(FrameReader(LIMITS), as_bytes([SPAWN]))

    assert json.loads(bytes(frame.body))["name"] == "tasks.render"


@pytest.mark.parametrize("kind", [Call, Outcome], ids=lambda kind: kind.__name__)
def test_a_pickle_in_pieces_arrives_in_one(kind: type[Call] | type[Outcome]) -> None:
    large = bytes(MAPPED_FROM)
    message = kind([b"begin", large, b"end"], [b"buffer"])

    assert any(piece is large for piece in encode(message))
    assert plain(read([as_bytes([message])])) == plain([message])


def test_a_large_buffer_is_not_copied_on_its_way_out() -> None:
    buffer = bytearray(1 << 20)

    pieces = encode(Call(b"pickle", [buffer]))

    assert pieces[-1] is buffer


def test_a_typed_buffer_is_counted_in_bytes() -> None:
    numbers: Any = memoryview(bytearray(80)).cast("d")

    (message,) = read([as_bytes([Call(b"", [numbers])])])

    assert isinstance(message, Call)
    assert len(message.buffers[0]) == 80


# ── every way in which bytes may arrive ─────────────────────────────────────────────────────────


def test_a_sequence_split_at_any_point_is_read_alike() -> None:
    data = as_bytes(MESSAGES)
    whole = plain(MESSAGES)

    for at in range(len(data) + 1):
        assert plain(read([data[:at], data[at:]])) == whole


def test_a_sequence_that_comes_byte_by_byte_is_read_alike() -> None:
    data = as_bytes(MESSAGES)

    assert plain(read(data[at : at + 1] for at in range(len(data)))) == plain(MESSAGES)


def test_a_sequence_cut_at_any_point_gives_the_whole_messages_before_it_and_is_partial() -> None:
    ends = []
    end = 0
    for message in MESSAGES:
        end += len(as_bytes([message]))
        ends.append(end)
    data = as_bytes(MESSAGES)

    for cut in range(len(data) + 1):
        reader = FrameReader(LIMITS)
        frames = list(feed(reader, data[:cut]))
        assert len(frames) == sum(end <= cut for end in ends)
        assert reader.is_partial == (cut not in {0, *ends})


SIZES = st.sampled_from(
    [0, 1, 100, SCRATCH_SIZE - 17, SCRATCH_SIZE, MAPPED_FROM - 1, MAPPED_FROM + 5]
)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
def test_any_messages_in_any_chunks_are_read_as_they_were_sent(
    sizes: list[list[int]], cuts: list[float]
) -> None:
    messages = [Call(_bytes(body), [_bytes(size) for size in buffers]) for body, *buffers in sizes]
    data = as_bytes(messages)
    at = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})

    chunks = (data[begin:end] for begin, end in itertools.pairwise(at))

    assert plain(read(chunks)) == messages


def _bytes(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


# ── where large things go ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (100, bytes),
        (SCRATCH_SIZE + 1, bytearray),
        (MAPPED_FROM - 1, bytearray),
        (MAPPED_FROM, mmap.mmap),
    ],
)
@pytest.mark.parametrize("where", ["body", "buffer"])
def test_the_larger_a_piece_the_more_its_memory_is_its_own(
    size: int, kind: type, where: str
) -> None:
    data = bytes(size)
    message = Call(data) if where == "body" else Call(b"pickle", [data])

    (frame,) = feed(FrameReader(LIMITS), as_bytes([message]))

    piece = frame.body if where == "body" else frame.buffers[0]
    assert isinstance(piece.obj if isinstance(piece, memoryview) else piece, kind)


def test_received_buffers_can_be_written_to() -> None:
    (frame,) = feed(FrameReader(LIMITS), as_bytes([Call(b"", [bytes(MAPPED_FROM)])]))

    assert isinstance(frame.buffers[0], memoryview)
    assert not frame.buffers[0].readonly


def test_progress_tells_how_much_of_the_frame_is_here() -> None:
    data = as_bytes([Call(bytes(100_000), [bytes(200_000), bytes(300_000)])])
    reader = FrameReader(LIMITS)
    head = HEADER.size + 2 * 8

    list(feed(reader, data[: head + 100_000 + 50_000]))

    assert reader.progress == (150_000, 600_000)


def test_progress_is_nothing_where_nothing_has_come() -> None:
    assert FrameReader(LIMITS).progress == (0, 0)


# ── broken peers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        b"\xff" * 64,
        header(magic=b"TI"),
        header(version=0),
        header(version=2),
        header(kind=0),
        header(kind=len(Kind) + 1),
        header(kind=255),
    ],
    ids=repr,
)
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(feed(FrameReader(LIMITS), data))


@pytest.mark.parametrize(
    ("limits", "frame"),
    [
        (LIMITS, header(body=LIMITS.body + 1)),
        (LIMITS, header(body=2**64 - 1)),
        (LIMITS, header(buffers=LIMITS.buffers + 1)),
        (LIMITS, header(buffers=2**16 - 1)),
        (LIMITS, header(buffers=1) + (LIMITS.buffer + 1).to_bytes(8, "big")),
        (LIMITS, header(buffers=2) + bytes(8) + b"\xff" * 8),
        (CONTROL_LIMITS, header(kind=Kind.SPAWN, buffers=1)),
        (CONTROL_LIMITS, header(kind=Kind.SPAWN, body=CONTROL_LIMITS.body + 1)),
        (STATUS_LIMITS, header(kind=Kind.BOOT, buffers=2)),
        (CALL_LIMITS, header(body=2**41)),
    ],
)
def test_a_length_beyond_the_limits_is_refused_before_anything_is_allocated(
    limits: Limits, frame: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    monkeypatch.setattr(protocol, "_allocate", allocated.append)
    reader = FrameReader(limits)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="beyond the limits"):
            list(feed(reader, frame))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert allocated == []
    assert peak < 64 * 1024


@pytest.mark.parametrize("frame", [header(body=1 << 62), header(buffers=1) + LENGTH.pack(1 << 62)])
def test_a_piece_that_no_machine_has_room_for_is_an_error_and_the_end(frame: bytes) -> None:
    reader = FrameReader(Limits(body=1 << 62, buffers=1, buffer=1 << 62))
    (signal,) = feed(reader, as_bytes([Signal(9)]) + frame + b"x")

    assert decode(signal) == Signal(9)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="no room for"):
            reader.space()


def test_a_reader_that_has_read_nonsense_is_gone_when_nobody_has_it_any_more() -> None:
    # Without the help of the garbage collector, which a forkserver has switched off.
    reader = FrameReader(LIMITS)
    gc.disable()
    try:
        with pytest.raises(ProtocolError) as caught:
            list(feed(reader, b"nonsense, and a lot of it"))
        with pytest.raises(ProtocolError, match=re.escape(str(caught.value))):
            reader.space()
        gone = weakref.ref(reader)
        del reader, caught

        assert gone() is None
    finally:
        gc.enable()


def test_a_frame_at_the_limits_is_read() -> None:
    limits = Limits(body=10, buffers=2, buffer=20)
    message = Call(bytes(10), [bytes(20), bytes(20)])

    assert plain(read([as_bytes([message])], limits)) == [message]


def test_messages_before_the_nonsense_are_not_lost_when_they_come_apart() -> None:
    reader = FrameReader(LIMITS)

    frames = list(feed(reader, as_bytes([Signal(9)])))
    with pytest.raises(ProtocolError):
        list(feed(reader, b"nonsense, and a lot of it"))

    assert [decode(frame) for frame in frames] == [Signal(9)]


JSON_OF_BOOT = {name: value for name, value in vars(BOOT).items() if name != "setup_argument"}
JSON_KINDS = [kind for kind in Kind if kind not in (Kind.CALL, Kind.OUTCOME)]


@pytest.mark.parametrize("kind", JSON_KINDS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'{"unknown": 1}',
        b"[" * 100_000,
        b'{"pid":' * 100_000,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_not_what_its_kind_says_is_refused(kind: Kind, body: bytes) -> None:
    with pytest.raises(ProtocolError, match=kind.name):
        decode(Frame(kind, 0, body, [b""]))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Kind.SIGNAL, {"signal": "9"}),
        (Kind.SIGNAL, {"signal": None}),
        (Kind.SIGNAL, {"signal": 1.5}),
        (Kind.STARTED, {"pid": "12"}),
        (Kind.ACCEPTED, {"pid": []}),
        (Kind.REFUSED, {"reason": "no", "errno": "EAGAIN"}),
        (Kind.SPAWN, {**vars(SPAWN), "env": ["A"]}),
        (Kind.SPAWN, {**vars(SPAWN), "env": {"A": 1}}),
        (Kind.SPAWN, {**vars(SPAWN), "batch_size": "3"}),
        (Kind.SPAWN, {**vars(SPAWN), "exit_timeout": None}),
        (Kind.SPAWN, {**vars(SPAWN), "name": 7}),
        (Kind.BOOT, {**JSON_OF_BOOT, "sys_path": ["/app", None]}),
        (Kind.BOOT, {**JSON_OF_BOOT, "preload": [["numpy"]]}),
        (Kind.LOADED, {**vars(LOADED), "entries": ["numpy"]}),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Kind, values: dict[str, object]) -> None:
    # Whoever acts on a message may rely on its types: the forkserver must not die of one.
    with pytest.raises(ProtocolError, match=kind.name):
        decode(Frame(kind, 0, json.dumps(values).encode(), [b""]))


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63) + 1])
def test_a_whole_number_has_64_bits_at_most(number: int) -> None:
    assert read([as_bytes([Signal(number)])]) == [Signal(number)]

    for too_large in (10 * number, number * 10**4000):
        with pytest.raises(ProtocolError, match="bits"):
            read([as_bytes([Signal(too_large)])])


def test_a_boot_without_its_buffer_is_refused() -> None:
    with pytest.raises(ProtocolError, match="BOOT"):
        decode(Frame(Kind.BOOT, 0, json.dumps(JSON_OF_BOOT).encode(), []))


def test_a_message_that_cannot_come_now_is_refused_and_both_are_named() -> None:
    with pytest.raises(ProtocolError, match=r"Spawn was to come, but Signal came"):
        expect(Signal(9), Spawn)


def test_the_expected_message_is_handed_on() -> None:
    assert expect(SPAWN, Spawn) is SPAWN
