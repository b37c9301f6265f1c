"""The command line; needs nothing but the standard library, so that `--help` always works."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from support.errors import UsageError
from support.program import Parser, at_least, check_backend, parser

PLAIN, RECYCLED, ISOLATED, BATCH = VARIANT_NAMES = ("plain", "recycled", "isolated", "batch")

VARIABLE = "COMPARE_RSS_VARIANT"

TASK_NAME = "compare_rss.summarise"
PING_NAME = "compare_rss.ping"

#: Pools that need no further package. Only prefork has processes that can be recycled.
POOLS = ("prefork", "threads", "solo")


@dataclass(frozen=True)
class Variant:
    """One of the workers that are compared."""

    name: str
    label: str
    isolated: bool = False
    batch_size: int = 1
    max_tasks_per_child: int | None = None

    @classmethod
    def from_environment(cls) -> Variant:
        """Read in a worker what the command wrote there with `environment()`."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> Mapping[str, str]:
        """The variable by which a worker knows which of the variants it is."""
        return {VARIABLE: json.dumps(asdict(self))}


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    variants: tuple[Variant, ...]
    tasks: int
    megabytes: int
    concurrency: int
    pool: str
    output: Path
    broker: str | None
    backend: str | None
    live: bool
    quiet: bool


def parse(argv: list[str] | None = None) -> Options:
    """Read the command line.

    Raises:
        UsageError: An option has a value that cannot be used.
    """
    given = _parser().parse_args(argv)
    check_backend(given)
    return Options(
        variants=_chosen(given),
        tasks=given.tasks,
        megabytes=given.megabytes,
        concurrency=given.concurrency,
        pool=given.pool,
        output=given.output,
        broker=given.broker,
        backend=given.backend,
        live=not (given.no_live or given.quiet),
        quiet=given.quiet,
    )


def _parser() -> Parser:
    made = parser(
        "compare_rss",
        "Run one workload on several Celery workers and plot the memory each keeps.",
    )
    count = at_least(1)
    add = made.add_argument
    add("--tasks", type=count, default=21, metavar="N", help="tasks for each worker")
    add("--megabytes", type=count, default=250, metavar="MB", help="peak of one task")
    add("--concurrency", type=count, default=1, metavar="N", help="slots of each worker")
    add("--batch-size", type=count, default=20, metavar="N", help="calls that one child serves")
    add("--max-tasks-per-child", type=count, default=1, metavar="N", help="for `recycled`")
    add("--pool", choices=POOLS, default="prefork", help="the workers' pool")
    add(
        "--variants",
        type=_variant_names,
        metavar="NAMES",
        help=f"some of {','.join(VARIANT_NAMES)}, commas between (default: all that the pool has)",
        default=argparse.SUPPRESS,
    )
    add("--no-live", action="store_true", help="lines instead of a live table")
    return made


def _variant_names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANT_NAMES:
            raise argparse.ArgumentTypeError(
                f"there is no variant {name!r}; choose from {', '.join(VARIANT_NAMES)}"
            )
    return tuple(names)


def _chosen(given: argparse.Namespace) -> tuple[Variant, ...]:
    """The variants asked for, in the order in which they are always told."""
    per_child = given.max_tasks_per_child
    every = (
        Variant(PLAIN, "plain task"),
        Variant(RECYCLED, f"plain, --max-tasks-per-child={per_child}",
                max_tasks_per_child=per_child),
        Variant(ISOLATED, "IsolatedTask", isolated=True),
        Variant(BATCH, f"IsolatedTask, batch_size={given.batch_size}", isolated=True,
                batch_size=given.batch_size),
    )  # fmt: skip
    recyclable = given.pool == "prefork"
    names = getattr(given, "variants", None)
    if names is None:
        return tuple(v for v in every if recyclable or v.max_tasks_per_child is None)
    if RECYCLED in names and not recyclable:
        raise UsageError(f"the {given.pool} pool has no processes to recycle; only prefork has")
    return tuple(v for v in every if v.name in names)
