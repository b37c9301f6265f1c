"""Frames of every kind, what a simple reader finds in bytes, and inputs with something wrong.

What fuzzing stands on: tests/fuzz.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
import tracemalloc
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process import protocol
from isolated_tasks.process.protocol import (
    HEADER,
    LENGTH,
    MAPPED_FROM,
    SCRATCH_SIZE,
    FrameReader,
    Limits,
    Message,
)

#: One of each kind.
SAMPLES: list[Message] = [
    protocol.Spawn(
        name="tasks.render",
        start_method="forkserver",
        batch_size=1,
        first_call_timeout=60.0,
        batch_idle_timeout=5.0,
        batch_memory_limit_bytes=None,
        memory_limit_bytes=1 << 30,
        soft_memory_limit_bytes=None,
        cpu_time_limit=None,
        nice=None,
        max_open_files=None,
        keep_children=False,
        max_result_bytes=1 << 30,
        plain_outcomes=False,
        exit_timeout=5.0,
        call_id="id",
        failures=0,
        env={"LANG": "C"},
    ),
    protocol.Signal(15),
    protocol.Started(12, "/sys/fs/cgroup/a"),
    protocol.Refused("no", 11, None),
    protocol.Exited(0, None, "", False, None, 1 << 20, 0.5, 0.25),
    protocol.Call(b"pickle", [b"one", b"", b"three"]),
    protocol.Accepted(12),
    protocol.Outcome(b"pickle", [b"buffer"], last=True),
    protocol.Boot(
        sys_path=["/app"],
        argv=["celery"],
        python_path=None,
        directory="/tmp/x",
        preload=["numpy"],
        memory_budget_bytes=None,
        reserved_bytes=0,
        max_starts=None,
        setup="module:f",
        setup_name="app",
        setup_argument=b"x",
    ),
    protocol.Loaded(7, 0.5, 1 << 20, "by looking", [{"name": "numpy", "threads": []}]),
    protocol.Waiting(1, 2),
    protocol.Stop("id", 15, "revoked"),
    protocol.Adopt(12, None, None),
    protocol.Begun(12),
    protocol.Halt(15),
    protocol.Worn("it has grown"),
    protocol.Retire(),
    protocol.Ping(),
    protocol.Pong(),
    protocol.Held(1 << 30),
    protocol.Reserve(0),
    protocol.Retiring(),
    protocol.List(),
    protocol.Listing(2, 1, 0, None, [{"pid": 12}], [{"needed_bytes": 1}]),
]


def as_bytes(message: Message) -> bytes:
    return b"".join(bytes(piece) for piece in protocol.encode(message))


# ── what has to come out ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plain:
    """A frame, for comparisons."""

    kind: int
    flags: int
    body: bytes
    buffers: tuple[bytes, ...]

    @classmethod
    def of(cls, frame: protocol.Frame) -> Plain:
        buffers = tuple(bytes(buffer) for buffer in frame.buffers)
        return cls(frame.kind, frame.flags, bytes(frame.body), buffers)


@dataclass
class Found:
    """What a stream of bytes holds."""

    frames: list[Plain] = field(default_factory=list)
    #: Where each of them ends.
    ends: list[int] = field(default_factory=list)
    #: What follows is not a frame.
    is_broken: bool = False


def find_frames(data: bytes, limits: Limits) -> Found:
    """Read all that is there, in the simplest way."""
    found = Found()
    at = 0
    while len(data) - at >= 16:
        magic, version, kind, flags, count, body = struct.unpack_from(">2sBBHHQ", data, at)
        found.is_broken = (
            (magic, version) != (b"IT", 1)
            or not 1 <= kind <= len(SAMPLES)
            or count > limits.buffers
            or body > limits.body
        )
        start = at + 16 + 8 * count
        if found.is_broken or len(data) < start:
            break
        lengths = struct.unpack_from(f">{count}Q", data, at + 16)
        found.is_broken = any(length > limits.buffer for length in lengths)
        if found.is_broken or len(data) < start + body + sum(lengths):
            break
        pieces = []
        for length in (body, *lengths):
            pieces.append(data[start : start + length])
            start += length
        found.frames.append(Plain(kind, flags, pieces[0], tuple(pieces[1:])))
        found.ends.append(start)
        at = start
    return found


def conforms(value: object, hint: Any) -> bool:
    """Whether a value is of a type, those of its items included."""
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float)
    if isinstance(hint, types.UnionType):
        return any(conforms(value, one) for one in get_args(hint))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        return isinstance(value, hint)
    if not isinstance(value, origin):
        return False
    if isinstance(value, Mapping):
        return all(conforms(item, arguments[1]) for item in value.values())
    assert isinstance(value, Sequence)
    return all(conforms(one, arguments[0]) for one in value)


_HINTS = {type(message): get_type_hints(type(message)) for message in SAMPLES}


def check_types(message: Message) -> None:
    """Make sure that all values in it are of the declared types."""
    for name, hint in _HINTS[type(message)].items():
        value = getattr(message, name)
        assert conforms(value, hint), f"{name} of {type(message).__name__} is {value!r}"


def check_round_trip(message: Message) -> None:
    """Make sure that it comes back the same when it is sent again."""
    data = as_bytes(message)
    (again,) = feed(FrameReader(protocol.CALL_LIMITS), data)
    assert as_bytes(protocol.decode(again)) == data


def feed(reader: FrameReader, data: bytes, step: int = 1 << 30) -> Iterator[protocol.Frame]:
    """What a socket would do that delivers up to `step` bytes at a time."""
    at = 0
    while at < len(data):
        space = reader.space()
        assert len(space) > 0
        count = min(len(space), len(data) - at, step)
        space[:count] = data[at : at + count]
        at += count
        yield from reader.received(count)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


class Allocations:
    """What the reader asks for, in bytes. It gets what it asks for: nothing is replaced."""

    def __init__(self) -> None:
        #: What it has got at once, and what it has asked for at once.
        self.largest = self.largest_asked = 0
        self._was_refused = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        original = protocol._allocate

        def allocate(length: int) -> memoryview:
            self.largest_asked = max(self.largest_asked, length)
            try:
                memory = original(length)
            except OSError:
                self._was_refused = True
                raise
            self.largest = max(self.largest, length)
            return memory

        protocol._allocate = allocate
        try:
            yield
        finally:
            protocol._allocate = original

    def check(self, limits: Limits) -> None:
        """Make sure that nothing has been asked for that the limits do not admit."""
        assert self.largest_asked <= max(limits.body, limits.buffer)

    def take_refusal(self) -> bool:
        """Whether the system has just not had that much; asking takes note of it."""
        was_refused, self._was_refused = self._was_refused, False
        return was_refused


@contextlib.contextmanager
def traced_memory(most: int) -> Iterator[None]:
    """Make sure that Python's own memory never grows by more than this, in bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak} bytes were allocated, at most {most} were to be"


