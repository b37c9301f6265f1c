"""Remote control: what a worker answers to ``celery inspect isolated``.

A command is there once this module is imported: in a worker by its bootstep, in the `celery`
program by its group of commands.
"""

from __future__ import annotations

from typing import Any

import psutil
from celery.worker.control import inspect_command

from isolated_tasks import requester
from isolated_tasks.process.overview import overview

__all__ = ["isolated"]


@inspect_command()
def isolated(state: Any, **_: Any) -> dict[str, Any]:
    """Isolated tasks: forkservers, children, and what waits for memory.

    Returns:
        ``pid``, ``rss_bytes``: of the main process.

        ``forkservers``: of each ``pid``; ``state``: loading, serving, being replaced (``reason``
        says why), retired, which is when it only sees its children to their ends; ``seconds``
        since its start; ``rss_bytes``; ``preloaded``: what it has loaded, ``name``, ``seconds`` and
        ``error`` of each, and ``load_seconds`` of all; ``starts``; ``failures``: starts that the
        system has refused, and children that were killed, stopped or crashed; ``taken_bytes`` and
        ``budget_bytes``: of ``isolated_memory_budget``.

        ``children``: of each ``pid``; ``forkserver``; ``task`` and ``id`` of the call that it
        serves; ``state``: starting, running, idle in a batch, spare, exiting; ``seconds`` since
        its start, ``call_seconds`` since that of its call; ``rss_bytes``, with what it has started;
        ``memory_limit_bytes``; ``position`` of the call in the batch, from 1, and ``batch_size``.

        ``waiting``: what waits for memory: ``task``, ``id``, ``needed_bytes``, ``seconds``,
        ``forkserver``.

        ``problems``: what is missing in this answer, and why, in words.

        Whatever is not known, or not there, is None.
    """
    launcher = requester.launcher_of(state.app)
    told: dict[str, Any] = {"forkservers": [], "children": [], "waiting": [], "problems": []}
    if launcher is not None:
        told = overview(launcher)
    process = psutil.Process()
    return {
        "pid": process.pid,
        "rss_bytes": int(process.memory_info().rss),
        **told,
        "children": [_child(child) for child in told["children"]],
        "waiting": [_waiting(call) for call in told["waiting"]],
    }


def _child(told: dict[str, Any]) -> dict[str, Any]:
    child = {name: value for name, value in told.items() if name not in ("name", "call", "call_id")}
    call = told["call"]
    # Else the child has not come to say so, or cannot; then it is known of a first call.
    if call is None and _serves_its_first(told):
        call = _task_id(told["call_id"])
    return {**child, "task": told["name"], "id": call}


def _serves_its_first(told: dict[str, Any]) -> bool:
    if told["state"] is None:
        return bool(told["batch_size"] == 1)
    return told["state"] == "starting" or (told["state"], told["position"]) == ("running", 1)


def _waiting(told: dict[str, Any]) -> dict[str, Any]:
    call = {name: value for name, value in told.items() if name not in ("name", "call_id")}
    return {**call, "task": told["name"], "id": _task_id(told["call_id"])}


def _task_id(call_id: str | None) -> str | None:
    """The task's: a call's own id has something behind it (`request.RequestMixin`)."""
    return None if call_id is None else call_id.rpartition("/")[0]
