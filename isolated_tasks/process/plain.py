"""An outcome as plain data, for a requester that unpickles nothing that a body has sent.

A pickle is a program: whoever can have a body send one of its own making can have the requester
run it. Here the outcome is JSON, with at most one buffer of bytes, and what is read is checked. The
value is `Encoded`, by whoever calls the body, or nothing. Exceptions come as their names, texts and
frames, and are a `RemoteError` each; but for those of `KNOWN`, which are built anew from their
arguments if these are plain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from isolated_tasks import errors
from isolated_tasks.errors import ProtocolError, UnpicklableError
from isolated_tasks.process.outcome import MAX_CHAIN, MAX_FRAMES, Failure, Frame, Outcome, Part
from isolated_tasks.process.pickling import Pickled

__all__ = ["KNOWN", "Encoded", "decode", "encode"]

#: Exceptions that are made again as what they were, by their names.
KNOWN: dict[str, Callable[..., BaseException]] = {
    "builtins.MemoryError": MemoryError,
    "builtins.OSError": OSError,
    **{f"{errors.__name__}.{name}": getattr(errors, name) for name in errors.__all__},
}

#: A file of so many lines is none; it would be made up, line by line (linecache).
MAX_LINENO = 1_000_000


@dataclass(frozen=True)
class Encoded:
    """A value that somebody has turned into bytes, and knows how to turn back."""

    data: bytes


def encode(outcome: Outcome, *, task: str) -> Pickled:
    """Turn an outcome into JSON and bytes, in the child."""
    value = outcome.value
    if value is not None and not isinstance(value, Encoded):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        refusal = UnpicklableError(
            f"task {task!r}: its result, of type {name}, was not encoded",
            {"path": "result", "type_name": name, "reason": "it was not encoded"},
        )
        outcome = Outcome(failure=Failure.of(refusal), notes=outcome.notes)
    failure = None if outcome.failure is None else [_described(p) for p in outcome.failure.parts]
    described = {
        "has_value": isinstance(outcome.value, Encoded),
        "failure": failure,
        "notes": {name: one for name, one in outcome.notes.items() if _is_plain(one)},
    }
    data = [outcome.value.data] if isinstance(outcome.value, Encoded) else []
    return Pickled(json.dumps(described).encode(), data)


def _described(part: Part) -> dict[str, Any]:
    return {
        "type_name": part.type_name,
        "text": part.text,
        "args": part.plain_args,
        "frames": [asdict(frame) for frame in part.frames],
        "suppress_context": part.suppress_context,
        "cause": part.cause,
        "context": part.context,
    }


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def decode(pickled: Pickled) -> Outcome:
    """The outcome again, in the requester.

    Raises:
        ProtocolError: That is none.
    """
    try:
        described = json.loads(bytes(pickled.whole))
        failure = described["failure"]
        notes = described["notes"]
        if not isinstance(notes, dict):
            raise TypeError("the notes are no mapping")
        return Outcome(
            value=Encoded(bytes(pickled.buffers[0])) if described["has_value"] else None,
            failure=None if failure is None else _failure(failure[:MAX_CHAIN]),
            notes=notes,
        )
    except (ValueError, TypeError, LookupError, RecursionError) as exc:
        raise ProtocolError(f"an outcome cannot be read: {type(exc).__name__}: {exc}") from exc


def _failure(described: list[Any]) -> Failure:
    parts = tuple(_part(one) for one in described)
    others = [one for part in parts for one in (part.cause, part.context) if one is not None]
    if not parts or max(others, default=0) >= len(parts):
        raise ValueError("there is no such exception")
    return Failure(parts)


def _part(described: Mapping[str, Any]) -> Part:
    args = described["args"]
    known = KNOWN.get(described["type_name"])
    made = None
    if known is not None and isinstance(args, list):
        # Whatever its __init__ says to them.
        try:
            made = known(*args)
        except Exception:
            made = None
    return Part(
        type_name=_text(described["type_name"]),
        text=_text(described["text"]),
        pickled=None,
        taken_apart=None,
        lost={},
        frames=tuple(_frame(frame) for frame in described["frames"][:MAX_FRAMES]),
        suppress_context=bool(described["suppress_context"]),
        cause=_position(described["cause"]),
        context=_position(described["context"]),
        made=made,
    )


def _frame(described: Mapping[str, Any]) -> Frame:
    filename, lineno = _text(described["filename"]), described["lineno"]
    if not isinstance(lineno, int) or not 0 < lineno < MAX_LINENO:
        raise ValueError(f"there is no line {lineno!r}")
    source = described["source"]
    return Frame(
        filename=filename,
        function=_text(described["function"]),
        module=_text(described["module"]),
        lineno=lineno,
        # No need to trust it: it underlines a part of a line.
        position=None,
        # Not of a real file, whose lines everybody in this process would then see.
        source=_text(source) if source is not None and filename.startswith("<") else None,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def _position(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < MAX_CHAIN:
        raise ValueError(f"there is no exception {value!r}")
    return value
