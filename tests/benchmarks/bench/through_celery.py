"""Light tasks through Celery and Redis: isolated, plain, with a pool process for each, and RQ's."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from bench.figures import Section, at_least
from bench.scale import Scale
from bench.workers import RQVariant, Variant, per_task, spent, started

PLAIN = Variant("plain", "bench.app.plain")
ISOLATED = Variant("isolated", "bench.app.isolated")
WITHOUT_SPARE = Variant(
    "isolated, isolated_spares=0", "bench.app.isolated", arguments=("--", "isolated.spares=0")
)
RQ = RQVariant("RQ")
FRESH = "--max-tasks-per-child=1"


def fresh(slots: int) -> Variant:
    """A pool process for each task."""
    name = f"plain, {FRESH}, {slots} slot{'s' * (slots > 1)}"
    return Variant(name, "bench.app.plain", concurrency=slots, arguments=(FRESH,), is_slow=True)


def batch(size: int) -> Variant:
    """Some calls for each process."""
    return Variant(f"isolated, batch of {size}", f"batch_{size}")


def several(task: str, pool: str, concurrency: int) -> Variant:
    """Several slots."""
    return Variant(f"{task}, {pool} -c {concurrency}", f"bench.app.{task}", pool, concurrency)


def measure(scale: Scale) -> Section:
    """Measure all of it."""
    section = Section("Light tasks through Celery and Redis, one slot")
    variants = [
        PLAIN,
        ISOLATED,
        WITHOUT_SPARE,
        *map(batch, scale.batch_sizes),
        fresh(1),
        fresh(2),
        RQ,
    ]
    _measure(section, variants, scale)
    rate = "tasks/s, {} / {}"
    for name, against, bound in (
        ("isolated", "plain", at_least(0.4)),
        (WITHOUT_SPARE.name, "plain", None),
        ("isolated, batch of 20", "plain", at_least(0.8)),
        ("isolated", fresh(1).name, at_least(100)),
        ("isolated", fresh(2).name, at_least(25)),
        ("isolated", "RQ", at_least(4)),
    ):
        # The rate is the inverse of the time.
        section.ratio(against, name, bound, name=rate.format(name, against))
    for size in scale.batch_sizes:
        if size != 20:
            name = batch(size).name
            section.ratio("plain", name, name=rate.format(name, "plain"))
    return section


def measure_slots(scale: Scale) -> Section:
    """The same with more slots, in two pools."""
    section = Section("Light tasks through Celery and Redis, more slots")
    for concurrency in scale.concurrencies:
        for pool in ("prefork", "threads"):
            plain, isolated = (several(task, pool, concurrency) for task in ("plain", "isolated"))
            _measure(section, [plain, isolated], scale)
            section.ratio(
                plain.name, isolated.name, name=f"tasks/s, {isolated.name} / {plain.name}"
            )
    return section


def _measure(section: Section, variants: list[Variant], scale: Scale) -> None:
    """Each gets a chunk, in turn, in another order each time."""
    found: dict[str, list[float]] = {variant.name: [] for variant in variants}
    generator = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, started(variants, Path(folder)) as pids:
        order = list(variants)
        for _ in range(scale.chunks):
            generator.shuffle(order)
            for variant in order:
                count = scale.slow_tasks if variant.is_slow else scale.tasks
                spans = per_task(variant, count)
                # The mean of a chunk: several slots end their tasks at about the same time, and so
                # does a process of a batch.
                found[variant.name].append(sum(spans) / len(spans))
        accounted = [variant for variant in variants if variant in (PLAIN, ISOLATED, batch(20))]
        for variant in accounted:
            _account(section, variant, pids[variant.name], scale.tasks)
    for name, values in found.items():
        section.add(f"{name}", values, "ms/task")


def _account(section: Section, variant: Variant, pid: int, tasks: int) -> None:
    """What each part of a worker spends on a task: what its time is made of."""
    before = spent(pid)
    variant.run(tasks)
    for part, after in spent(pid).items():
        if part not in before:
            continue
        meanwhile = after.since(before[part])
        cpu = 1e3 * meanwhile.cpu_seconds / tasks
        section.figure(f"CPU of the {part}, {variant.name}", cpu, "ms/task")
        if part in ("forkserver", "children"):
            faults = meanwhile.page_faults / tasks
            section.figure(f"page faults of the {part}, {variant.name}", faults, "/task")
