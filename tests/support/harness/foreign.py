"""``python -m harness.foreign HOW``: a main process in which somebody else minds its children.

ignored   SIGCHLD is ignored, so that the kernel reaps all
handled   a handler of SIGCHLD reaps whomever it finds
reaped    a thread does so
asyncio   an event loop has processes of its own
gevent    gevent has, and everything is patched

Prints what it has seen, as JSON.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
import threading
from typing import Any

TIMEOUT = 30


def main(how: str) -> None:
    if how == "gevent":
        import gevent.monkey

        gevent.monkey.patch_all()
    elif how == "ignored":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    elif how == "handled":
        signal.signal(signal.SIGCHLD, lambda *_: _reap_all())
    elif how == "reaped":
        threading.Thread(target=_reap_for_ever, daemon=True).start()
    seen = asyncio.run(_beside_a_loop()) if how == "asyncio" else _use()
    if how == "gevent":
        seen["theirs"] = _gevent_s()
    print(json.dumps(seen), flush=True)


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _reap_for_ever() -> None:
    tick = threading.Event()
    while True:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
        tick.wait(0.01)


async def _beside_a_loop() -> dict[str, Any]:
    before = await asyncio.create_subprocess_exec("sh", "-c", "read x; exit 7", stdin=-1)
    seen = await asyncio.to_thread(_use)
    await before.communicate(b"\n")
    after = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
    seen["theirs"] = [before.returncode, await after.wait()]
    return seen


def _gevent_s() -> list[int]:
    import subprocess

    return [subprocess.run(["sh", "-c", "exit 7"], check=False).returncode]


def _use() -> dict[str, Any]:
    """All that a worker does with forkservers and children."""
    from harness import bodies
    from harness.processes import Slot
    from isolated_tasks.errors import ChildLostError
    from isolated_tasks.process.launcher import Launcher, Plan

    launcher = Launcher(Plan(preload=["harness.bodies"]))
    launcher.start()
    launcher.wait_loaded(TIMEOUT)
    slot = Slot(launcher.address)
    seen: dict[str, Any] = {"forkservers": launcher.pids(), "parents": [slot.run(os.getppid)]}
    try:
        slot.run(bodies.leave, 3)
    except ChildLostError as exc:
        seen["lost"] = exc.exit_code
    os.kill(launcher.pids()[0], signal.SIGKILL)
    while launcher.pids() == seen["forkservers"]:
        assert select.select(launcher.descriptors(), [], [], TIMEOUT)[0]
        launcher.check()
    launcher.wait_loaded(TIMEOUT)
    seen["forkservers"] += launcher.pids()
    seen["parents"].append(slot.run(os.getppid))
    slot.close()
    launcher.stop()
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
