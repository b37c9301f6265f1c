"""What the `celery` command has beyond Celery's own: ``celery isolated …``, options of ``worker``.

Celery loads this module, by the entry point ``celery.commands``, whenever its command is run in an
environment where this package is installed, so it imports little.
"""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryOption
from celery.bin.worker import worker

from isolated_tasks import audit
from isolated_tasks.cli_audit import audit_command

__all__ = ["isolated"]


@click.group()
def isolated(**options: Any) -> None:
    """Look at isolated tasks, and for tasks to isolate."""
    # The options are an app's own for every command (`user_options["preload"]`), which Celery hands
    # to this one too before 5.7.


isolated.add_command(audit_command)


def _install(ctx: Any, parameter: Any, value: bool) -> bool:
    # Whether the option was given or not: the setting asks for the audit too, and it may come from
    # the command line (`-- isolated.memory_audit=yes`), which is read later. The step decides.
    audit.install(ctx.obj.app)
    return value


# An app can add options to the worker (`user_options`), but only one that imports this package, and
# an app whose tasks are all plain has no reason to.
worker.params.append(
    CeleryOption(
        ["--memory-audit"],
        is_flag=True,
        default=False,
        callback=_install,
        help_group="Isolated Tasks",
        help="Measure the memory of plain tasks as they run, for 'celery isolated audit'. "
        "Prefork and solo only.",
    )
)
