"""How exactly limits are kept: ``make bench-limits`` prints what docs/how-to say.

No figure here decides a test: the machine may be shared. Each line is the distribution over some
calls in a real child of a real forkserver.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from isolated_tasks.errors import MemoryLimitExceeded
from isolated_tasks.process import pickling
from isolated_tasks.process.launcher import Launcher, Plan
from isolated_tasks.process.options import CallOptions, ProcessOptions
from isolated_tasks.process.supervisor import Supervisor, TimeIsUpError

MIB = 1 << 20


def count_in_c(seconds: float) -> None:
    """Be in one function of C's for much longer than this: no signal handler of Python's runs."""
    sum(range(int(seconds) << 40))


def allocate(bytes_per_second: float, piece: int) -> None:
    """Take memory, and touch it, at this rate; 0 is as fast as the machine does."""
    pieces = []
    began = time.monotonic()
    while True:
        pieces.append(b"x" * piece)
        if bytes_per_second:
            ahead = began + len(pieces) * piece / bytes_per_second - time.monotonic()
            time.sleep(max(0.0, ahead))


def measure_time_limit(address: str, body: Callable[[float], object], limit: float) -> float:
    """From the limit until the child has been reaped, in seconds."""
    supervisor = Supervisor(address, ProcessOptions("bench"))
    call = pickling.dumps((body, (60,), {}))
    began = time.monotonic()
    with contextlib.suppress(TimeIsUpError):
        supervisor.call(call, CallOptions("bench", time_limit=limit))
    supervisor.wait_exited(10)
    supervisor.close()
    return time.monotonic() - began - limit


def measure_memory_limit(address: str, rate: float, limit: int, piece: int) -> int:
    """How far above its limit a child came, in bytes, by its own high-water mark."""
    supervisor = Supervisor(address, ProcessOptions("bench", memory_limit_bytes=limit))
    with contextlib.suppress(MemoryLimitExceeded):
        supervisor.call(pickling.dumps((allocate, (rate, piece), {})))
    supervisor.wait_exited(10)
    assert supervisor.usage is not None
    peak = supervisor.usage.peak_rss_bytes
    supervisor.close()
    return peak - limit


def show(what: str, values: Sequence[float], unit: str) -> None:
    """One line of the table."""
    print(f"{what:58} {statistics.median(values):9.3f} {max(values):9.3f} {unit}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10, help="for each line (default 10)")
    calls = range(parser.parse_args().calls)
    logging.getLogger("isolated_tasks").setLevel(logging.CRITICAL)
    print(f"{os.cpu_count()} cores, {len(calls)} calls each")
    print(f"{'':58} {'median':>9} {'worst':>9}")
    with forkserver() as launcher:
        for name, body in (("in Python", time.sleep), ("in C, with the GIL", count_in_c)):
            values = [measure_time_limit(launcher.address, body, 0.3) for _ in calls]
            show(f"time limit, a body {name}: until it is dead", values, "s")
        show_memory_limits(launcher, calls)
    with forkserver("without_groups") as launcher:
        show_memory_limits(launcher, calls)


@contextlib.contextmanager
def forkserver(*preload: str) -> Iterator[Launcher]:
    """A forkserver with these modules."""
    launcher = Launcher(Plan(preload=preload))
    launcher.start()
    try:
        launcher.wait_loaded(60)
        yield launcher
    finally:
        launcher.stop()


def show_memory_limits(launcher: Launcher, calls: Sequence[int]) -> None:
    """How far above a limit of 1 GiB bodies come."""
    (loaded,) = launcher.loaded()
    print(f"memory limit of 1 GiB, kept {loaded.memory_limits}")
    for title, rate, piece in (
        ("0.25 GB/s, pieces of 1 MiB", 0.25e9, MIB),
        ("1 GB/s, pieces of 1 MiB", 1e9, MIB),
        ("1 GB/s, pieces of 64 MiB", 1e9, 64 * MIB),
        ("as fast as it can, pieces of 64 MiB", 0.0, 64 * MIB),
    ):
        excess = [measure_memory_limit(launcher.address, rate, 1 << 30, piece) for _ in calls]
        show(f"  {title}: above the limit", [one / MIB for one in excess], "MiB")


if __name__ == "__main__":
    main()
