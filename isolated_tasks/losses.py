"""How the children of one message were lost so far: what must not go on for ever.

``reject_on_worker_lost`` gives the message back to the broker, and one that kills whatever runs it
comes back for ever. Celery does not count, and the broker delivers the very same bytes again; so
the history is kept where it can be, and the longest one is believed:

* by the worker's main process, in memory, for the messages that it has given back itself;
* in the result backend, where that can count (Redis, Memcached): then all workers share it.

A retry is another message, though of the same task id: its history begins anew.

RabbitMQ's quorum queues put a number of their own into the message, ``x-delivery-count``.
"""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery.backends.base import KeyValueStoreBackend

if TYPE_CHECKING:
    from celery.app.task import Context

    from isolated_tasks.errors import ChildLostError

__all__ = [
    "DELIVERY_COUNT",
    "MAX_KEPT",
    "add",
    "deliveries",
    "describe",
    "history",
    "kept",
    "note_kept",
]

logger = logging.getLogger(__name__)

#: The header in which RabbitMQ's quorum queues count.
DELIVERY_COUNT = "x-delivery-count"

#: The name of the history in the result backend, before the task's id and its retries.
KEY = "isolated-losses-"

#: Messages whose history the main process keeps.
MAX_KEPT = 10_000
_kept: collections.OrderedDict[tuple[str, int], list[str]] = collections.OrderedDict()


def describe(error: ChildLostError) -> str:
    """One loss, in one line."""
    return str(error).partition("\n")[0]


def kept(task_id: str, retries: int) -> list[str]:
    """The history that this process, the main one, keeps."""
    return list(_kept.get((task_id, retries), ()))


def note_kept(task_id: str, retries: int, loss: str) -> None:
    """This process, the main one, gives a message back."""
    key = task_id, retries
    _kept[key] = [*_kept.pop(key, ()), loss]
    if len(_kept) > MAX_KEPT:
        _kept.popitem(last=False)


def history(task: Any, request: Context, kept: Sequence[str]) -> list[str]:
    """How the children of a message were lost so far, from the slot; the first one first.

    Args:
        task: Whose message it is.
        request: Its request.
        kept: What the main process knows.
    """
    found = list(kept)
    if _can_keep(task.backend) and _is_redelivered(request):
        try:
            stored = json.loads(task.backend.get(_key(request)) or "[]")
        except Exception as exc:
            logger.warning("the result backend does not tell the losses: %r", exc)
        else:
            found = max(found, stored, key=len)
    return found


def add(task: Any, request: Context, known: Sequence[str], loss: str) -> None:
    """Have the result backend keep one more; for as long as it keeps results."""
    if not _can_keep(task.backend):
        return
    try:
        task.backend.set(_key(request), json.dumps([*known, loss]))
    except Exception as exc:
        # What the main process keeps bounds it for this worker still.
        logger.warning("the result backend does not keep the losses: %r", exc)


def deliveries(request: Context) -> int:
    """How often a quorum queue of RabbitMQ's has delivered the message before, for any reason."""
    try:
        return int((request.headers or {}).get(DELIVERY_COUNT, 0))
    except (TypeError, ValueError):
        return 0


def _key(request: Context) -> str:
    return f"{KEY}{request.id}-{request.retries or 0}"


def _is_redelivered(request: Context) -> bool:
    return bool((request.delivery_info or {}).get("redelivered"))


def _can_keep(backend: Any) -> bool:
    # Those that keep what they are given until it expires, and no longer: Redis and Memcached,
    # which are the ones with an `incr` of their own. Not `implements_incr`: that says how Celery
    # counts the parts of a chord.
    own = getattr(type(backend), "incr", None)
    return own not in (None, KeyValueStoreBackend.incr)
