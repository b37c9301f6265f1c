"""How the cost of a call grows: with the worker's memory, with slots, with calls done."""

from __future__ import annotations

import contextlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from bench import bodies
from bench.figures import Section, at_most, in_turn
from bench.forkservers import forkserver, rss_mib
from bench.programs import asked
from bench.scale import Scale
from harness.processes import Slot, settle
from isolated_tasks.process.launcher import Launcher


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section("How a call's cost grows")
    with forkserver("bench.bodies") as launcher:
        _with_memory(section, launcher, scale)
        _with_slots(section, launcher, scale)
        _with_calls(section, launcher, scale)
    return section


def _with_memory(section: Section, launcher: Launcher, scale: Scale) -> None:
    with contextlib.ExitStack() as stack:
        contenders = [
            stack.enter_context(asked("requester", launcher.address, str(megabytes)))
            for megabytes in scale.requesters
        ]
        found = in_turn(contenders, scale.rounds)
    for name, values in found.items():
        section.add(name, values)
    small, large = (f"a call of a process with {megabytes} MB" for megabytes in scale.requesters)
    section.ratio(large, small, at_most(1.05))


def _with_slots(section: Section, launcher: Launcher, scale: Scale) -> None:
    for slots in scale.concurrencies:
        slot = Slot(launcher.address, slots=slots)
        count = max(slots, scale.rounds)
        values = []
        with ThreadPoolExecutor(slots) as executor:
            for _ in range(scale.chunks):
                began = time.perf_counter()
                list(executor.map(slot.run, [bodies.nothing] * count))
                values.append(1e3 * (time.perf_counter() - began) / count)
        slot.close()
        section.add(f"time for each call, {slots} at a time", values)


def _with_calls(section: Section, launcher: Launcher, scale: Scale) -> None:
    slot = Slot(launcher.address)
    (pid,) = launcher.pids()
    us, forkserver_process = psutil.Process(), psutil.Process(pid)
    part = min(1000, scale.calls // 10)
    found: list[float] = []

    def state() -> tuple[int, float, float]:
        # The last child may still be exiting.
        slot.close()
        settle(launcher)
        descriptors = us.num_fds() + forkserver_process.num_fds()
        return descriptors, rss_mib(), rss_mib(pid)

    def run(count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            slot.run(bodies.nothing)
            found.append(1e3 * (time.perf_counter() - began))

    run(part)
    descriptors, requester_rss, forkserver_rss = state()
    run(scale.calls - part)
    after = state()
    section.add(f"the first {part} of {scale.calls} calls", found[:part])
    section.add("the last as many", found[-part:])
    last, first = statistics.median(found[-part:]), statistics.median(found[:part])
    section.figure("the last calls / the first", last / first, "×", at_most(1.05))
    section.figure("descriptors more", after[0] - descriptors, "", at_most(0))
    section.figure("RSS of the requester, more", after[1] - requester_rss, "MiB", at_most(2))
    section.figure("RSS of the forkserver, more", after[2] - forkserver_rss, "MiB", at_most(2))
