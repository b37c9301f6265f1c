"""How much is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Of everything, how much."""

    #: Of calls alone, and of each peer's.
    rounds: int
    #: Of what takes longer.
    slow_rounds: int
    #: Through Celery: times that each worker gets a chunk, and how many tasks that is.
    chunks: int
    tasks: int
    #: Tasks of a chunk for workers that take about a second for each.
    slow_tasks: int
    concurrencies: Sequence[int]
    batch_sizes: Sequence[int]
    #: Of payloads, in bytes.
    sizes: Sequence[int]
    #: Slots of the workers whose memory is measured, and light tasks that they have done by then.
    slots: int
    light_tasks: int
    #: Of the requesters that are compared, in MB.
    requesters: tuple[int, int]
    #: One after the other, to see whether they become slower.
    calls: int


FULL = Scale(
    rounds=300,
    slow_rounds=15,
    chunks=5,
    tasks=400,
    slow_tasks=6,
    concurrencies=(1, 2, 8, 32),
    batch_sizes=(2, 5, 20, 100),
    sizes=(1_000, 1_000_000, 64_000_000, 256_000_000),
    slots=16,
    light_tasks=2_000,
    requesters=(50, 2_000),
    calls=20_000,
)

#: Enough to see that everything can be measured still.
SHORT = Scale(
    rounds=3,
    slow_rounds=1,
    chunks=1,
    tasks=12,
    slow_tasks=2,
    concurrencies=(1,),
    batch_sizes=(20,),
    sizes=(1_000, 256_000_000),
    slots=2,
    light_tasks=20,
    requesters=(50, 200),
    calls=40,
)
