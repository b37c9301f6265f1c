"""``celery isolated …``: what the `celery` program finds under the entry point ``celery.commands``.

Celery imports this module whenever its program starts, so a command is imported when it is run.
"""

from __future__ import annotations

import importlib
from typing import Any

import click
from celery.bin.base import handle_preload_options

# So that the program knows `celery inspect isolated`, also where the app has not imported a task.
import isolated_tasks.remote  # noqa: F401

__all__ = ["isolated"]

#: Where each command is.
_COMMANDS = {
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
