"""Every message between the processes, and how it becomes bytes. No I/O happens here.

A message travels as one frame. All numbers are big-endian::

     0        2      3      4        6        8                16
    ┌────────┬──────┬──────┬────────┬────────┬─────────────────┐
    │ "IT"   │ ver. │ kind │ flags  │buffers │ body length     │  header
    └────────┴──────┴──────┴────────┴────────┴─────────────────┘
    ┌─────────────────┬─────────────────┬ …
    │ buffer length   │ buffer length   │     one for each buffer
    └─────────────────┴─────────────────┴ …
    body, then the buffers one after the other

Three kinds of sockets carry them:

*control*, one for each child, between requester and forkserver
    ► `Spawn`, once and first, with four descriptors: the child's end of its call socket, the
    reading end of the lifeline, the crash file, what is the body's stderr. Then any number of
    `Signal`.
    ◄ either `Refused`, or, after a `Waiting` where memory has to become free first, `Started`
    (with a pidfd where the kernel has them) and, when the child has been reaped, `Exited`. In
    between any number of `Stop`, and `Retiring` where the child is to serve no further call. The
    requester's closing its end while the child lives means: kill it. A requester whose forkserver
    has died while its child lives connects to the next one with an `Adopt` (and the child's pidfd)
    instead of a `Spawn`; it is told of stops there, and closes when the child is gone. A forkserver
    that closes its end before `Started` has not begun anything: ask the next one.
*call*, one for each child, between requester and child
    ► `Call`. ◄ `Accepted`, before anything of the call is unpickled; `Begun`, when its body
    begins, and its clock; then `Outcome`. A batch repeats this; an outcome with the flag ``LAST``
    says that the child exits now. ► `Halt` tells a child that the signal which follows comes from
    us.
*status*, one for each forkserver, between main process and forkserver
    ► `Boot`, once and first; then any number of `Stop`, each for the requester of that call,
    whichever it is, of `Reserve`, of `Ping`, and of `List`. ◄ `Loaded`, once; then a `Pong` for
    each `Ping`, a `Listing` for each `List`, and `Worn`, where it wants to be replaced.
    ► `Retire`: it takes no more requests, answers with `Held`, now and whenever that has changed,
    and exits with its last child. End-of-file from either side means: it is gone.

Bodies of *control* and *status* messages are JSON, so that the forkserver never unpickles what a
user sent, and hold whole numbers of 64 bits at most; those of `Call` and `Outcome` are pickles
whose large buffers follow out of band (PEP 574). Lengths are checked against the reader's limits
before anything is allocated.
"""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import struct
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from isolated_tasks.errors import ProtocolError
from isolated_tasks.process.options import MAX_INTEGER

__all__ = [
    "CALL_LIMITS",
    "CONTROL_LIMITS",
    "SPAWN_DESCRIPTORS",
    "STATUS_LIMITS",
    "Accepted",
    "Adopt",
    "Begun",
    "Boot",
    "Call",
    "Exited",
    "Frame",
    "FrameReader",
    "Halt",
    "Held",
    "Kind",
    "Limits",
    "List",
    "Listing",
    "Loaded",
    "Message",
    "Outcome",
    "Ping",
    "Pong",
    "Refused",
    "Reserve",
    "Retire",
    "Retiring",
    "Signal",
    "Spawn",
    "Started",
    "Stop",
    "Waiting",
    "Worn",
    "decode",
    "encode",
    "expect",
]

MAGIC = b"IT"
VERSION = 1
HEADER = struct.Struct("!2sBBHHQ")
LENGTH = struct.Struct("!Q")

#: The flag of an `Outcome` after which the child exits.
LAST = 1

#: Descriptors that come with a `Spawn`.
SPAWN_DESCRIPTORS = 4

#: From this size on a body or a buffer is received into a mapping of its own, which goes back to
#: the system when it is dropped. malloc might keep it: glibc raises its threshold for using mmap
#: whenever such a block is freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
MAPPED_FROM = 256 * 1024

