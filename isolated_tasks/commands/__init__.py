"""What the `celery` program has beyond Celery's own: ``celery isolated …``, options of ``worker``.

Celery imports this module, by the entry point ``celery.commands``, whenever its program starts and
this package is installed. So a command is imported when it is run.
"""

from __future__ import annotations

import importlib
from typing import Any

import click
from celery.bin.base import CeleryOption, handle_preload_options
from celery.bin.worker import worker

# So that the program knows `celery inspect isolated`, also where the app has not imported a task.
import isolated_tasks.remote  # noqa: F401
from isolated_tasks import audit

__all__ = ["isolated"]

#: Where each command is.
_COMMANDS = {
    "audit": "isolated_tasks.commands.audit:audit_command",
    "top": "isolated_tasks.commands.top:top",
}


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_Commands)
@click.pass_context
@handle_preload_options
def isolated(ctx: click.Context, **_: Any) -> None:
    """See what isolated tasks do, and which tasks to isolate."""


def _install_audit(ctx: Any, parameter: Any, value: bool) -> bool:
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
        callback=_install_audit,
        help_group="Isolated Tasks",
        help="Measure the memory of plain tasks as they run, for 'celery isolated audit'. "
        "Prefork and solo only.",
    )
)
