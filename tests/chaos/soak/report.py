"""The table of a soak, and its JSON."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from soak.accounts import RULES, Accounts
from soak.growth import LASTING, Growth
from soak.orphans import Orphan

#: What a process may have more at its last rest than at its first. Each of Celery's connections,
#: opened when all others are busy, has an epoll descriptor.
DESCRIPTORS_ADMITTED = 6
#: The second is of those that have been there from their beginning: imports, connections, room for
#: the largest result.
RSS_ADMITTED = 8 << 20
RSS_ADMITTED_AT_FIRST = 64 << 20
#: That a requester holds descriptors of at rest: the last of each slot of the workers, and a spare.
#: Each has ended, and goes when the next call looks.
CHILDREN_ADMITTED = {"main process": 4 + 1, "pool process": 1 + 1, "forkserver": 0}


@dataclass
class Report:
    """What one soak has found."""

    seed: int
    seconds: float
    accounts: Accounts
    #: How often what was done to whom.
    attacks: Mapping[tuple[str, str], int]
    orphans: Sequence[Orphan]
    #: Processes that were there at a rest, or after the end, and should not have been.
    left: Sequence[str]
    growths: Sequence[Growth]
    #: Names in /dev/shm and in the workers' temporary folder.
    files: Sequence[str]
    #: Processes that ended with a traceback, by the log that it is in.
    crashes: Mapping[str, int]
    #: Workers that did not end when they were asked to.
    not_stopped: Sequence[str] = ()
    #: What else is worth knowing.
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def must_be_zero(self) -> dict[str, int]:
        """Each count that decides."""
        grown = [one for one in self.growths if _has_more_descriptors(one)]
        fat = [one for one in self.growths if _has_more_memory(one)]
        return {
            **{rule: self.accounts.count(rule) for rule in RULES},
            "orphans after 1 s": len(self.orphans),
            "processes left at rest": len(self.left),
            "processes that hold more descriptors": len(grown),
            "processes that hold more memory": len(fat),
            "files left in /dev/shm and in the temporary folder": len(self.files),
            "workers that did not stop": len(self.not_stopped),
            "processes that ended with a traceback": sum(self.crashes.values()),
        }

    @property
    def is_good(self) -> bool:
        return not any(self.must_be_zero.values())

    def lines(self) -> list[str]:
        """The table, as Markdown."""
        lines = [
            f"Seed {self.seed}, {self.seconds:.0f} s of chaos, "
            + ", ".join(f"{key} {value}" for key, value in self.notes.items()),
            "",
            "| calls | |",
            "|---|---:|",
            f"| sent | {sum(self.accounts.ends.values())} |",
        ]
        lines += [f"| … {what} | {count} |" for what, count in _sorted(self.accounts.ends)]
        lines += [f"| {what} | {count} |" for what, count in _sorted(self.accounts.admitted)]
        lines += ["", "| attacks | |", "|---|---:|"]
        lines += [f"| {verb} a {role} | {count} |" for (verb, role), count in self.attacks.items()]
        lines += ["", "| must be 0 | |", "|---|---:|"]
        lines += [f"| {what} | {count} |" for what, count in self.must_be_zero.items()]
        lines += ["", *self._growth_lines()]
        return lines

    def _growth_lines(self) -> list[str]:
        lines = [
            "| growth from first to last rest | processes | longest, s | descriptors, most "
            "| RSS, median, MiB | RSS, most, MiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for role in LASTING:
            for is_warm in (True, False):
                some = [one for one in self.growths if (one.role, one.is_warm) == (role, is_warm)]
                if some:
                    rss = sorted(one.rss_bytes / 2**20 for one in some)
                    name = role if is_warm else f"{role}, from its beginning"
                    lines.append(
                        f"| {name} | {len(some)} | {max(one.seconds for one in some):.0f} "
                        f"| {max(one.descriptors for one in some):+d} "
                        f"| {rss[len(rss) // 2]:+.1f} | {rss[-1]:+.1f} |"
                    )
        return lines

    def details(self) -> list[str]:
        """A line for each thing that must not be."""
        lines = [f"{one.rule}: {one.call}: {one.text}" for one in self.accounts.violations]
        lines += [f"orphan of {one.of}, {one.age:.2f} s: {one.description}" for one in self.orphans]
        lines += [f"left: {one}" for one in self.left]
        lines += [f"file: {one}" for one in self.files]
        lines += [f"did not stop: {one}" for one in self.not_stopped]
        lines += [f"{count} tracebacks: {log}" for log, count in self.crashes.items() if count]
        lines += [
            f"grown: {one}"
            for one in self.growths
            if _has_more_descriptors(one) or _has_more_memory(one)
        ]
        return lines

    def json(self) -> str:
        """All of it."""
        values = {
            "seed": self.seed,
            "seconds": self.seconds,
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("celery", "kombu", "billiard", "isolated-tasks")
                },
            },
            "cpus": os.cpu_count(),
            "ends": dict(self.accounts.ends),
            "admitted": dict(self.accounts.admitted),
            "attacks": {f"{verb} {role}": count for (verb, role), count in self.attacks.items()},
            "must_be_zero": self.must_be_zero,
            "growth": [dataclasses.asdict(one) for one in self.growths],
            "notes": self.notes,
            "details": self.details(),
            "lost": [f"{one.rule}: {one.call}: {one.text}" for one in self.accounts.lost],
        }
        return json.dumps(values, indent=2)


def _has_more_descriptors(growth: Growth) -> bool:
    return (
        growth.descriptors > DESCRIPTORS_ADMITTED
        or growth.children > CHILDREN_ADMITTED[growth.role]
    )


def _has_more_memory(growth: Growth) -> bool:
    return growth.rss_bytes > (RSS_ADMITTED if growth.is_warm else RSS_ADMITTED_AT_FIRST)


def _sorted(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