#: From this size on such a mapping asks for huge pages: 128 page faults fewer for each MB, which
#: halve the time that a large array takes (``make bench``, payloads).
HUGE_FROM = 4 << 20

#: What a reader takes in at once, and so the largest read that may hold several frames. The fixed
#: part of a frame with all the buffers that it may have must fit.
SCRATCH_SIZE = 12 * 1024

Bytes = bytes | bytearray | memoryview


class Kind(enum.IntEnum):
    """The number of each message on the wire."""

    SPAWN = 1
    SIGNAL = 2
    STARTED = 3
    REFUSED = 4
    EXITED = 5
    CALL = 6
    ACCEPTED = 7
    OUTCOME = 8
    BOOT = 9
    LOADED = 10
    WAITING = 11
    STOP = 12
    ADOPT = 13
    BEGUN = 14
    HALT = 15
    WORN = 16
    RETIRE = 17
    HELD = 18
    RESERVE = 19
    RETIRING = 20
    PING = 21
    PONG = 22
    LIST = 23
    LISTING = 24


@dataclass(frozen=True)
class Limits:
    """What a reader admits in one frame."""

    body: int
    buffers: int
    buffer: int
    #: Body and buffers together; None for no further bound.
    total: int | None = None


#: An environment may be large, nothing else is.
CONTROL_LIMITS = Limits(body=4 << 20, buffers=0, buffer=0)
#: Tracebacks of preloads, and the description of the app as a buffer.
STATUS_LIMITS = Limits(body=16 << 20, buffers=1, buffer=64 << 20)
#: As much as a machine may hold; a length beyond it is a broken peer. The lengths of all buffers
#: have to fit into the scratch of a reader.
CALL_LIMITS = Limits(body=1 << 40, buffers=1024, buffer=1 << 40)


@dataclass(frozen=True)
class Spawn:
    """Start a child (requester ► forkserver)."""

    name: str
    start_method: str
    batch_size: int
    #: In seconds, to which no call comes: then the child ends.
    first_call_timeout: float
    batch_idle_timeout: float
    batch_memory_limit_bytes: int | None
    memory_limit_bytes: int | None
    soft_memory_limit_bytes: int | None
    cpu_time_limit: int | None
    nice: int | None
    max_open_files: int | None
    keep_children: bool
    #: What is sent as an outcome may have this many bytes.
    max_result_bytes: int
    #: Send outcomes that the requester need not unpickle, see `plain`.
    plain_outcomes: bool
    exit_timeout: float
    #: `Stop` of the first call may have come before this.
    call_id: str | None
    #: How many children before this one have failed in a row to begin a body.
    failures: int
    env: Mapping[str, str]


@dataclass(frozen=True)
class Signal:
    """Send a signal to the child (requester ► forkserver)."""

    signal: int
    #: To its whole group.
    to_group: bool = True


@dataclass(frozen=True)
class Adopt:
    """A child of a dead forkserver lives (requester ► forkserver)."""

    pid: int
    memory_limit_bytes: int | None
    #: As in `Started`.
    group: str | None


@dataclass(frozen=True)
class Stop:
    """Stop this call (main process ► forkserver ► every requester)."""

    call_id: str
    signal: int
    #: For the log: ``"revoked"``.
    reason: str
    #: An outcome that is there already stands.
    keeps_outcome: bool = False


@dataclass(frozen=True)
class Waiting:
    """The child is not started yet (forkserver ► requester)."""

    #: The limits of the children that run, and what all together may have, in bytes.
    taken_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class Started:
    """The child exists (forkserver ► requester)."""

    pid: int
    #: The folder of its control group, which keeps its memory limit; None where it has none.
    group: str | None


