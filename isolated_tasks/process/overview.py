"""What runs in the forkservers of a main process, for who asks.

The forkservers are asked, and answer as a rule within a millisecond. It is an event loop that waits
for that, so it does not wait for long: what has not come by then is missing, and that is said.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from typing import Any

import psutil

from isolated_tasks.process import memory
from isolated_tasks.process.generation import Generation, wait
from isolated_tasks.process.launcher import Launcher

__all__ = ["overview"]

#: What forkservers get to answer, all together, in seconds.
ANSWER_SECONDS = 0.2

#: Another thread may read the answer that this one waits for: it looks this often, in seconds.
_LOOK_SECONDS = 0.01


def overview(launcher: Launcher, *, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Ask the forkservers what there is, and look how much memory that holds.

    Args:
        launcher: Whose forkservers.
        timeout: For all answers together, in seconds. One that did not answer the last time is not
            waited for again.

    Returns:
        Plain data: ``forkservers``, ``children`` and ``waiting``, a mapping for each, and
        ``problems``, a line for each forkserver that has not answered. What is not known is None.
    """
    told: dict[str, list[Any]] = {"forkservers": [], "children": [], "waiting": [], "problems": []}
    asked = launcher.ask()
    _hear([generation for generation, answers in asked if answers], launcher, timeout)
    for generation, _ in asked:
        problem = _problem(generation)
        if problem is not None:
            told["problems"].append(problem)
        told["forkservers"].append(_forkserver(generation, launcher, is_known=problem is None))
        if problem is not None or generation.listing is None:
            continue
        for child in generation.listing.children:
            rss = memory.tree_rss_bytes(child["pid"])
            # One that has ended since holds nothing.
            told["children"].append({**child, "forkserver": generation.pid, "rss_bytes": rss})
        for call in generation.listing.waiting:
            told["waiting"].append({**call, "forkserver": generation.pid})
    return told


def _hear(generations: list[Generation], launcher: Launcher, timeout: float) -> None:
    """Wait until they have answered, or the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        launcher.hear()
        descriptors = [
            one.descriptor
            for one in generations
            if one.asked_at is not None and one.descriptor is not None
        ]
        left = deadline - time.monotonic()
        if not descriptors or left <= 0:
            return
        wait(descriptors, selectors.EVENT_READ, min(left, _LOOK_SECONDS))


def _problem(generation: Generation) -> str | None:
    """Why nothing is known of its children; None where it is."""
    who = f"forkserver pid={generation.pid}"
    if generation.descriptor is None:
        return f"{who} has ended, and is about to be replaced: its children are not listed"
    if generation.loaded is None:
        # It has none.
        return None
    if generation.asked_at is not None:
        seconds = time.monotonic() - generation.asked_at
        return f"{who} has not answered for {seconds:.1f} s: its children are not listed"
    return None


def _forkserver(generation: Generation, launcher: Launcher, *, is_known: bool) -> dict[str, Any]:
    loaded = generation.loaded
    listing = generation.listing if is_known else None
    rss = None
    with contextlib.suppress(psutil.Error):
        rss = int(psutil.Process(generation.pid).memory_info().rss)
    return {
        "pid": generation.pid,
        "state": _state(generation, launcher),
        "reason": generation.worn,
        "seconds": time.monotonic() - generation.started_at,
        "rss_bytes": rss,
        "load_seconds": None if loaded is None else loaded.seconds,
        "preloaded": [_preloaded(entry) for entry in (loaded.entries if loaded else ())],
        "starts": None if listing is None else listing.starts,
        "failures": None if listing is None else listing.failures,
        "taken_bytes": None if listing is None else listing.taken_bytes,
        "budget_bytes": launcher.plan.memory_budget_bytes,
    }


def _state(generation: Generation, launcher: Launcher) -> str:
    if launcher.is_retired(generation):
        return "retired"
    if generation.loaded is None:
        return "loading"
    return "serving" if generation.worn is None else "being replaced"


def _preloaded(entry: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of a thing that was loaded; of an error, its last line."""
    error = entry["error"]
    lines = error.strip().splitlines() if error else []
    return {
        "name": entry["name"],
        "seconds": entry["seconds"],
        "error": lines[-1] if lines else None,
    }
