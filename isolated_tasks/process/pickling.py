"""Values become a pickle and its out-of-band buffers; what will not is named, with its path."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle

from isolated_tasks.errors import UnpicklableError
from isolated_tasks.process.protocol import CALL_LIMITS, Bytes

__all__ = [
    "Pickled",
    "StandIn",
    "dumps",
    "error_of",
    "from_bytes",
    "loads",
    "refusal",
    "to_bytes",
]

#: A smaller buffer is copied into the pickle: one more piece to send costs more.
OUT_OF_BAND_FROM = 64 * 1024

#: Of one value: an outcome has one more.
MAX_BUFFERS = CALL_LIMITS.buffers - 1

#: How deep `_guilty` looks into nested values.
MAX_DEPTH = 20

PicklerFactory = Callable[..., pickle.Pickler]


@dataclass(frozen=True)
class Pickled:
    """A value as bytes: the pickle, and the large buffers that it refers to (PEP 574)."""

    #: A list has it in pieces, one after the other.
    body: Bytes | list[Bytes]
    buffers: Sequence[Bytes] = ()

    @property
    def pieces(self) -> list[Bytes]:
        """The body, in one piece or several."""
        return self.body if isinstance(self.body, list) else [self.body]

    @property
    def whole(self) -> Bytes:
        """The body in one piece; what has been received is so already."""
        return b"".join(self.body) if isinstance(self.body, list) else self.body

    @property
    def size(self) -> int:
        """All bytes together."""
        return sum(memoryview(part).nbytes for part in (*self.pieces, *self.buffers))


@dataclass(frozen=True)
class StandIn:
    """Shows what something would show that cannot change process, and is nothing more."""

    text: str

    def __repr__(self) -> str:
        return self.text


def dumps(value: object, *, pickler: PicklerFactory = cloudpickle.Pickler) -> Pickled:
    """Pickle a value.

    Raises:
        Exception: Whatever the value's own ``__reduce__`` raises; pickle itself raises
            ``PicklingError``, ``TypeError``, ``AttributeError`` and ``RecursionError``.
            `refusal` turns it into an error for people.
    """
    buffers: list[Bytes] = []

    def is_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND_FROM or len(buffers) >= MAX_BUFFERS:
            return True
        buffers.append(raw)
        return False

    file = _Pieces()
    pickler(file, protocol=5, buffer_callback=is_in_band).dump(value)
    if sum(len(piece) for piece in file.pieces) < OUT_OF_BAND_FROM:
        return Pickled(b"".join(file.pieces), buffers)
    return Pickled(file.pieces, buffers)


class _Pieces:
    """A file that keeps what is written to it as it is.

    A pickler hands over large ``bytes`` and strings as they are, since Python 3.7 (bpo-31993): so
    they are not copied, and the process needs no more memory for them than it has.
    """

    def __init__(self) -> None:
        self.pieces: list[Bytes] = []

    def write(self, data: bytes | bytearray | pickle.PickleBuffer) -> None:
        """Keep it."""
        self.pieces.append(data.raw() if isinstance(data, pickle.PickleBuffer) else data)


def loads(pickled: Pickled) -> Any:
    """Turn a pickle back into its value; arrays keep the received memory, uncopied."""
    return pickle.loads(pickled.whole, buffers=pickled.buffers)


def to_bytes(value: object, *, pickler: PicklerFactory = cloudpickle.Pickler) -> bytes:
    """Pickle a value into one piece, for a part of something that is pickled as a whole.

    Raises:
        Exception: As `dumps`.
    """
    with io.BytesIO() as file:
        pickler(file, protocol=5).dump(value)
        return file.getvalue()


def from_bytes(pickled: bytes) -> Any:
    """The value again, of which `to_bytes` made this."""
    return pickle.loads(pickled)


def error_of(value: object, *, pickler: PicklerFactory = cloudpickle.Pickler) -> Exception | None:
    """Why a value cannot be pickled; None where it can."""
    try:
        dumps(value, pickler=pickler)
    except Exception as exc:
        return exc
    return None


def refusal(
    parts: Mapping[str, object],
    cause: BaseException,
    *,
    task: str,
    what: str,
    pickler: PicklerFactory = cloudpickle.Pickler,
) -> UnpicklableError:
    """Say which object cannot be pickled, and where it is.

    Args:
        parts: What was to be pickled, by the names that the path begins with.
        cause: What `dumps` raised.
        task: Whose they are.
        what: What the parts are to the user: ``"argument"``, ``"result"``.
        pickler: The pickler that refused.
    """
    # Each part may pickle alone and all of them together not: what is left is to name all.
    path: str = what
    culprit: object = parts
    reason = cause
    for name, value in parts.items():
        error = error_of(value, pickler=pickler)
        if error is not None:
            path, culprit, reason = _guilty(name, value, error, pickler)
            break
    type_name = _type_name(culprit)
    title = path if path.startswith(what) else f"{what} {path}"
    return UnpicklableError(
        f"task {task!r}: {title} of type {type_name} cannot be pickled, and so cannot change "
        f"process: {_describe(reason)}",
        {"path": path, "type_name": type_name, "reason": _describe(reason)},
    )


def _guilty(
    path: str, value: object, error: BaseException, pickler: PicklerFactory
) -> tuple[str, object, BaseException]:
    """Go down to the innermost part that fails by itself."""
    above: set[int] = set()
    for _ in range(MAX_DEPTH):
        above.add(id(value))
        for step, part in _parts(value):
            # What contains itself fails there too, and is not what is looked for.
            part_error = None if id(part) in above else error_of(part, pickler=pickler)
            if part_error is not None:
                path, value, error = path + step, part, part_error
                break
        else:
            break
    return path, value, error


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f" key {_short(key)}", key
            yield f"[{_short(key)}]", part
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield f"[{index}]", part
    elif isinstance(value, set | frozenset):
        for part in value:
            yield "{…}", part
    else:
        yield from _attributes(value)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, type) or callable(value):
        return
    if isinstance(value, BaseException):
        yield ".args", value.args
    for name, part in getattr(value, "__dict__", {}).items():
        yield f".{name}", part


def _short(key: object) -> str:
    # Keys that JSON can have are shown as they are written; others must not run long.
    if isinstance(key, str):
        return '"' + key.replace('"', '\\"') + '"'
    text = repr(key)
    return text if len(text) <= 40 else text[:37] + "..."


def _describe(error: BaseException) -> str:
    # cloudpickle makes a PicklingError of it.
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return "it is nested too deeply"
    return f"{type(error).__name__}: {error}"


def _type_name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
