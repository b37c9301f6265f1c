"""Role: the process that is measured. It calls one task again and again, and looks at itself.

``python -m isolated_tasks.testing.measured ANSWER LIFELINE`` is how `isolated_tasks.testing.growth`
starts it, which writes to its stdin what it is to call; the arguments are descriptors.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import traceback
from typing import Any

from isolated_tasks.process import system

__all__ = ["main"]

#: So many looks at the most: each comes with a ``gc.collect()``.
MAX_LOOKS = 60
#: Of a traceback, the last so many characters: a pipe holds 64 KiB.
MAX_TEXT = 16_000


def main(arguments: list[str]) -> int:
    """Measure one task.

    The duties, in order: let the kernel end it with the process of the tests; read what to do; load
    the app as a worker does; make the calls, and look after some of them; write what was seen.
    """
    answer, lifeline = (int(argument) for argument in arguments)
    for descriptor in (answer, lifeline):
        os.set_inheritable(descriptor, False)
    system.arm_lifeline(lifeline, group=os.getpid())
    if system.is_closed_by_peer(lifeline):
        return 1
    said = pickle.load(sys.stdin.buffer)
    sys.path[:] = said["sys_path"]
    sys.argv[:] = said["argv"]
    answered: dict[str, Any]
    try:
        looks = _measure(said)
    except _CallError as exc:
        answered = {**_described(exc.error), "error": str(exc)}
    except BaseException as exc:
        text = "".join(traceback.format_exception(exc))[-MAX_TEXT:]
        answered = {**_described(exc), "error": f"it could not be loaded to be measured:\n{text}"}
    else:
        answered = {"looks": looks}
    os.write(answer, json.dumps(answered).encode())
    return 0


class _CallError(Exception):
    """A call of the task has failed."""

    def __init__(self, text: str, error: BaseException) -> None:
        super().__init__(text)
        self.error = error


def _described(error: BaseException) -> dict[str, str]:
    kind = type(error)
    return {
        "type_name": f"{kind.__module__}.{kind.__qualname__}",
        "text": str(error)[:MAX_TEXT],
    }


def _measure(said: dict[str, Any]) -> list[tuple[int, int, int | None, int | None]]:
    # Not before the path is that of the tests.
    from celery import current_app

    from isolated_tasks import body, byvalue
    from isolated_tasks.process import pickling
    from isolated_tasks.testing import databases

    body.load_app(said["app"])
    databases.adopt()
    app = current_app._get_current_object()
    app.conf.isolated_eager = said["isolates"]
    name = said["task"]
    if name not in app.tasks:
        if said["refusal"]:
            raise LookupError(said["refusal"])
        for definition in said["definitions"]:
            byvalue.define(app, definition)
    task = app.tasks[name]
    if not said["isolates"]:
        task.isolated = False
    args, kwargs = pickling.from_bytes(said["call"])
    calls, warm_up = said["calls"], said["warm_up"]
    every = -(-calls // MAX_LOOKS)
    for number in range(warm_up):
        _call(task, args, kwargs, number + 1, warm_up + calls)
    looks = [_look(0)]
    for number in range(1, calls + 1):
        _call(task, args, kwargs, warm_up + number, warm_up + calls)
        if number % every == 0 or number == calls:
            looks.append(_look(number))
    return looks


def _call(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, of: int) -> None:
    result = task.apply(args, kwargs)
    if result.failed():
        error = result.result
        raise _CallError(
            f"call {number} of {of} raised {type(error).__name__}: {error}\n"
            f"{(result.traceback or '')[-MAX_TEXT:]}",
            error,
        )


def _look(number: int) -> tuple[int, int, int | None, int | None]:
    """The number of calls, RSS, memory in use, idle memory at the least; see `audit`."""
    from isolated_tasks.audit import BLOCK_BYTES, LARGEST_BLOCK_BYTES

    gc.collect()
    rss, blocks = system.rss_bytes(), sys.getallocatedblocks()
    told = system.malloc_bytes_and_holes()
    if told is None:
        return number, rss, None, None
    return (
        number,
        rss,
        told[0] + blocks * BLOCK_BYTES,
        rss - told[0] - blocks * LARGEST_BLOCK_BYTES,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
