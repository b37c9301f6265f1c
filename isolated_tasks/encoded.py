"""What a body sends back where its task has a ``result_serializer``: nothing in it is unpickled.

`pack` runs in the child, `unpack` in the slot. The result is encoded by that serializer of
Celery's, and only what it has encoded is decoded. Of exceptions there are names, texts and frames,
but for those by which Celery is told what to do. What the body has changed in its request comes as
JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

import kombu.serialization
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.saferepr import saferepr
from kombu.utils import json

from isolated_tasks.errors import ProtocolError, RemoteError, UnpicklableError
from isolated_tasks.process import pickling
from isolated_tasks.process.outcome import Failure, Outcome
from isolated_tasks.process.plain import KNOWN, Encoded

if TYPE_CHECKING:
    from isolated_tasks.task import IsolatedMixin

__all__ = ["pack", "unpack"]

KNOWN.update(
    {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Ignore, Reject, SoftTimeLimitExceeded)}
)


# ── in the child ────────────────────────────────────────────────────────────────────────────────


def pack(outcome: Outcome, serializer: str, *, task: Any, is_ignored: bool) -> Outcome:
    """Turn a body's outcome into one of plain data."""
    notes = dict(outcome.notes)
    notes["request"] = {
        name: text
        for name, pickled in notes.get("request", {}).items()
        if (text := _as_json(pickling.from_bytes(pickled))) is not None
    }
    if "retry" in notes:
        pickled, is_eager = notes["retry"]
        sig = None if pickled is None else _as_json(pickling.from_bytes(pickled))
        notes["retry"] = [sig, is_eager]
    if outcome.failure is not None:
        return Outcome(failure=outcome.failure, notes=notes)
    try:
        data = _encoded(outcome.value, serializer)
    except Exception as exc:
        if not is_ignored:
            return Outcome(failure=_refusal(outcome.value, serializer, exc, task=task), notes=notes)
        # Nobody stores it; hooks and the log are shown what it looks like.
        data = _encoded(saferepr(outcome.value, task.resultrepr_maxsize), serializer)
    return Outcome(Encoded(data), notes=notes)


def retry_notes(exc: Retry) -> dict[str, Any]:
    """What a `Retry` says, beside its signature."""
    is_time = isinstance(exc.when, datetime.datetime)
    return {
        "message": exc.message,
        "when": exc.when.isoformat() if is_time else exc.when,
        "exc": exc.excs,
    }


def _encoded(value: object, serializer: str) -> bytes:
    _, _, data = kombu.serialization.dumps(value, serializer=serializer)
    return data.encode() if isinstance(data, str) else bytes(data)


def _as_json(value: object) -> str | None:
    # What cannot be told is left as it is on the other side.
    with contextlib.suppress(Exception):
        text: str = json.dumps(value)
        return text
    return None


def _refusal(value: object, serializer: str, exc: Exception, *, task: Any) -> Failure:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return Failure.of(
        UnpicklableError(
            f"task {task.name!r}: result of type {name} cannot be encoded by "
            f"result_serializer={serializer!r}: {exc}",
            {"path": "result", "type_name": name, "reason": f"{type(exc).__name__}: {exc}"},
        )
    )


# ── in the slot ─────────────────────────────────────────────────────────────────────────────────


def unpack(outcome: Outcome, codec: tuple[str, str], *, task: IsolatedMixin) -> Outcome:
    """The outcome as it would be without a ``result_serializer``.

    Args:
        outcome: What has come.
        codec: Content type and encoding of the task's serializer; what the child says does not
            matter.
        task: Whose it is.

    Raises:
        ProtocolError: What came is not what `pack` makes.
    """
    try:
        notes = _unpacked(outcome.notes)
        if isinstance(outcome.value, Encoded):
            content_type, encoding = codec
            value = kombu.serialization.loads(
                outcome.value.data, content_type, encoding, accept=[content_type]
            )
            return Outcome(value, notes=notes)
        failure = outcome.failure
        if failure is not None and "how" in outcome.notes:
            first = dataclasses.replace(failure.parts[0], made=_retry(outcome.notes["how"]))
            failure = Failure((first, *failure.parts[1:]))
        return Outcome(failure=failure, notes=notes)
    except Exception as exc:
        # Whatever a serializer raises for bytes that are not its own.
        raise ProtocolError(
            f"task {task.name!r}: what its child sent is no outcome of result_serializer: {exc}"
        ) from exc


def _unpacked(notes: dict[str, Any]) -> dict[str, Any]:
    unpacked: dict[str, Any] = {}
    if "unknown_task" in notes:
        unpacked["unknown_task"] = str(notes["unknown_task"])
    unpacked["children"] = notes.get("children", [])
    # Pickled here, as what comes from other children is.
    unpacked["request"] = {
        name: pickling.to_bytes(json.loads(text))
        for name, text in notes.get("request", {}).items()
        if name.isidentifier() and not name.startswith("_")
    }
    if "retry" in notes:
        sig, is_eager = notes["retry"]
        pickled = None if sig is None else pickling.to_bytes(json.loads(sig))
        unpacked["retry"] = pickled, bool(is_eager)
    return unpacked


def _retry(how: dict[str, Any]) -> Retry:
    when = how["when"]
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    text = how["exc"]
    cause = None if text is None else RemoteError(str(text), {"type_name": "?", "text": str(text)})
    return Retry(how["message"], cause, when)
