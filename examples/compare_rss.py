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

from rss_comparison.errors import ComparisonError, UsageError
from rss_comparison.interruption import Interrupted, note_signals
from rss_comparison.options import Options, parse


def compare(options: Options) -> None:
    """Run the comparison, once it is known that everything it needs is installed."""
    try:
        # Not at the top of the file: `--help` and complaints about options work without these.
        from rss_comparison.comparison import run

        if any(variant.isolated for variant in options.variants):
            import isolated_tasks  # noqa: F401  (a worker without it would fail much later)
    except ImportError as error:
        raise UsageError(
            f"{error}; from a checkout, \"pip install -e '.[examples]'\" installs what is needed"
        ) from error
    run(options)


def main() -> int:
    """Return the exit code; an error is one line on stderr, never a traceback."""
    try:
        note_signals()
        compare(parse())
    except ComparisonError as error:
        print(f"compare_rss: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        print(f"compare_rss: {interrupted}; every worker is stopped", file=sys.stderr)
        return interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