@dataclass(frozen=True)
class Refused:
    """The child could not be started (forkserver ► requester)."""

    reason: str
    errno: int | None
    #: What all children together may have, in bytes, where this one can never fit into it.
    budget_bytes: int | None


@dataclass(frozen=True)
class Exited:
    """The child has been reaped (forkserver ► requester)."""

    #: A status of 0 or more, or minus the signal.
    exit_code: int
    #: Whether the kernel's out-of-memory killer has been at work; None where nobody tells.
    oom_killed: bool | None
    #: How that is known, in words; empty if it was not.
    oom_evidence: str
    #: Whether that was for its memory limit, which a control group kept.
    memory_limit_hit: bool
    #: The most that it and its descendants held, in bytes; None where no control group counts.
    peak_bytes: int | None
    peak_rss_bytes: int
    user_seconds: float
    system_seconds: float


@dataclass(frozen=True)
class Retiring:
    """The forkserver is being replaced: the child is to serve no further call (► requester)."""


@dataclass(frozen=True)
class Call:
    """Run this (requester ► child)."""

    #: A list has it in pieces, one after the other; what is received is in one.
    pickled: Bytes | list[Bytes]
    buffers: Sequence[Bytes] = ()


@dataclass(frozen=True)
class Accepted:
    """The call is here, whole, and begins now (child ► requester)."""

    pid: int


@dataclass(frozen=True)
class Begun:
    """The body begins now (child ► requester)."""

    pid: int


@dataclass(frozen=True)
class Halt:
    """The next signal is meant for the body, and not for a whole terminal (requester ► child)."""

    signal: int


@dataclass(frozen=True)
class Outcome:
    """The call has ended (child ► requester)."""

    #: As that of a `Call`.
    pickled: Bytes | list[Bytes]
    buffers: Sequence[Bytes] = ()
    #: The child serves no more calls.
    last: bool = False
    #: What the call used, as `usage.Measured` packs it. It travels as the first buffer.
    measured: bytes = b""


@dataclass(frozen=True)
class Boot:
    """What to load (main process ► forkserver)."""

    sys_path: list[str]
    argv: list[str]
    #: ``PYTHONPATH`` as it was before the launcher changed it to get the forkserver started.
    python_path: str | None
    #: Removed with the socket in it when the main process is gone.
    directory: str
    #: Modules, in this order, after ``setup``.
    preload: list[str]
    #: What the memory limits of all children together may come to, in bytes.
    memory_budget_bytes: int | None
    #: What of it is not to be used yet, see `Reserve`.
    reserved_bytes: int
    #: Say `Worn` after so many children.
    max_starts: int | None
    #: ``"module:function"``, called with ``setup_argument`` before the preload; may be empty.
    setup: str
    #: The title of what ``setup`` loads, for reports.
    setup_name: str
    setup_argument: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Loaded:
    """What was loaded (forkserver ► main process)."""

    pid: int
    seconds: float
    rss_bytes: int
    #: How memory limits are kept, in words.
    memory_limits: str
    #: `preload.Entry` as mappings.
    entries: list[dict[str, Any]]


@dataclass(frozen=True)
class Worn:
    """Replace me (forkserver ► main process)."""

    #: In words.
    reason: str


@dataclass(frozen=True)
class Retire:
    """Start no more children, and exit with the last one (main process ► forkserver)."""


@dataclass(frozen=True)
class Held:
    """What the memory limits of the children come to that are left (forkserver ► main process)."""

    size_bytes: int


@dataclass(frozen=True)
class Reserve:
    """Leave so much of the budget to forkservers that were replaced (main process ► forkserver)."""

    size_bytes: int


@dataclass(frozen=True)
class Ping:
    """Are you there? (main process ► forkserver)."""


@dataclass(frozen=True)
class Pong:
    """I am (forkserver ► main process)."""


@dataclass(frozen=True)
class List:
    """Which children are there? (main process ► forkserver)."""


