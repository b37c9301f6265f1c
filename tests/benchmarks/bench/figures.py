"""What a section finds: series of measurements, and ratios of two medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: Does one thing, and returns how long each part of it took, in seconds, by the part's name.
Contender = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Series:
    """Measurements of one thing."""

    name: str
    values: Sequence[float]
    unit: str = "ms"

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """What 99 of 100 do not exceed; of fewer values, the highest."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


@dataclass(frozen=True)
class Bound:
    """What a figure is to be."""

    kind: Literal["at most", "at least"]
    value: float

    def is_kept(self, value: float) -> bool:
        """Whether it is."""
        return value <= self.value if self.kind == "at most" else value >= self.value


def at_most(value: float) -> Bound:
    """An upper bound."""
    return Bound("at most", value)


def at_least(value: float) -> Bound:
    """A lower bound."""
    return Bound("at least", value)


@dataclass(frozen=True)
class Figure:
    """What one number came to, and what it was to come to."""

    name: str
    value: float
    unit: str = "×"
    bound: Bound | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it is within its bound, if it has one."""
        return self.bound is None or self.bound.is_kept(self.value)


@dataclass
class Section:
    """All that was found about one question."""

    title: str
    series: list[Series] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, values: Iterable[float], unit: str = "ms") -> Series:
        """Keep a series, and return it."""
        self.series.append(Series(name, list(values), unit))
        return self.series[-1]

    def find(self, name: str) -> Series:
        """The series of this name."""
        return next(series for series in self.series if series.name == name)

    def ratio(self, of: str, against: str, bound: Bound | None = None, name: str = "") -> None:
        """Keep the ratio of two medians."""
        value = self.find(of).p50 / self.find(against).p50
        self.figures.append(Figure(name or f"{of} / {against}", value, bound=bound))

    def figure(self, name: str, value: float, unit: str, bound: Bound | None = None) -> None:
        """Keep a figure that is no ratio."""
        self.figures.append(Figure(name, value, unit, bound))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Section:
        """The same from plain data."""
        figures = [
            Figure(**{**one, "bound": Bound(**one["bound"]) if one["bound"] else None})
            for one in data["figures"]
        ]
        return cls(data["title"], [Series(**one) for one in data["series"]], figures)


def in_turn(contenders: Iterable[Contender], rounds: int) -> dict[str, list[float]]:
    """Run all, one after the other, in another order each time.

    Returns:
        What each part took, in milliseconds. A round before the first does not count.
    """
    contenders = list(contenders)
    generator = random.Random(1)
    found: dict[str, list[float]] = {}
    for contender in contenders:
        contender()
    for _ in range(rounds):
        generator.shuffle(contenders)
        for contender in contenders:
            for name, seconds in contender().items():
                found.setdefault(name, []).append(1e3 * seconds)
    return found


def timed(name: str, function: Callable[[], object]) -> Contender:
    """A contender that is one function."""

    def run() -> Mapping[str, float]:
        began = time.perf_counter()
        function()
        return {name: time.perf_counter() - began}

    return run
