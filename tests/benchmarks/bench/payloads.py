"""Data, to a body and back: how long it takes, and what the slot's process holds afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

from bench import bodies
from bench.figures import Section, at_most, in_turn, timed
from bench.forkservers import forkserver, rss_mib
from bench.scale import Scale
from harness.processes import Slot

KINDS = ("bytes", "array", "frame")


def name_of(size: int) -> str:
    """In the unit in which it is a small number."""
    for unit, bytes_ in (("MB", 1_000_000), ("kB", 1_000)):
        if size >= bytes_:
            return f"{size // bytes_} {unit}"
    return f"{size} B"


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section("Payloads")
    for size in scale.sizes:
        rounds = scale.rounds // 4 if size < bodies.MB else scale.slow_rounds
        for kind in KINDS:
            kept = f"{kind} {size}"
            with forkserver("pandas", setup="bench.bodies:keep", argument=kept) as launcher:
                slot = Slot(launcher.address)
                slot.run(bodies.nothing)
                _measure(section, slot, kind, size, max(1, rounds))
                slot.close()
    largest = name_of(scale.sizes[-1])
    section.ratio(f"{largest} array, returned", f"{largest} array, copied once", at_most(2))
    return section


def _measure(section: Section, slot: Slot, kind: str, size: int, rounds: int) -> None:
    name = f"{name_of(size)} {kind}"
    data = bodies.make(kind, size)
    contenders = [
        timed(f"{name}, as argument", partial(slot.run, bodies.take, data)),
        timed(f"{name}, copied once", _copy(kind, data)),
    ]
    found = in_turn(contenders, rounds)
    del data, contenders
    gc.collect()
    before = rss_mib()
    found |= in_turn([timed(f"{name}, returned", partial(slot.run, bodies.send))], rounds)
    gc.collect()
    for part, values in found.items():
        section.add(part, values)
    bound = at_most(2) if kind == "array" and size > 100 * bodies.MB else None
    section.figure(f"RSS after {name} was returned and dropped", rss_mib() - before, "MiB", bound)


def _copy(kind: str, data: object) -> Callable[[], object]:
    """One copy into memory that nobody has touched."""
    if kind == "bytes":
        assert isinstance(data, bytes)
        return lambda: bytearray(data)
    return data.copy  # type: ignore[attr-defined, no-any-return]
