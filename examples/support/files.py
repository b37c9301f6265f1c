"""Messages as files in a folder: a broker for one machine, and nothing to install or to start."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem

#: Celery finds the transport by this name once this module is imported.
URL = "files://"

#: Kombu's own 1 s would be most of what a task takes here.
POLLING_INTERVAL = 0.02

#: In the folder that `options` is asked for.
FOLDERS = ("messages", "control")


class Channel(filesystem.Channel):  # type: ignore[misc]  # Kombu has no types
    """Messages each of which appears at once.

    Kombu's own are written where they are read, and whoever polls may find half of one.
    """

    @cached_property
    def data_folder_out(self) -> str:
        """A folder of this process alone, on the same file system."""
        folder = Path(self.data_folder_in).parent / f"out-{os.getpid()}"
        folder.mkdir(exist_ok=True)
        return str(folder)

    def _put(self, queue: str, payload: Any, **keywords: Any) -> None:
        super()._put(queue, payload, **keywords)
        for message in Path(self.data_folder_out).iterdir():
            message.rename(Path(self.data_folder_in) / message.name)


class Transport(filesystem.Transport):  # type: ignore[misc]
    Channel = Channel


TRANSPORT_ALIASES["files"] = f"{__name__}:Transport"


def create(folder: Path) -> None:
    """Make the folders for messages in a folder."""
    for name in FOLDERS:
        (folder / name).mkdir()


def options(folder: str) -> dict[str, Any]:
    """What `broker_transport_options` has to be for messages to go through a folder."""
    return {
        "data_folder_in": f"{folder}/messages",
        "control_folder": f"{folder}/control",
        "polling_interval": POLLING_INTERVAL,
    }
