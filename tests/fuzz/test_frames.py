"""The frame reader: any messages, in any pieces, with anything wrong with them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harness.frames import (
    SAMPLES,
    Allocations,
    Plain,
    Target,
    as_bytes,
    check_round_trip,
    check_types,
    error_of,
    feed,
    find_frames,
    traced_memory,
)
from harness.machines import MACHINE, messages, received
from isolated_tasks.errors import ProtocolError
from isolated_tasks.process.protocol import (
    CALL_LIMITS,
    CONTROL_LIMITS,
    HEADER,
    LENGTH,
    MAPPED_FROM,
    SCRATCH_SIZE,
    STATUS_LIMITS,
    Frame,
    FrameReader,
    Limits,
    Message,
    decode,
)

PROGRAM = str(Path(__file__).parent / "frames.py")

LIMITS = st.sampled_from([CONTROL_LIMITS, STATUS_LIMITS, CALL_LIMITS, Limits(100, 2, 50)])
LENGTHS = st.integers(1, 100) | st.just(1 << 20)
NUMBERS = st.integers(0, 20) | st.integers(0, (1 << 64) - 1)


def test_there_is_a_sample_of_each_kind() -> None:
    assert {type(message) for message in SAMPLES} == set(get_args(Message))


def check_frame(frame: Frame) -> None:
    message = decode(frame)
    check_types(message)
    check_round_trip(message)


# ── one reader, from its first byte to its last ─────────────────────────────────────────────────


class Reader(RuleBasedStateMachine):
    """What comes is what was sent, whole and in order, until something is wrong; then nothing."""

    @initialize(limits=LIMITS, first=st.lists(messages(), max_size=4), peer_is_sane=st.booleans())
    def begin(self, limits: Limits, first: list[Message], *, peer_is_sane: bool) -> None:
        self.limits = limits
        self.reader = FrameReader(limits)
        self.allocations = Allocations()
        self.was_refused = False
        #: It sends messages and nothing else.
        self.peer_is_sane = peer_is_sane
        self.messages: list[Message] = []
        self.to_send = self.sent = b""
        self.frames: list[Frame] = []
        self.error: ProtocolError | None = None
        for message in first:
            self.has_another_message(message)

    @rule(message=messages())
    def has_another_message(self, message: Message) -> None:
        self.messages.append(message)
        self.to_send += as_bytes(message)

    @precondition(lambda self: self.to_send and not self.peer_is_sane)
    @rule(at=st.integers(0), data=st.binary(min_size=1, max_size=4))
    def some_bytes_change(self, at: int, data: bytes) -> None:
        at %= len(self.to_send)
        self.to_send = self.to_send[:at] + data + self.to_send[at + len(data) :]

    @precondition(lambda self: self.to_send and not self.peer_is_sane)
    @rule(at=st.integers(0), length=st.integers(1, 50))
    def some_bytes_are_lost(self, at: int, length: int) -> None:
        at %= len(self.to_send)
        self.to_send = self.to_send[:at] + self.to_send[at + length :]

    @precondition(lambda self: self.to_send)
    @rule(length=LENGTHS, step=LENGTHS)
    def some_bytes_arrive(self, length: int, step: int) -> None:
        data, self.to_send = self.to_send[:length], self.to_send[length:]
        self.sent += data
        before = len(self.frames)

        def read() -> None:
            for frame in feed(self.reader, data, step):
                self.frames.append(frame)
            self.reader.space()

        with self.allocations.watch():
            error = error_of(read)
        if self.error is not None:
            assert str(error) == str(self.error)
            assert len(self.frames) == before
        self.error = error
        self.was_refused |= self.allocations.take_refusal()
        self._check(self.frames[before:])

    def _check(self, new: list[Frame]) -> None:
        self.allocations.check(self.limits)
        expected = find_frames(self.sent, self.limits)
        assert [Plain.of(frame) for frame in self.frames] == expected.frames
        if self.error is None:
            assert not expected.is_broken
            assert self.reader.is_partial == (len(self.sent) > max(expected.ends, default=0))
            here, whole = self.reader.progress
            assert here <= whole
        else:
            assert expected.is_broken or self.was_refused
        for frame in new:
            error = error_of(partial(check_frame, frame))
            assert error is None or not self.peer_is_sane

    def teardown(self) -> None:
        if self.to_send:
            self.some_bytes_arrive(len(self.to_send), len(self.to_send))
        if self.peer_is_sane:
            whole = len(self.frames)
            expected = [received(message) for message in self.messages[:whole]]
            assert [decode(frame) for frame in self.frames] == expected
            assert whole == len(self.messages) or self.error is not None


TestReader = Reader.TestCase
TestReader.settings = settings(MACHINE, max_examples=150)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


@settings(MACHINE, max_examples=300)
@given(
    limits=LIMITS,
    kind=st.integers(0, 20),
    buffers=st.integers(0, 4) | st.integers(0, 0xFFFF),
    body=NUMBERS,
    rest=st.lists(NUMBERS, max_size=5),
)
def test_the_head_of_a_frame_makes_nobody_allocate_more_than_it_may_say(
    limits: Limits, kind: int, buffers: int, body: int, rest: list[int]
) -> None:
    data = HEADER.pack(b"IT", 1, kind, 0, buffers, body) + b"".join(map(LENGTH.pack, rest))
    allocations = Allocations()
    reader = FrameReader(limits)

    with allocations.watch(), traced_memory(SCRATCH_SIZE + MAPPED_FROM):
        error_of(lambda: list(feed(reader, data)))

    # The first piece of the frame that is not here yet, or nothing.
    assert allocations.largest_asked in {0, body, *rest}
    allocations.check(limits)
    if find_frames(data, limits).is_broken:
        assert allocations.largest_asked == 0


# ── inputs by the thousand ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_any_bit_of_a_message_may_be_wrong(message: Message) -> None:
    data = as_bytes(message)
    allocations = Allocations()
    target = Target(CALL_LIMITS, allocations)
    with allocations.watch():
        for bit in range(8 * len(data)):
            wrong = bytearray(data)
            wrong[bit // 8] ^= 1 << bit % 8
            target(bytes(wrong) + data)

    assert target.errors
    assert target.messages


@pytest.mark.parametrize("limits", ["control", "status", "call"])
def test_the_program_that_makes_ten_million_inputs_works_for_a_few(
    tmp_path: Path, limits: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    output = subprocess.check_output(
        [sys.executable, PROGRAM, "--random", "--inputs=7000", f"--limits={limits}"],
        cwd=tmp_path,
        env=environment,
        text=True,
    )

    inputs, _, frames, messages, errors = output.splitlines()[-2].split()[:5]
    assert int(inputs) == 7000
    assert int(frames) > int(messages) > 1000
    assert int(errors) > 1000
    assert list(tmp_path.glob("build/fuzz/*")) == []
