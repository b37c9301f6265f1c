"""What this Celery does, where its versions differ: found by looking, not by the version."""

from celery import VERSION, canvas
from celery.worker.consumer.consumer import Consumer

#: Older ones hand the link of a chord to its header, which is a group and refuses it.
LINKS_CHORDS = hasattr(canvas, "_strip_chord_header_links")

#: In Celery 5.5 the members of a group that replaces one of a chord's header come as they end.
#: There is nothing to look at but the version.
KEEPS_ORDER = VERSION >= (5, 6)

#: In older ones, slots that are threads or greenlets of the main process report to it without
#: order: some events are lost, and a task whose chord fails stays among the active ones for ever.
_REPORTS_IN_ORDER = hasattr(Consumer, "call_soon_ack")

_IN_MAIN_PROCESS = frozenset({"threads", "gevent", "eventlet"})


def reports_all(pool: str) -> bool:
    """Whether each event of a worker arrives, and each task that has ended is active no more."""
    return _REPORTS_IN_ORDER or pool not in _IN_MAIN_PROCESS