# ── all of it, for one input ────────────────────────────────────────────────────────────────────


class Target:
    """Takes inputs and checks all that comes of them.

    Args:
        limits: Of the reader.
        allocations: Watched.
    """

    #: Memory is traced for one input of so many: it makes them several times slower.
    TRACE_EVERY = 1000
    #: One message of so many is sent again.
    SEND_EVERY = 8

    def __init__(self, limits: Limits, allocations: Allocations) -> None:
        self._limits = limits
        self._allocations = allocations
        self.inputs = self.frames = self.messages = self.errors = 0

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        if self.inputs % self.TRACE_EVERY != 1:
            self._check(data)
            return
        # A piece that is not mapped is allocated before it comes; one byte of JSON may become a
        # list, of 56.
        with traced_memory(2 * SCRATCH_SIZE + MAPPED_FROM + 200 * len(data)):
            self._check(data)

    def _check(self, data: bytes) -> None:
        expected = find_frames(data, self._limits)
        frames = self._read(data, expected)
        assert [Plain.of(frame) for frame in frames] == expected.frames
        self.frames += len(frames)
        for frame in frames:
            try:
                message = protocol.decode(frame)
            except ProtocolError:
                self.errors += 1
            else:
                self.messages += 1
                check_types(message)
                if self.messages % self.SEND_EVERY == 1:
                    check_round_trip(message)

    def _read(self, data: bytes, expected: Found) -> list[protocol.Frame]:
        """All frames, and no other end than is expected."""
        reader = FrameReader(self._limits)
        frames: list[protocol.Frame] = []

        def read() -> None:
            for frame in feed(reader, data, _step(data)):
                frames.append(frame)
            reader.space()

        error = error_of(read)
        self._allocations.check(self._limits)
        was_refused = self._allocations.take_refusal()
        if error is None:
            assert not expected.is_broken
            assert reader.is_partial == (len(data) > max(expected.ends, default=0))
        else:
            self.errors += 1
            assert expected.is_broken or was_refused, error
            # And now it is over.
            assert str(error_of(reader.space)) == str(error)
        return frames


def error_of(function: Callable[[], object]) -> ProtocolError | None:
    """The error that this ends in, of the one kind that it may end in."""
    try:
        function()
    except ProtocolError as exc:
        return exc
    return None


