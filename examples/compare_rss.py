#!/usr/bin/env python3
"""Run one workload on four Celery workers, and plot the memory that each of them keeps.

    python examples/compare_rss.py

Each worker is a real `celery worker` of its own: the plain task, the plain task with
`--max-tasks-per-child`, an `IsolatedTask` with a fresh process for every call, and an
`IsolatedTask` whose processes serve a batch of calls. No broker is needed: messages and results
go through files in a temporary folder, unless `--broker` names a Redis or a RabbitMQ.

The exit code is 0, or 1 if a worker or a task failed, 2 for options that cannot be used, and 128
plus the signal's number if a signal such as Ctrl-C (130) ended the run.
"""

from __future__ import annotations

import sys

from rss_comparison.options import parse
from support.program import run


def compare() -> None:
    """Run the comparison, once it is known that everything it needs is installed."""
    options = parse()
    # Not at the top of the file: `--help` and complaints about options work without these.
    from rss_comparison import comparison

    if any(variant.isolated for variant in options.variants):
        import isolated_tasks  # noqa: F401  (a worker without it would fail much later)
    comparison.run(options)


if __name__ == "__main__":
    sys.exit(run("compare_rss", compare))
