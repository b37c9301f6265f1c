"""How soon a group goes once its requester was killed: ``make bench-lifeline``.

Each line is the distribution, over some killed requesters, of the time from SIGKILL until the body
and the process that it has started are dead. The forkserver watches too; where it is stopped, it
is the kernel alone that ends them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from harness import bodies
from harness.processes import Mailbox, program, stopped, wait_status
from isolated_tasks.process.launcher import Launcher, Plan

#: In seconds; whoever is there then is an orphan.
TIMEOUT = 10.0


def seconds_until_gone(pids: Sequence[int], began: float) -> float:
    """Wait for all of them.

    Raises:
        TimeoutError: One of them lives on.
    """
    with contextlib.ExitStack() as stack:
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfd)
            left = began + TIMEOUT - time.monotonic()
            if not select.select([pidfd], [], [], max(0.0, left))[0]:
                raise TimeoutError(f"process {pid} outlives its requester")
    return time.monotonic() - began


def measure(launcher: Launcher, folder: Path, how: str, *, without_forkserver: bool) -> float:
    """From the end of a requester until its group is gone, in seconds."""
    (forkserver,) = launcher.pids()
    mailbox = Mailbox(folder)
    with (
        program("harness.requester", launcher.address, mailbox.path, how) as requester,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(mailbox.close)
        pids = mailbox.read()
        if how == "stopped":
            wait_status(pids[0], psutil.STATUS_STOPPED)
        if without_forkserver:
            stack.enter_context(stopped(forkserver))
        began = time.monotonic()
        requester.kill()
        return seconds_until_gone(pids, began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="for each line (default 20)")
    kills = range(parser.parse_args().kills)
    print(f"{os.cpu_count()} cores, {len(kills)} requesters each")
    print(f"{'until the group of a killed requester is dead, in ms':52} {'median':>8} {'worst':>8}")
    launcher = Launcher(Plan(preload=["harness.bodies"]))
    launcher.start()
    try:
        launcher.wait_loaded(60)
        for how in bodies.HANGING:
            for without, name in ((False, "watching"), (True, "stopped")):
                with TemporaryDirectory() as folder:
                    values = [
                        1e3 * measure(launcher, Path(folder), how, without_forkserver=without)
                        for _ in kills
                    ]
                title = f"  a body {how}, the forkserver {name}"
                print(f"{title:52} {statistics.median(values):8.2f} {max(values):8.2f}")
    finally:
        launcher.stop()


if __name__ == "__main__":
    main()