def _step(data: bytes) -> int:
    """Some inputs come byte by byte, some in small pieces, most as fast as the reader takes it."""
    step = {0: 1, 1: 7, 2: 100, 3: 1000}.get(zlib.crc32(data) % 16, len(data))
    # Not for the sake of large ones: each step takes its time.
    return max(step, len(data) // 200)


# ── making inputs ───────────────────────────────────────────────────────────────────────────────

#: What may stand for a value in JSON, and is another one than was meant.
STRANGE_JSON = (
    *b"null true -1 0 1.5 NaN Infinity 1e999 2147483648".split(),
    *b"9223372036854775807 9223372036854775808 -9223372036854775808".split(),
    *rb"""[] {} [[]] ["a",1] {"a":1} {"":null} "" "a" "\u0000" "\ud800" [""".split(),
    *(b"\xff", b"9" * 4300, b"9" * 4301, b"[" * 2000),
)


class Generator:
    """Makes inputs that look like what a peer sends.

    Args:
        seed: The same inputs come for the same seed.
        limits: Of the reader that is to be surprised.
    """

    def __init__(self, seed: int, limits: Limits) -> None:
        self.random = random.Random(seed)
        self._samples = [as_bytes(message) for message in SAMPLES]
        edges = (0, 16, SCRATCH_SIZE, MAPPED_FROM, limits.buffers, limits.body, limits.buffer)
        near = [edge + by for edge in edges for by in (-1, 0, 1)]
        self._numbers = [*range(20), *(n for n in near if n > 0), 1 << 32, 1 << 63, (1 << 64) - 1]

    def input(self) -> bytes:
        """Some frames; most of them with something wrong."""
        data = b"".join(self.random.choices(self._samples, k=self.random.randrange(1, 4)))
        if self.random.randrange(200) == 0:
            data += self._large_call()
        for _ in range(self.random.randrange(4)):
            data = self.changed(data)
        return data

    def changed(self, data: bytes) -> bytes:
        """The same input with one thing changed."""
        if self.random.randrange(3) == 0:
            return self._change_bytes(data)
        # The frames, and what is left after them.
        ends = find_frames(data, protocol.CALL_LIMITS).ends
        parts = [data[begin:end] for begin, end in itertools.pairwise([0, *ends, len(data)])]
        index = self.random.randrange(len(parts))
        way = self.random.randrange(10)
        if way == 0:
            parts.insert(index, self.random.choice(self._samples))
        elif way == 1:
            parts.append(parts.pop(index))
        elif way < 5:
            parts[index] = self._change_header(parts[index])
        else:
            parts[index] = self._change_body(parts[index])
        return b"".join(parts)

    def _large_call(self) -> bytes:
        """One whose pieces get memory of their own."""
        sizes = self.random.choices((0, 100, SCRATCH_SIZE + 1, MAPPED_FROM + 1), k=3)
        return as_bytes(protocol.Call(bytes(sizes[0]), [bytes(size) for size in sizes[1:]]))

    def _change_bytes(self, data: bytes) -> bytes:
        at = self.random.randrange(len(data) + 1)
        new = self.random.randbytes(self.random.randrange(1, 20))
        if at < len(data) and self.random.randrange(2):
            flipped = data[at] ^ (1 << self.random.randrange(8))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        ways = [
            data[:at],
            data[:at] + data[at + len(new) :],
            data[:at] + new + data[at:],
            data[:at] + new + data[at + len(new) :],
        ]
        return self.random.choice(ways)

    def _change_header(self, frame: bytes) -> bytes:
        if len(frame) < HEADER.size:
            return frame
        fields = list(HEADER.unpack_from(frame))
        number = self.random.choice(self._numbers)
        which = self.random.randrange(1, 7)
        if which == 6:
            # The length of a buffer, or what stands in its place.
            at = HEADER.size + 8 * self.random.randrange(3)
            return frame[:at] + LENGTH.pack(number) + frame[at + 8 :]
        fields[which] = number % (0, 1 << 8, 1 << 8, 1 << 16, 1 << 16, 1 << 64)[which]
        return HEADER.pack(*fields) + frame[HEADER.size :]

    def _change_body(self, frame: bytes) -> bytes:
        """Another body, and a header that knows of it."""
        found = find_frames(frame, protocol.CALL_LIMITS).frames
        if not found:
            return frame
        body, buffers = self._change_json(found[0].body), found[0].buffers
        head = HEADER.pack(b"IT", 1, found[0].kind, found[0].flags, len(buffers), len(body))
        lengths = b"".join(LENGTH.pack(len(buffer)) for buffer in buffers)
        return head + lengths + body + b"".join(buffers)

    def _change_json(self, body: bytes) -> bytes:
        """Another value, in most cases under the same name."""
        strange = self.random.choice(STRANGE_JSON)
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return strange
        way = self.random.randrange(10)
        if way == 0 or not values or not isinstance(values, dict):
            return strange
        name = self.random.choice(list(values))
        del values[name]
        if way == 1:
            return json.dumps(values).encode()
        name += "x" if way == 2 else ""
        rest = json.dumps(values).encode()[1:-1]
        return b"{%b: %b%b%b}" % (json.dumps(name).encode(), strange, b", " if rest else b"", rest)
