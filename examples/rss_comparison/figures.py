"""What one run measured; filled in while it goes on, so that it can be shown at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rss_comparison.options import Variant
from support.memory import MEGABYTE, Sample

#: How much of the time before the first task a curve shows.
LEAD_SECONDS = 1.0


class Stage(Enum):
    """How far a run is; the values are the words for it in the table."""

    WAITING = "waiting"
    STARTING = "starting"
    WORKING = "working"
    IDLE = "idle"
    FINISHED = "done"
    STOPPING = "stopping"


@dataclass
class Run:
    """One worker's figures, those that are known so far."""

    variant: Variant
    tasks: int
    stage: Stage = Stage.WAITING
    done: int = 0
    samples: list[Sample] = field(default_factory=list)
    began_at: float = 0.0
    ended_at: float | None = None
    baseline: Sample | None = None
    after: Sample | None = None
    left_objects: int = 0
    left_bytes: int = 0

    @property
    def peak_bytes(self) -> int | None:
        """The largest sample, from the first task on."""
        if self.baseline is None:
            return None
        return max(sample.rss_bytes for sample in self.samples if sample.at >= self.baseline.at)

    @property
    def retained_bytes(self) -> int | None:
        """What the idle worker holds beyond what it held before its first task."""
        if self.baseline is None or self.after is None:
            return None
        return self.after.rss_bytes - self.baseline.rss_bytes

    @property
    def tasks_per_second(self) -> float | None:
        """From the sending of the first task to the outcome of the last, or up to now."""
        if not self.done or self.baseline is None:
            return None
        until = self.ended_at if self.ended_at is not None else self.samples[-1].at
        return self.done / max(until - self.began_at, 1e-9)

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds since the tasks were sent, and the tree's megabytes; from just before that."""
        start = self.began_at - LEAD_SECONDS
        shown = [sample for sample in self.samples if sample.at >= start]
        return (
            [sample.at - self.began_at for sample in shown],
            [sample.rss_bytes / MEGABYTE for sample in shown],
        )

    def as_json(self) -> dict[str, Any]:
        """The figures and every sample, in seconds and bytes."""
        seconds = None if self.ended_at is None else round(self.ended_at - self.began_at, 3)
        return {
            "name": self.variant.name,
            "label": self.variant.label,
            "tasks": self.done,
            "seconds": seconds,
            "tasks_per_second": self.tasks_per_second,
            "baseline_bytes": self.baseline and self.baseline.rss_bytes,
            "peak_bytes": self.peak_bytes,
            "after_bytes": self.after and self.after.rss_bytes,
            "retained_bytes": self.retained_bytes,
            "left_behind_objects": self.left_objects,
            "left_behind_bytes": self.left_bytes,
            "samples": [
                [round(sample.at - self.began_at, 3), sample.rss_bytes, sample.processes]
                for sample in self.samples
            ],
        }
