"""A call alone, without Celery: against a bare fork, and against what others have for it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import billiard.context
import loky
import pebble
import psutil

from bench import bodies
from bench.figures import Contender, Section, at_most, in_turn, timed
from bench.forkservers import forkserver
from bench.programs import asked
from bench.scale import Scale
from harness.processes import Slot, wait_status
from isolated_tasks.process.usage import Measured, Meter

#: What forkservers have loaded, those of the peers too: what most workers have.
PRELOAD = ("celery", "numpy")

UNTIL_RESULT = "call, until the result is there"
UNTIL_REAPED = "call, until reaped"
IN_A_BATCH = "call, in a process of a batch"
MEASURING = "what it takes to measure what a call used"
OURS = (
    UNTIL_RESULT,
    UNTIL_REAPED,
    f"{UNTIL_RESULT}, without a spare",
    f"{UNTIL_REAPED}, without a spare",
    IN_A_BATCH,
)


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section("A call alone")
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(forkserver(*PRELOAD, "bench.bodies"))
        batch = Slot(launcher.address, batch_size=1_000_000, batch_idle_timeout=1000)
        stack.callback(batch.close)
        contenders = [
            stack.enter_context(asked("bare_fork", *PRELOAD)),
            *(one_call(stack, launcher.address, spares=spares) for spares in (1, 0)),
            timed(IN_A_BATCH, lambda: batch.run(bodies.nothing)),
            timed(MEASURING, measuring()),
            *(stack.enter_context(peer()) for peer in QUICK_PEERS),
        ]
        found = in_turn(contenders, scale.rounds)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(peer()) for peer in SLOW_PEERS]
        found |= in_turn(slow, scale.slow_rounds)
    for name, values in found.items():
        section.add(name, values)
    bare = "bare fork, exit and wait"
    bounds = {UNTIL_RESULT: at_most(0.8), UNTIL_REAPED: at_most(1.3)}
    for name in OURS:
        section.ratio(name, bare, bounds.get(name))
    section.ratio(MEASURING, f"{UNTIL_RESULT}, without a spare", at_most(0.05))
    section.ratio(MEASURING, IN_A_BATCH)
    section.ratio(UNTIL_RESULT, "billiard's forkserver", at_most(0.25))
    for name in found:
        if name not in (*OURS, MEASURING, bare, "billiard's forkserver"):
            section.ratio(UNTIL_RESULT, name)
    return section


def one_call(stack: contextlib.ExitStack, address: str, *, spares: int) -> Contender:
    """Ours; with a spare, as by default, one that is there: the call before was a moment ago."""
    slot = Slot(address, spares=spares)
    stack.callback(slot.close)
    suffix = "" if spares else ", without a spare"

    def call() -> Mapping[str, float]:
        while spares and not slot.children._spares:
            slot.run(bodies.nothing)
        reap(slot)
        for spare in slot.children._spares:
            # Born, as far as can be seen from here: it waits for its call.
            while spare.pid is None:
                assert spare.is_usable
            wait_status(spare.pid, psutil.STATUS_SLEEPING)
        began = time.perf_counter()
        slot.run(bodies.nothing)
        there = time.perf_counter()
        # Not what a worker does: its next call waits for the child, if it is so quick.
        reap(slot)
        ended = time.perf_counter()
        return {UNTIL_RESULT + suffix: there - began, UNTIL_REAPED + suffix: ended - began}

    return call


def measuring() -> Callable[[], object]:
    """What a child does for the usage of a call, and the requester with it."""
    meter = Meter(is_forked=True)

    def measure() -> None:
        meter.begin()
        meter.begun()
        Measured.unpack(meter.ended()().pack())

    return measure


def reap(slot: Slot) -> None:
    """Wait until the children that are exiting have been reaped."""
    for child in list(slot.children._exiting):
        child.wait_exited()


# ── peers ───────────────────────────────────────────────────────────────────────────────────────


def _process(context: Any) -> Callable[[], None]:
    """A process of a forkserver, with a pipe for its result."""

    def call() -> None:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=bodies.answer, args=(writer,))
        process.start()
        writer.close()
        reader.recv()
        reader.close()
        process.join()

    return call


@contextlib.contextmanager
def billiard_forkserver() -> Iterator[Contender]:
    """What Celery's own pool could be."""
    context = billiard.context.ForkServerContext()
    context.set_forkserver_preload([*PRELOAD, "bench.bodies"])
    yield timed("billiard's forkserver", _process(context))


@contextlib.contextmanager
def stdlib_forkserver() -> Iterator[Contender]:
    """CPython's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "bench.bodies"])
    yield timed("multiprocessing's forkserver", _process(context))


@contextlib.contextmanager
def process_pool_executor() -> Iterator[Contender]:
    """CPython's, with a process for each call."""
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, max_tasks_per_child=1
    ) as executor:
        yield timed(
            "ProcessPoolExecutor(max_tasks_per_child=1)",
            lambda: executor.submit(bodies.nothing).result(),
        )


@contextlib.contextmanager
def pebble_process() -> Iterator[Contender]:
    """A process for each call."""
    context = multiprocessing.get_context("fork")
    function = pebble.concurrent.process(mp_context=context)(bodies.nothing)
    yield timed("pebble's concurrent.process, a fork", lambda: function().result())


@contextlib.contextmanager
def loky_executor() -> Iterator[Contender]:
    """An executor for each call, which is what it has for a fresh process."""

    def call() -> None:
        with loky.ProcessPoolExecutor(1) as executor:
            executor.submit(bodies.nothing).result()

    yield timed("loky's executor", call)


QUICK_PEERS = (billiard_forkserver, stdlib_forkserver, pebble_process)
SLOW_PEERS = [loky_executor]
if sys.version_info >= (3, 11):
    # Python 3.10 has no max_tasks_per_child.
    SLOW_PEERS.append(process_pool_executor)