@dataclass(frozen=True)
class Listing:
    """These (forkserver ► main process)."""

    #: Children that it has started so far.
    starts: int
    #: Of these, those that have not ended in order: killed, crashed, stopped. And those that the
    #: system has refused to start.
    failures: int
    #: The memory limits of the children that live, and what all together may have, in bytes.
    taken_bytes: int
    budget_bytes: int | None
    #: `board.Entry.describe` of each.
    children: list[dict[str, Any]]
    #: Who waits for memory, first come first: ``name``, ``call_id``, ``needed_bytes``, and how long
    #: that has been, in ``seconds``.
    waiting: list[dict[str, Any]]


Message = (
    Spawn
    | Adopt
    | Signal
    | Stop
    | Waiting
    | Started
    | Refused
    | Exited
    | Call
    | Accepted
    | Begun
    | Halt
    | Outcome
    | Boot
    | Loaded
    | Worn
    | Retire
    | Held
    | Reserve
    | Retiring
    | Ping
    | Pong
    | List
    | Listing
)

_KIND_OF: dict[type, Kind] = {
    Spawn: Kind.SPAWN,
    Signal: Kind.SIGNAL,
    Started: Kind.STARTED,
    Refused: Kind.REFUSED,
    Exited: Kind.EXITED,
    Call: Kind.CALL,
    Accepted: Kind.ACCEPTED,
    Outcome: Kind.OUTCOME,
    Boot: Kind.BOOT,
    Loaded: Kind.LOADED,
    Waiting: Kind.WAITING,
    Stop: Kind.STOP,
    Adopt: Kind.ADOPT,
    Begun: Kind.BEGUN,
    Halt: Kind.HALT,
    Worn: Kind.WORN,
    Retire: Kind.RETIRE,
    Held: Kind.HELD,
    Reserve: Kind.RESERVE,
    Retiring: Kind.RETIRING,
    Ping: Kind.PING,
    Pong: Kind.PONG,
    List: Kind.LIST,
    Listing: Kind.LISTING,
}
_CLASS_OF = {kind: cls for cls, kind in _KIND_OF.items()}
# Not Kind(number), which takes its time.
_KINDS = {int(kind): kind for kind in Kind}

M = TypeVar("M")


@dataclass(frozen=True)
class Frame:
    """One frame, whole: a message before its body is understood."""

    kind: Kind
    flags: int
    body: Bytes
    buffers: Sequence[Bytes]


def encode(message: Message) -> list[Bytes]:
    """Turn a message into the pieces of its frame, in order; large ones are not copied."""
    kind = _KIND_OF[type(message)]
    body: Bytes | list[Bytes]
    buffers: Sequence[Bytes] = ()
    flags = 0
    if isinstance(message, (Call, Outcome)):
        body, buffers = message.pickled, message.buffers
        if isinstance(message, Outcome):
            flags = LAST if message.last else 0
            buffers = (message.measured, *buffers)
    elif isinstance(message, (Accepted, Begun)):
        # What json would make of it. Its encoder is more than such a message needs, and whatever a
        # child or its forkserver runs just after a fork is copied for that, page by page.
        body = b'{"pid": %d}' % message.pid
    elif isinstance(message, Started) and message.group is None:
        body = b'{"pid": %d, "group": null}' % message.pid
    elif isinstance(message, Boot):
        values = dict(vars(message))
        buffers = (values.pop("setup_argument"),)
        body = json.dumps(values).encode()
    else:
        body = json.dumps(vars(message)).encode()
    pieces = body if isinstance(body, list) else [body]
    size = sum(_size(piece) for piece in pieces)
    head = HEADER.pack(MAGIC, VERSION, kind, flags, len(buffers), size)
    lengths = b"".join(LENGTH.pack(_size(buffer)) for buffer in buffers)
    return [head + lengths, *pieces, *buffers]


