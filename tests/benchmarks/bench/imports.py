"""A body that needs a heavy library: imported once, in the forkserver, or for each call."""

from __future__ import annotations

import contextlib
from functools import partial

from bench import bodies
from bench.figures import Section, in_turn, timed
from bench.forkservers import forkserver
from bench.scale import Scale
from harness.processes import Slot


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section("A body that needs pandas")
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(forkserver("pandas", "bench.bodies"))
        bare = stack.enter_context(forkserver("bench.bodies"))
        ways = {
            "preloaded": Slot(loaded.address),
            "imported in each child": Slot(bare.address),
            "a fresh interpreter for each call": Slot(bare.address, start_method="spawn"),
        }
        for slot in ways.values():
            stack.callback(slot.close)
        contenders = [
            timed(name, partial(slot.run, bodies.use_pandas)) for name, slot in ways.items()
        ]
        found = in_turn(contenders, scale.slow_rounds)
    for name, values in found.items():
        section.add(name, values)
    section.ratio("preloaded", "a fresh interpreter for each call")
    section.ratio("preloaded", "imported in each child")
    return section
