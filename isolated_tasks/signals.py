"""Signals of this package, beside Celery's own; receivers are connected in the same way.

::

    from isolated_tasks.signals import isolated_process_init

    @isolated_process_init.connect
    def connect_to_the_database(**kwargs): ...

Take ``**kwargs`` in each receiver: further arguments may come. A receiver that raises is logged
and does no harm to the call, as with Celery's.

=========================== ================== ====================================================
signal                      sent in            when
=========================== ================== ====================================================
`before_isolated_call`      slot               before a call is sent to its child
`isolated_process_init`     child              once for each process, before its first call
`isolated_prerun`           child              before the body of each call
`isolated_postrun`          child              after the body of each call
`isolated_process_shutdown` child              before the process exits, unless it is killed
`isolated_call_finished`    main process       after each call, with what it used
=========================== ================== ====================================================
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = [
    "before_isolated_call",
    "isolated_call_finished",
    "isolated_postrun",
    "isolated_prerun",
    "isolated_process_init",
    "isolated_process_shutdown",
]

#: ``sender`` is the task; ``task_id``; ``carried`` is a dict, and what a receiver puts into it, if
#: it can be pickled, is there again in the two signals around the body.
before_isolated_call = Signal(name="before_isolated_call", providing_args={"task_id", "carried"})
#: ``sender`` is None. Celery's ``worker_process_init`` comes before it.
isolated_process_init = Signal(name="isolated_process_init", providing_args=set())
#: ``sender`` is the task; ``task_id``, ``args``, ``kwargs``, ``carried``.
isolated_prerun = Signal(
    name="isolated_prerun", providing_args={"task_id", "args", "kwargs", "carried"}
)
#: ``sender`` is the task; ``task_id``, ``args``, ``kwargs``, ``carried``.
isolated_postrun = Signal(
    name="isolated_postrun", providing_args={"task_id", "args", "kwargs", "carried"}
)
#: ``sender`` is None. Celery's ``worker_process_shutdown`` comes before it.
isolated_process_shutdown = Signal(name="isolated_process_shutdown", providing_args=set())
#: ``sender`` is the task; ``task_id``; ``usage`` is a `Usage`. Of a call that no message was sent
#: for (an item of ``map``, an errback, ``apply()`` outside a worker) it is sent where it was made.
isolated_call_finished = Signal(name="isolated_call_finished", providing_args={"task_id", "usage"})
