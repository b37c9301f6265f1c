"""What the workers import: `celery -A rss_comparison.app worker`.

One module for all of them, and one body. They differ in the options of the task alone, which
come from the environment, as the broker does.
"""

from __future__ import annotations

from typing import Any

from rss_comparison.options import PING_NAME, TASK_NAME, Variant
from rss_comparison.workload import summarise
from support.connection import make_app


def task_options(variant: Variant) -> dict[str, Any]:
    """What a variant adds to `@app.task`."""
    if not variant.isolated:
        return {}
    # Not at the top: the plain workers run as if this package had never been installed.
    from isolated_tasks import IsolatedTask

    return {"base": IsolatedTask, "batch_size": variant.batch_size}


def ping() -> None:
    """Tell that the worker is up; plain in every variant, and done before anything is measured."""


app = make_app()
app.task(name=PING_NAME)(ping)
app.task(name=TASK_NAME, **task_options(Variant.from_environment()))(summarise)
