"""The bootstep's timers."""

import threading
from types import SimpleNamespace
from typing import Any

from kombu.asynchronous.timer import Timer

from isolated_tasks.worker import BACKLOG_SECONDS, IsolationStep


def new_step() -> tuple[IsolationStep, Any]:
    parent = SimpleNamespace(app=SimpleNamespace(tasks={}), timer=Timer(), steps=[], hub=None)
    return IsolationStep(parent), parent


def test_a_forkserver_that_takes_no_more_is_asked_again_once_for_all_stops() -> None:
    step, parent = new_step()

    for _ in range(100):
        step._ask_again(parent)

    assert len(parent.timer.queue) == 1
    (entry,) = parent.timer.queue
    threading.Event().wait(BACKLOG_SECONDS)
    entry.entry()
    # And again, if it still does not.
    step._ask_again(parent)
    assert len(parent.timer.queue) == 2


def test_a_clock_is_wound_up_anew_where_celery_has_dropped_it() -> None:
    step, parent = new_step()
    step._wind_up(parent, 5)
    (first,) = parent.timer.queue

    parent.timer.clear()
    step._wind_up(parent, 5)

    (second,) = parent.timer.queue
    assert second.entry is not first.entry
    assert first.entry.canceled