def decode(frame: Frame) -> Message:
    """Turn a frame into its message.

    Raises:
        ProtocolError: The body is not what its kind says.
    """
    if frame.kind is Kind.CALL:
        return Call(frame.body, frame.buffers)
    if frame.kind is Kind.OUTCOME:
        if not frame.buffers:
            raise ProtocolError("an outcome does not say what its call used")
        measured, *buffers = frame.buffers
        last = bool(frame.flags & LAST)
        return Outcome(frame.body, buffers, last=last, measured=bytes(measured))
    try:
        # Not bytes, of which json would look for the encoding first.
        values = json.loads(str(frame.body, "ascii"))
        if frame.kind is Kind.BOOT:
            values["setup_argument"] = bytes(frame.buffers[0])
        message: Message = _CLASS_OF[frame.kind](**values)
        _check_types(message)
    except (ValueError, TypeError, IndexError, RecursionError) as exc:
        raise ProtocolError(f"a {frame.kind.name} message cannot be read: {exc}") from exc
    return message


def _check_types(message: Message) -> None:
    """Make sure that whoever acts on a message can rely on it: a forkserver must not die of one."""
    for name, (admitted, items) in _TYPES_OF[type(message)].items():
        value: Any = getattr(message, name)
        _check_type(name, value, admitted)
        if items is not None:
            for item in value.values() if isinstance(value, Mapping) else value:
                _check_type(f"an item of {name}", item, items)


def _check_type(name: str, value: object, admitted: tuple[type, ...]) -> None:
    if not isinstance(value, admitted):
        raise TypeError(f"{name} is a {type(value).__name__}")
    if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        # A sum of such numbers may be one that json cannot write (sys.set_int_max_str_digits).
        raise ValueError(f"{name} is a number of {value.bit_length()} bits")


def _admitted(hint: Any) -> tuple[type, ...]:
    if hint is float:
        return (int, float)
    parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    types_ = (get_origin(part) or part for part in parts)
    # Of mappings, JSON has one kind.
    return tuple(dict if one is Mapping else one for one in types_)


def _admitted_items(hint: Any) -> tuple[type, ...] | None:
    """What a list or a mapping may hold; the keys of JSON are strings anyway."""
    return _admitted(get_args(hint)[-1]) if get_origin(hint) in (list, Mapping) else None


_TYPES_OF = {
    cls: {
        name: (_admitted(hint), _admitted_items(hint)) for name, hint in get_type_hints(cls).items()
    }
    for cls in _KIND_OF
}


def expect(message: Message, expected: type[M]) -> M:
    """Return the message if it is of the class that has to come now.

    Raises:
        ProtocolError: It is another one.
    """
    if not isinstance(message, expected):
        raise ProtocolError(f"{expected.__name__} was to come, but {type(message).__name__} came")
    return message


