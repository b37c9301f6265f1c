"""What whole workers hold: all their processes, each page counted once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.figures import Section, at_most
from bench.forkservers import pss_mib, tree
from bench.scale import Scale
from bench.through_celery import several
from bench.workers import kept_busy, started


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section(f"Memory of a worker after {scale.light_tasks} light tasks")
    variants = [
        several("plain", "prefork", scale.slots),
        several("isolated", "prefork", scale.slots),
        several("isolated", "threads", scale.slots),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, variant in enumerate(variants):
            with started([variant], folder) as pids:
                variant.run(scale.light_tasks)
                processes = tree(pids[variant.name])
                section.add(f"{variant.name}, idle", [pss_mib(processes)], "MiB")
                with kept_busy(variant, folder / f"busy-{number}"):
                    busy = pss_mib(tree(pids[variant.name]))
                section.add(f"{variant.name}, busy", [busy], "MiB")
    plain, prefork, threads = (variant.name for variant in variants)
    section.ratio(f"{threads}, idle", f"{plain}, idle", at_most(0.25))
    section.ratio(f"{prefork}, idle", f"{plain}, idle")
    section.ratio(f"{threads}, busy", f"{plain}, busy")
    return section
