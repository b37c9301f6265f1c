"""What this Celery does, where its versions differ: found by looking, not by the version."""

from celery.worker.consumer.consumer import Consumer

#: In older ones, slots that are threads or greenlets of the main process report to it without
#: order: some events are lost, and a task whose chord fails stays among the active ones for ever.
_REPORTS_IN_ORDER = hasattr(Consumer, "call_soon_ack")

_IN_MAIN_PROCESS = frozenset({"threads", "gevent", "eventlet"})


def reports_all(pool: str) -> bool:
    """Whether each event of a worker arrives, and each task that has ended is active no more."""
    return _REPORTS_IN_ORDER or pool not in _IN_MAIN_PROCESS