class FrameReader:
    """Turns the bytes of one socket into frames.

    The owner asks for `space`, puts bytes into it, and says how many with `received`. Small
    frames are read together, a large body or buffer straight into the memory that it stays in.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scratch = bytearray(SCRATCH_SIZE)
        self._filled = 0
        # Why nothing that follows can be understood, once that is so. Not the exception: it knows
        # this frame and so this reader, and a forkserver does not collect such cycles.
        self._error: str | None = None
        # The frame that is being read: its fixed part, its pieces that are whole, and the one
        # that is not, which has outgrown the scratch.
        self._head: tuple[Kind, int, list[int]] | None = None
        self._pieces: list[Bytes] = []
        self._target: memoryview | None = None
        self._target_filled = 0

    @property
    def is_partial(self) -> bool:
        """Whether a frame has begun that is not whole."""
        return bool(self._filled or self._head)

    @property
    def is_broken(self) -> bool:
        """Whether nothing that follows can be understood."""
        return self._error is not None

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are here, and bytes that the frame has, of body and buffers together."""
        here = sum(_size(piece) for piece in self._pieces) + self._target_filled
        return here, sum(self._head[2]) if self._head else 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty.

        Raises:
            ProtocolError: What came last was not a frame.
        """
        if self._error is not None:
            raise ProtocolError(self._error)
        if self._target is not None:
            return self._target[self._target_filled :]
        return memoryview(self._scratch)[self._filled :]

    def received(self, count: int) -> list[Frame]:
        """Take note of ``count`` new bytes; return the frames that they complete.

        Raises:
            ProtocolError: The bytes are not a frame, or one beyond the limits. Frames that were
                whole before them are returned first; then `space` raises it.
        """
        if self._target is not None:
            self._target_filled += count
            if self._target_filled < len(self._target):
                return []
            self._pieces.append(self._target)
            self._target, self._target_filled = None, 0
        else:
            self._filled += count
        frames: list[Frame] = []
        used = 0
        try:
            while (step := self._step(used)) is not None:
                used, frame = step
                if frame is not None:
                    frames.append(frame)
        except ProtocolError as exc:
            self._error = str(exc)
            if not frames:
                raise
            return frames
        rest = self._filled - used
        self._scratch[:rest] = self._scratch[used : self._filled]
        self._filled = rest
        return frames

    def _step(self, used: int) -> tuple[int, Frame | None] | None:
        """Go one step on in the scratch; None where it holds too little."""
        if self._target is not None:
            return None
        if self._head is None:
            return self._read_head(used)
        kind, flags, lengths = self._head
        if len(self._pieces) == len(lengths):
            frame = Frame(kind, flags, self._pieces[0], self._pieces[1:])
            self._head, self._pieces = None, []
            return used, frame
        return self._read_piece(used, lengths[len(self._pieces)])

    def _read_head(self, used: int) -> tuple[int, None] | None:
        available = self._filled - used
        if available < HEADER.size:
            return None
        magic, version, number, flags, buffers, body = HEADER.unpack_from(self._scratch, used)
        if magic != MAGIC or version != VERSION:
            raise ProtocolError(f"not a frame of version {VERSION}: {magic!r}, {version}")
        kind = _KINDS.get(number)
        if kind is None:
            raise ProtocolError(f"no message has the number {number}")
        limits = self._limits
        if buffers > limits.buffers or body > limits.body:
            raise ProtocolError(
                f"a frame with a body of {body} bytes and {buffers} buffers is beyond the limits"
            )
        end = used + HEADER.size + buffers * LENGTH.size
        if self._filled < end:
            return None
        lengths = [
            LENGTH.unpack_from(self._scratch, offset)[0]
            for offset in range(used + HEADER.size, end, LENGTH.size)
        ]
        if any(length > limits.buffer for length in lengths):
            raise ProtocolError(f"a buffer of {max(lengths)} bytes is beyond the limits")
        total = body + sum(lengths)
        if limits.total is not None and total > limits.total:
            raise ProtocolError(f"a frame of {total} bytes is beyond the limit of {limits.total}")
        self._head = (kind, flags, [body, *lengths])
        return end, None

    def _read_piece(self, used: int, length: int) -> tuple[int, None]:
        available = self._filled - used
        if length <= available:
            self._pieces.append(bytes(memoryview(self._scratch)[used : used + length]))
            return used + length, None
        try:
            self._target = _allocate(length)
        except OSError as exc:
            # The limits of calls admit more than a machine may have left, or than the kernel lets
            # one process ask for (ENOMEM).
            raise ProtocolError(f"there is no room for {length} bytes of a frame: {exc}") from exc
        self._target[:available] = memoryview(self._scratch)[used : self._filled]
        self._target_filled = available
        return self._filled, None


def _allocate(length: int) -> memoryview:
    if length < MAPPED_FROM:
        return memoryview(bytearray(length))
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if length >= HUGE_FROM:
        # EINVAL: a kernel without them. madvise(2)
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


def _size(data: Bytes) -> int:
    return data.nbytes if isinstance(data, memoryview) else len(data)
