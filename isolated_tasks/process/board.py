"""What each child of a forkserver does just now, for who asks.

Which call a child serves, and the how manieth of its batch that is, only its requester knows, and
the child. To tell the forkserver would cost each call a message, and the forkserver a wake-up. So
there is a board: memory that a forkserver shares with whatever it forks. A child writes into a
place of its own there as a call begins and ends, which takes two or three microseconds; the
forkserver reads it when it is asked, and only then.

It is for showing alone. A body that spoils it spoils what is shown, and nothing else: what is read
here is taken for anything.

A fresh interpreter (``start_method="spawn"``) has no place, and of a child that has outlived its
forkserver nobody can read it. Then what is not known is said to be None.
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import Any

from isolated_tasks.process.protocol import Adopt, Spawn

__all__ = ["Board", "Entry", "Place", "adopt", "begin", "describe_adopted", "end", "name_call"]

#: Children beyond so many have no place.
PLACES = 4096

#: Whether a call runs; its position in the batch, from 1; when it has begun, as time.monotonic()
#: counts, which is the same for all processes; the length of its id, which follows.
_HEAD = struct.Struct("=?IdB")
_SIZE = 160
#: A longer id, in bytes, is not shown: a part of one is nobody's.
MAX_ID_BYTES = _SIZE - _HEAD.size

#: How often to read a place that somebody is writing to.
_READS = 3


class Place:
    """The part of the board that is one child's.

    Args:
        memory: The board.
        at: Where the place begins.
    """

    __slots__ = ("at", "memory")

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self.memory = memory
        self.at = at

    def read(self) -> tuple[bool, int, float, bytes]:
        """Whether a call runs, its position, when it began, its id."""
        data = self._copy()
        for _ in range(_READS):
            before, data = data, self._copy()
            if before == data:
                break
        is_running, position, began, length = _HEAD.unpack_from(data)
        return is_running, position, began, data[_HEAD.size :][:length]

    def _copy(self) -> bytes:
        return self.memory[self.at : self.at + _SIZE]

    def clear(self) -> None:
        """Have it say that there was no call yet."""
        self.memory[self.at : self.at + _HEAD.size] = bytes(_HEAD.size)


# ── in the child ────────────────────────────────────────────────────────────────────────────────

#: That of this process.
_own: Place | None = None


def adopt(place: Place | None) -> None:
    """From now on this process writes there."""
    global _own
    _own = place


def begin(position: int) -> None:
    """A call begins, of which nothing is known yet but its position in the batch."""
    if _own is not None:
        position = min(position, 0xFFFFFFFF)
        _HEAD.pack_into(_own.memory, _own.at, True, position, time.monotonic(), 0)


def name_call(call: str | None) -> None:
    """The id of the call that has begun."""
    if _own is None or call is None:
        return
    data = call.encode(errors="replace")
    if len(data) <= MAX_ID_BYTES:
        text = _own.at + _HEAD.size
        _own.memory[text : text + len(data)] = data
        # Last, so that nobody reads more than there is.
        _own.memory[text - 1] = len(data)


def end() -> None:
    """The call has ended."""
    if _own is not None:
        _own.memory[_own.at] = 0


# ── in the forkserver ───────────────────────────────────────────────────────────────────────────


class Entry:
    """One child, as far as its forkserver knows.

    Args:
        spawn: How it was asked for.
        place: Where it writes; None where it cannot.
    """

    __slots__ = ("batch_size", "call_id", "memory_limit_bytes", "name", "place", "since")

    def __init__(self, spawn: Spawn, place: Place | None) -> None:
        self.name = spawn.name
        self.call_id = spawn.call_id
        self.batch_size = spawn.batch_size
        self.memory_limit_bytes = spawn.memory_limit_bytes
        self.place = place
        self.since = time.monotonic()

    def describe(self, pid: int) -> dict[str, Any]:
        """What there is to say of it, as JSON; see `protocol.Listing`."""
        now = time.monotonic()
        told: dict[str, Any] = {
            "pid": pid,
            "name": self.name,
            "call_id": self.call_id,
            "call": None,
            "seconds": now - self.since,
            "call_seconds": None,
            "memory_limit_bytes": self.memory_limit_bytes,
            "batch_size": self.batch_size,
            "position": None,
            "state": None,
        }
        if self.place is None:
            return told
        is_running, position, began, call = self.place.read()
        told["position"] = position
        told["state"] = self._state(is_running, position)
        if is_running:
            told["call"] = call.decode(errors="replace") or None
            # Compared so that what is no number fails too.
            told["call_seconds"] = now - began if 0 <= now - began <= now - self.since else None
        return told

    def _state(self, is_running: bool, position: int) -> str:
        if is_running:
            return "running"
        if position >= self.batch_size:
            return "exiting"
        if position:
            return "idle"
        return "starting" if self.call_id is not None else "spare"


def describe_adopted(adopt: Adopt) -> dict[str, Any]:
    """The same of a child of a dead forkserver, which has taken with it what it knew."""
    return {
        "pid": adopt.pid,
        "name": None,
        "call_id": None,
        "call": None,
        "seconds": None,
        "call_seconds": None,
        "memory_limit_bytes": adopt.memory_limit_bytes,
        "batch_size": None,
        "position": None,
        "state": None,
    }


class Board:
    """The board of one forkserver.

    Args:
        places: So many children can write there at a time.
    """

    def __init__(self, places: int = PLACES) -> None:
        # Pages that nobody has written to take no memory.
        self._memory = mmap.mmap(-1, places * _SIZE)
        self._places = places
        self._used = 0
        self._free: list[Place] = []

    def enter(self, spawn: Spawn) -> Entry:
        """Have an entry for a child that is about to be started."""
        return Entry(spawn, self._take() if spawn.start_method == "forkserver" else None)

    def _take(self) -> Place | None:
        if self._free:
            # The one that was used last: few pages are in use.
            place = self._free.pop()
            place.clear()
            return place
        if self._used == self._places:
            return None
        place = Place(self._memory, self._used * _SIZE)
        self._used += 1
        return place

    def leave(self, entry: Entry) -> None:
        """The child has been reaped, or was not started."""
        if entry.place is not None:
            self._free.append(entry.place)
            entry.place = None
